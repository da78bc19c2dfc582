"""Another task, other data, other options: refused field by field, nothing touched; what is no identity is accepted."""

import copy
import json

import pytest
import torch

from infl_cache import Run
from infl_cache.disk.ledger import Ledger
from infl_cache.disk.manifest import Manifest
from infl_cache.errors import BadInput, ForeignRun
from tests.faults import times
from tests.faults.data import N_TRAIN, Listed, contents, loss, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 7, "test_block_rows": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("identity") / "run", small_task(), **OPTIONS)
    run.all()
    run.self_influence()
    return run.path


def other_model(change):
    model = copy.deepcopy(small_task().model)
    with torch.no_grad():
        change(model)
    return model


def data_with(name, **changes):
    """Inputs and targets of the training or test set, as `changes` make them."""
    data = getattr(small_task(), name)
    inputs, targets = data.inputs.clone(), data.targets.clone()
    return {name: Listed(changes.get("inputs", inputs), changes.get("targets", targets))}


def one_changed(name, index):
    inputs = getattr(small_task(), name).inputs.clone()
    inputs[index, 0] += 1e-9
    return data_with(name, inputs=inputs)


def permuted(name, order):
    data = getattr(small_task(), name)
    return {name: Listed(data.inputs[order], data.targets[order])}


def swapped(name, a, b):
    order = torch.arange(len(getattr(small_task(), name)))
    order[[a, b]] = order[[b, a]]
    return permuted(name, order)


def doubled(outputs, targets):
    return 2 * loss(outputs, targets)


def scaled_by(factor):
    return lambda outputs, targets: factor * loss(outputs, targets)


def forward(model, batch):
    return 2 * model(batch[0])


def targets(batch):
    return (batch[-1] + 1) % 3


def collate(samples):
    return [torch.stack([each[0] for each in samples]) * 2, torch.tensor([int(each[1]) for each in samples])]


def relabelled(index):
    found = small_task().train.targets.clone()
    found[index] = (found[index] + 1) % 3
    return data_with("train", targets=found)


# What is changed, and what the message must name.
TASKS = {
    "one weight": (lambda: {"model": other_model(lambda model: model.weight[0, 0].add_(1e-12))}, "weights: "),
    "parameters": (lambda: {"parameters": ["weight"]}, "n_params: expected 15, found 12"),
    "the model's kind": (lambda: {"model": torch.nn.Sequential(small_task().model)}, "model: "),
    "the loss": (lambda: {"loss": doubled}, "loss: "),
    "a value that the loss closes over": (lambda: {"loss": scaled_by(1.0)}, "loss: "),
    "forward": (lambda: {"forward": forward}, "forward: "),
    "targets": (lambda: {"targets": targets}, "forward: "),
    "collate": (lambda: {"collate": collate}, "forward: "),
    "weight decay": (lambda: {"weight_decay": 0.1}, "weight_decay: expected 0.0, found 0.1"),
    "the measure": (lambda: {"measure": doubled}, "measure: "),
    "a training sample": (lambda: one_changed("train", 5), "train"),
    "a label": (lambda: relabelled(11), "train"),
    "two training samples": (lambda: swapped("train", 3, 9), "train"),
    "the order": (lambda: permuted("train", torch.arange(N_TRAIN).flip(0)), "train"),
    "a sample more": (
        lambda: permuted("train", torch.tensor([*range(N_TRAIN), 0])),
        f"n_train: expected {N_TRAIN}, found {N_TRAIN + 1}",
    ),
    "a sample less": (
        lambda: permuted("train", torch.arange(N_TRAIN - 1)), f"n_train: expected {N_TRAIN}, found {N_TRAIN - 1}"
    ),
    "a test sample": (lambda: one_changed("test", 2), "test"),
    "two test samples": (lambda: swapped("test", 0, 4), "test"),
}  # fmt: skip
NUMBERS = {
    "grads": {"form": "dense", "dtype": "float32", "codec": "zstd", "level": 1, "cache": False,
              "layer_forms": "*=dense"},
    "stest": {"solver": "cg", "curvature": "hessian", "curvature_samples": 5, "damping": 0.2, "tolerance": 1e-3,
              "max_iterations": 9, "seed": 7, "solve_dtype": "float32", "measure": "margin", "scale": 9.0, "depth": 4,
              "repeats": 2, "sample_batch": 3},
}  # fmt: skip
FREE = {
    "batch_size": 3, "device": "cpu", "workers": 1, "memory": "300MB", "block_rows": 5, "test_block_rows": 2,
    "tile_rows": 3, "progress": False, "check_data": "full",
}  # fmt: skip


