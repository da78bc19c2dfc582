"""The manual's plans on paper are those that the script prints, and two of them are reckoned again by hand."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from infl_cache import Run
from infl_cache.maths.capture.decide import supposed_forms
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from infl_cache.stages.plan.counts import count

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("plan_on_paper")


def resnet110():
    """Numbers kept, and multiplications forwards: of a 3x3 layer the factors are kept where they are fewer."""
    kept, forwards = 3 * 16 * 9, 3 * 16 * 9 * 32**2
    for stage, (width, side) in enumerate([(16, 32), (32, 16), (64, 8)]):
        before, wider = (width, side) if not stage else (width // 2, 2 * side)
        kept += min(9 * before * width, before * wider**2 + width * side**2)
        kept += 35 * min(9 * width**2, 2 * width * side**2)
        forwards += 9 * side**2 * (before * width + 35 * width**2)
        kept += 37 * 2 * width  # norms: of the stem or the shortcut, and 36
        if stage:
            kept += before * width
            forwards += before * width * side**2
    return kept + 64 + 10, forwards + 640


def transformer(layers=18, width=2048, length=512, words=32_000):
    """The same of the language model: an input that three layers share is kept once."""
    maps = length * width
    kept = layers * (16 * maps + 4 * width)  # 4 + 2 + 5 + 5 maps, and two norms
    kept += length + maps + 2 * width + maps + length * words
    matrices = layers * 12 * width**2 + width * words
    return kept, matrices * length + layers * 2 * length**2 * width


@pytest.mark.parametrize(
    ("job", "by_hand"), [("ResNet-110, CIFAR-10", resnet110), ("transformer, 512 tokens", transformer)]
)
def test_bytes_and_operations_of_a_sample_are_what_the_layers_shapes_say(job, by_hand, script):
    task, n_train, n_test = script.jobs()[job]
    kept, forwards = by_hand()
    plan = Run("nowhere", task, progress=False).plan(n_train=n_train, n_test=n_test, device="h100", disk="7GB/s")
    assert plan.grads.bytes_a_sample == pytest.approx(4 * kept + 24, rel=1e-6)
    assert plan.stest.n_bytes == 4 * n_test * plan.grads.n_params
    assert plan.influence.matrix_bytes == 4 * n_test * n_train + 128
    parameters = select(task.model, None)
    batch = probe_batch(task, range(2), torch.device("meta"))
    found = count(task, parameters, supposed_forms(task, parameters, batch, "auto", None), batch)
    assert found.forward == pytest.approx(2 * forwards, rel=0.01)
    # Twice as much backwards, but for what the first layer's input would take.
    assert found.backward == pytest.approx(4 * forwards, rel=0.04)
    # 40 % of 67 TFLOPS, and 70 % of 64 GB/s; on the disk 7 GB/s after compressing 2 GB/s.
    passing = (found.forward + found.backward + found.build) / 26.8e12
    assert 1 / plan.grads.compute_rate == pytest.approx(passing + 4 * kept / 44.8e9)
    assert 1 / plan.grads.write_rate == pytest.approx((4 * kept + 24) / 7e9 + 4 * kept / 2e9)


def test_the_table_on_the_page_is_what_the_script_prints(script, capsys):
    script.main([])
    printed = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()[1:]]
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "infl_cache/pages/plan.md").read_text().splitlines()
        if line.startswith(("| ResNet-110", "| ResNet-50", "| transformer, 512", "| the same, last"))
    ]
    assert shown == printed
