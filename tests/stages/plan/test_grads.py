"""A plan says what stage 1 would do, from the same decisions, and leaves nothing behind."""

import dataclasses

import pytest
import torch
from torch import nn

from infl_cache import BadInput, Run
from infl_cache.__main__ import main
from tests import tasks
from tests.tasks import TASKS, built, classified, normal

QUIET = {"progress": False}


def convolutional():
    head = (nn.Flatten(), nn.Linear(144, 30), nn.ReLU(), nn.Linear(30, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head)


def images(n_train=10):
    return classified(built(convolutional, torch.float32), normal(n_train + 4, 3, 8, 8).float(), n_train)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.out = nn.GRU(5, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.gru(x)[0][:, -1])


def test_a_plan_writes_nothing_and_agrees_with_the_run(tmp_path):
    task = images()
    run = Run(tmp_path / "run", task, **QUIET)
    plan = run.plan().grads
    assert list(tmp_path.iterdir()) == []
    assert [(layer.name, layer.form, layer.scored) for layer in plan.layers] == [
        ("3", "factored", "contracted"), ("5", "factored", "contracted"), ("0", "dense", "stored")
    ]  # fmt: skip
    assert [layer.numbers for layer in plan.layers] == [174, 33, 112]
    result = run.grads()
    assert run.folder.plan("grads")["block_rows"] == plan.block_rows
    assert plan.n_bytes == pytest.approx(result.n_bytes, rel=0.01)


@pytest.mark.parametrize("name", ["attention", "branching", "dicts", "tied"])
def test_tasks_of_all_kinds_can_be_planned_and_printed(name, tmp_path):
    plan = Run(tmp_path / "run", TASKS[name](), **QUIET).plan()
    text = str(plan)
    assert "times smaller than float32 rows" in text
    assert 0 < plan.seconds < 3600
    assert plan.memory > plan.base
    assert "samples/s computed" in text


def test_layer_forms_overrule_the_choice_in_the_plan_and_in_the_run(tmp_path):
    run = Run(tmp_path / "run", images(), layer_forms="0=factored,5=dense", **QUIET)
    forms = {layer.name: layer.form for layer in run.plan().grads.layers}
    assert forms == {"0": "factored", "3": "factored", "5": "dense"}
    run.grads()
    assert {each["module"] for each in run.folder.plan("grads")["forms"]["factored"]} == {"0", "3"}


def test_layer_forms_overrule_form_dense_too(tmp_path):
    plan = Run(tmp_path / "run", images(), form="dense", layer_forms="3=factored", **QUIET).plan().grads
    assert {layer.name: layer.form for layer in plan.layers} == {"0": "dense", "3": "factored", "5": "dense"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("0=sparse", "PATTERN=dense or PATTERN=factored"), ("9=dense", "matches no layer with a rule; they are 0, 3, 5")],
)
def test_bad_layer_forms_are_refused(tmp_path, text, message):
    with pytest.raises(BadInput, match=message):
        Run(tmp_path / "run", images(), layer_forms=text, **QUIET).plan()


def test_store_or_not_follows_from_the_rates(tmp_path):
    whole = Run(tmp_path / "run", images(), **QUIET).plan()
    plan = whole.grads
    slow = dataclasses.replace(plan, compute_rate=10.0, write_rate=1e3, read_rate=1e4, passes=3)
    assert slow.stored_seconds < slow.uncached_seconds
    assert "store them" in str(dataclasses.replace(whole, grads=slow))
    fast = dataclasses.replace(plan, compute_rate=1e5, write_rate=1e2, read_rate=1e2, passes=1)
    assert fast.uncached_seconds < fast.stored_seconds
    assert "do not store them (--no-cache)" in str(dataclasses.replace(whole, grads=fast))


def test_parts_without_a_rule_are_named_with_what_takes_their_place(tmp_path):
    by = {
        layer.name: layer.by
        for layer in Run(
            tmp_path / "run", tasks.classified(built(Recurrent, torch.float32), normal(14, 4, 5).float(), 10), **QUIET
        )
        .plan()
        .grads.layers
    }
    assert any("loop of the module" in each for each in by.values())


def test_the_command_prints_the_plan(tmp_path, capsys):
    task = f"{tasks.__file__}:mlp"
    assert main(["plan", "--task", task, "--run", str(tmp_path / "run"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "rounding" in out
    assert not (tmp_path / "run").exists()
