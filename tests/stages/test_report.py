"""The table and the picture that a report begins with."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import DamagedStore, Run, Task
from infl_cache.disk.run import RunFolder
from infl_cache.stages.page.content import known
from infl_cache.stages.report import report
from infl_cache.stages.suspects import suspects_report
from tests import tasks

QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "r", tasks.convnet(), **QUIET)
    made.all()
    return made


@pytest.mark.parametrize("name", ["influence.png", "influence.png.partial"])
def test_a_link_is_not_written_through(run, name, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "theirs").write_text("precious")
    (run.path / "report").mkdir(exist_ok=True)
    (run.path / "report" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(DamagedStore, match="expected a file or folder of the run itself, found a link"):
        report(RunFolder(run.path), run.task)
    assert (tmp_path / "theirs").read_text() == "precious"


@pytest.mark.parametrize("measure", ["loss", "margin"])
def test_what_is_called_helpful_helps_and_what_is_called_harmful_harms(tmp_path, measure):
    run = Run(tmp_path / "r", tasks.mlp(n_train=4, n_test=6), measure=measure, **QUIET)
    run.all()
    mean, sign = np.array(run.scores()).mean(0) * (1 if measure == "loss" else -1), "+" if measure == "loss" else "-"
    text = report(run.folder)
    rows = [line for line in text.splitlines() if line.startswith("     ") and "influence" not in line]
    assert len(rows) >= 6
    for line in rows:
        helpful, harmful = line[:33].split(), line[33:].split()
        assert not helpful or helpful[2].startswith("-" if sign == "+" else "+")
        assert not harmful or harmful[2].startswith(sign)
    (named,) = re.findall(r"Most harmful on average: ([^.;]*)", text)
    expected = [i for i in np.argsort(-mean, kind="stable") if mean[i] > 0]
    assert [int(each) for each in re.findall(r"\d+", named)] == expected


def test_names_of_classes_hold_no_commands_for_the_terminal(tmp_path, monkeypatch):
    for place in ("report", "suspects"):
        monkeypatch.setattr(f"infl_cache.stages.{place}.picture", lambda *_: None)
    task = dataclasses.replace(tasks.mlp(), classes=["a\x1b[2J", "b\nc", "\ud800d"])
    run = Run(tmp_path / "r", task, **QUIET)
    run.all()
    run.self_influence()
    for text in (report(run.folder, task), suspects_report(RunFolder(run.path), task)):
        assert all(line.isprintable() for line in text.splitlines())
        assert "a [2J" in text
        assert "b c" in text


def test_an_output_of_a_vector_is_not_called_a_predicted_class(tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 5), torch.randn(12, 3))
    task = Task(model=nn.Linear(5, 3), train=data, test=data, loss=lambda out, y: (out - y).square().sum(1))
    run = Run(tmp_path / "r", task, **QUIET)
    run.all()
    assert "label -, predicted -, loss" in report(RunFolder(run.path), task)
    assert np.isnan(known(run.folder).test["prediction"]).all()