@pytest.mark.parametrize("what", TASKS)
def test_another_task_is_refused_by_every_stage_and_nothing_is_touched(what, finished):
    changes, named = TASKS[what]
    before = contents(finished)
    only_tests = what in ("a test sample", "two test samples", "weight decay", "the measure")
    for stage in ("stest", "influence") if only_tests else ("grads", "stest", "influence", "self_influence"):
        run = Run(finished, small_task(**changes()), **OPTIONS)
        if only_tests and stage == "influence" and named != "test":
            continue  # what stage 2 was computed from is its own affair
        with pytest.raises(ForeignRun, match=named) as found:
            getattr(run, stage)()
        assert found.value.exit_code == 3
        assert contents(finished) == before


@pytest.mark.parametrize(("stage", "option"), [(stage, option) for stage in NUMBERS for option in NUMBERS[stage]])
def test_another_number_is_refused_field_by_field(stage, option, finished):
    before = contents(finished)
    run = Run(finished, small_task(), **{**OPTIONS, option: NUMBERS[stage][option]})
    with pytest.raises(ForeignRun, match=rf"{option}: expected .*, found "):
        getattr(run, stage)()
    assert contents(finished) == before


@pytest.mark.parametrize("option", FREE)
def test_what_decides_no_number_is_accepted_and_nothing_is_computed_again(option, finished, monkeypatch):
    monkeypatch.setattr(Ledger, "commit", lambda *given: pytest.fail("a block was committed again"))
    run = Run(finished, small_task(), **{**OPTIONS, option: FREE[option]})
    assert [result.computed for result in run.all()] == [0, 0, 0]
    assert run.self_influence().computed == 0


def test_a_newer_format_is_refused_with_a_remedy_and_nothing_is_touched(tmp_path):
    run = Run(tmp_path / "run", small_task(), **OPTIONS)
    run.grads()
    file = run.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    before = contents(run.path)
    with pytest.raises(ForeignRun, match="expected format 1, found format 2; use the version that wrote it"):
        Run(run.path, small_task(), **OPTIONS).stest()
    assert contents(run.path) == before
    with pytest.raises(ForeignRun):
        Manifest.read(file)


def test_one_changed_sample_among_many_is_always_found_by_a_full_check(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("infl_cache.stages.same.CHECK_SECONDS", 0.0)
    task = small_task()
    run = Run(tmp_path / "run", task, **OPTIONS)
    run.grads()
    assert Run(run.path, task, **OPTIONS).grads().computed == 0
    assert "1 of 24 train samples were compared" in caplog.text
    assert "--check-data full" in caplog.text
    missed = 0
    for index in range(1, times(6, N_TRAIN - 1)):
        # The task's own digest is over up to 32 samples, here all: it is not to find it first.
        monkeypatch.setattr("infl_cache.stages.opening.dataset_digest", lambda dataset, name: "the same")
        changes = one_changed("train", index)
        _rename(run.path)
        with pytest.raises(ForeignRun, match=rf"train\[{index}\]: expected the sample"):
            Run(run.path, small_task(**changes), **OPTIONS, check_data="full").grads()
        try:
            Run(run.path, small_task(**changes), **OPTIONS).grads()
            missed += 1
        except ForeignRun:
            pass
    assert missed > 0


def _rename(folder):
    """The manifest with the digest that `dataset_digest` is made to give."""
    manifest = Manifest.read(folder / "manifest.json")
    manifest.task["train"] = "the same"
    manifest.write(folder / "manifest.json")


@pytest.mark.parametrize("wrong", ["all", 1, None])
def test_check_data_is_one_of_two_words(wrong, tmp_path):
    with pytest.raises(BadInput, match=r"check.data"):
        Run(tmp_path / "run", small_task(), check_data=wrong)
