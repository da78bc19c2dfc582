import importlib
import json
import math

import pytest
import torch

from tests.scripts.running import ROOT, ran, refused

TITLES = {"plain": "plain forward+backward", "ours": "infl_cache", "vmap": "vmap(grad)", "loop": "per-sample loop"}


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("workloads")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick benchmark of two workloads: the folder it ran in, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    done = ran("bench_grads", folder, "--quick", "--workloads", "W1,W2", "--rounds", "2", "--only", ",".join(TITLES),
               "--json", "figures.jsonl", "--codec", "zstd")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def numbers(line):
    """The figures of a table's row after its title, ranges taken apart."""
    words = line.replace("(", " ").replace(")", " ").replace("-", " ").replace(",", "").split()
    return [float(word) for word in words if word not in ("auto", "")]


def test_it_prints_a_table_for_each_workload_and_a_summary(quick):
    first, second, summary = quick[1].split("\n\n")
    for name, text in (("W1", first), ("W2", second)):
        lines = text.splitlines()
        assert lines[0].startswith(f"{name}  ")
        rows = lines[2 : 2 + len(TITLES)]
        for title, row in zip(TITLES.values(), rows, strict=True):
            assert row.startswith(title)
            assert all(math.isfinite(value) and value > 0 for value in numbers(row.removeprefix(title)))
            assert len(numbers(row.removeprefix(title))) >= 6
        assert any("without opening the task" in line and "times smaller" in line for line in lines)
    head, *rows = summary.splitlines()
    assert head.split()[:4] == ["all", "parameters", "plain/s", "ours/s"]
    assert [row.split()[0] for row in rows] == ["W1", "W2"]


def test_it_appends_one_object_for_each_workload(quick):
    records = [json.loads(line) for line in (quick[0] / "figures.jsonl").read_text().splitlines()]
    assert [record["workload"] for record in records] == ["W1", "W2"]
    for record in records:
        known = {each["key"]: each for each in record["contestants"]}
        assert list(known) == list(TITLES)
        for each in known.values():
            assert len(each["samples_per_second_rounds"]) == record["rounds"] == 2
            values = [each["samples_per_second"], each["peak_rss_mb"], each["samples"], *each["of_plain"].values()]
            assert all(math.isfinite(value) and value > 0 for value in values)
            assert each["of_plain"]["low"] <= each["of_plain"]["median"] <= each["of_plain"]["high"]
        assert known["plain"]["of_plain"] == {"median": 1, "low": 1, "high": 1}
        ours = known["ours"]
        assert ours["samples"] == record["n_train"]
        assert ours["times_smaller"] == pytest.approx(4 * record["n_params"] / ours["bytes_per_sample"])
        assert ours["samples_per_second_stage"] >= 0.5 * ours["samples_per_second"]
        assert isinstance(ours["timings"], dict)
        assert {"torch", "numpy", "infl_cache", "python"} <= set(record["versions"])
        assert record["options"] == {"codec": "zstd"}
        assert record["quick"] is True
        assert record["threads"] >= 1
        assert record["device"] == "cpu"
        assert record["device_name"]


def test_it_leaves_nothing_but_its_figures(quick):
    assert [path.name for path in quick[0].iterdir()] == ["figures.jsonl"]


@pytest.mark.parametrize("wrong", [["--workloads", "W9"], ["--only", "fast"], ["--rounds", "0"], ["--samples", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, tmp_path):
    code, said = refused("bench_grads", tmp_path, *wrong)
    assert code == 2
    assert wrong[0] in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("W1", 535_818, 535_818),
        ("W2", 136_874, 136_874),
        ("W3", 272_474, 272_474),
        ("W4", 11_100_000, 11_200_000),
        ("W5", 532_736, 532_736),
    ],
)
def test_a_workload_has_its_parameters_and_gives_one_loss_a_sample(name, low, high, workloads):
    workload = workloads.WORKLOADS[name](n_train=5, n_test=2, n_fit=0)
    assert low <= workload.n_params <= high
    assert (len(workload.train), len(workload.test)) == (5, 2)
    assert not workload.model.training
    x, y = workload.train[:3]
    assert workload.loss(workload.model(x), y).shape == (3,)
    task = workload.task(4)
    assert len(task.train) == 4
    assert task.model is workload.model


@pytest.mark.parametrize("name", ["W1", "W2", "W5"])
def test_a_workload_is_the_same_each_time_whatever_its_size(name, workloads):
    state = torch.get_rng_state()
    small = workloads.WORKLOADS[name](n_train=20, n_test=2, n_fit=64)
    large = workloads.WORKLOADS[name](n_train=1100, n_test=3, n_fit=64)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(small.train[:20], large.train[:20], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(small.model.parameters(), large.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(small.train[0][0], small.test[0][0])


def test_the_output_layer_of_the_transformer_is_its_embedding(workloads):
    model = workloads.transformer(n_train=1, n_test=1, n_fit=0).model
    assert model.output.weight is model.embedding.weight
    tokens = torch.arange(64)[None]
    changed = tokens.clone()
    changed[0, 40] = 999
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[0, :40], after[0, :40], atol=1e-6)
    assert not torch.allclose(before[0, 40:], after[0, 40:], atol=1e-3)


def test_a_tenth_of_the_labels_is_drawn_anew(workloads):
    x, y = workloads.images(2000, (50,), seed=1)
    centres = torch.stack([x[y == label].mean(0) for label in range(10)])
    right = ((x @ centres.T - centres.square().sum(1) / 2).argmax(1) == y).float().mean()
    assert 0.7 < right < 0.95
