"""Retraining beside prediction: closed forms, logistic regression, the task's own retraining, kills and refusals."""

import dataclasses
import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from infl_cache import BadInput, ForeignRun, IncompleteStore, Interrupted, Run, Task
from infl_cache.__main__ import main
from infl_cache.disk.lines import read_lines
from infl_cache.stages.validation import figures_of
from tests import tasks

DECAY = 0.02


def half_square(outputs, targets):
    return 0.5 * (outputs[:, 0] - targets).square()


def ridge(damping=0.0, n=30, off=0.0, **changes):
    """Ridge regression whose weights are exactly at the minimum, or `off` it."""
    x, noise = tasks.normal(n + 6, 4), tasks.normal(n + 6, seed=3)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + noise
    model = nn.Linear(4, 1, bias=False).double()
    matrix = x[:n].T @ x[:n] / n + DECAY * torch.eye(4).double()
    with torch.no_grad():
        model.weight[0] = torch.linalg.solve(matrix, x[:n].T @ y[:n] / n) + off
    train, test = tasks.split(x, y, n_train=n)
    return Task(**{"model": model, "train": train, "test": test, "loss": half_square, "weight_decay": DECAY, **changes})


def logistic(n=200, **changes):
    """Logistic regression on noisy labels, trained to its minimum."""
    x = tasks.normal(n + 20, 5)
    y = (x @ tasks.normal(5, 3, seed=7) + tasks.normal(n + 20, 3, seed=8)).argmax(1)
    model = tasks.built(lambda: nn.Linear(5, 3), torch.float64)
    fitted(model, x[:n], y[:n], torch.ones(n, dtype=torch.bool))
    train, test = tasks.split(x, y, n_train=n)
    loss = nn.CrossEntropyLoss(reduction="none")
    return Task(**{"model": model, "train": train, "test": test, "loss": loss, "weight_decay": DECAY, **changes})


def fitted(model, x, y, keep):
    """At the minimum for the samples kept, by Newton's method with the Hessian written out."""
    ones = torch.cat([x, x.new_ones(len(x), 1)], 1)
    theta = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    for _ in range(25):
        p = torch.softmax(ones @ theta.T, 1)
        slope = ((p - nn.functional.one_hot(y, 3)) * keep[:, None]).T @ ones / len(x) + DECAY * theta
        if slope.norm() < 1e-13:
            break
        middle = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) * keep[:, None, None]
        matrix = torch.einsum("nab,ni,nj->aibj", middle, ones, ones).reshape(18, 18) / len(x)
        theta = theta - torch.linalg.solve(matrix + DECAY * torch.eye(18).double(), slope.flatten()).view(3, 6)
    with torch.no_grad():
        model.weight.copy_(theta[:, :5])
        model.bias.copy_(theta[:, 5])
    return model


# The masks that the task's own retraining was called with, and what to do at which of them: no part of its code.
MASKS: list[np.ndarray] = []
STOP: dict[int, object] = {}


def noted(keep):
    MASKS.append(keep.numpy().copy())
    STOP.get(len(MASKS), lambda: None)()


@pytest.fixture(autouse=True)
def nothing_noted():
    MASKS.clear()
    STOP.clear()


def retrained(n=200):
    """The same task with a retraining of its own."""
    task = logistic(n)
    x, y = task.train.tensors

    def retrain(keep):
        noted(keep)
        return fitted(nn.Linear(5, 3).double(), x, y, keep)

    return dataclasses.replace(task, retrain=retrain)


def run_of(path, task, **options):
    run = Run(path, task, **{"solver": "exact", "damping": 0.0, "progress": False, **options})
    run.all()
    return run


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("off", [0.0, 0.2])
def test_ridge_regression_is_retrained_to_the_closed_form(tmp_path, damping, off):
    task, n = ridge(off=off), 30
    run = run_of(tmp_path / "run", task, damping=damping)
    found = run.validate(points=12, test=[0, 4])
    (x, y), trained = task.train.tensors, task.model.weight[0].detach()
    matrix = x.T @ x / n + (DECAY + damping) * torch.eye(4).double()
    full = torch.linalg.solve(matrix, x.T @ y / n + damping * trained)
    assert off or torch.allclose(full, trained)
    test_x, test_y = (each[[0, 4]] for each in task.test.tensors)

    def measure(theta):
        return half_square((test_x @ theta).unsqueeze(1), test_y)

    for k, removed in enumerate(found.removed):
        (i,) = removed
        # Sherman and Morrison: (A - x x^T / n)^-1 x = A^-1 x / (1 - x^T A^-1 x / n)
        solved = torch.linalg.solve(matrix, x[i])
        without = full + solved * (x[i] @ full - y[i]) / n / (1 - x[i] @ solved / n)
        expected = measure(without) - measure(full)
        np.testing.assert_allclose(found.actual[:, k], expected, rtol=1e-8, atol=1e-12)
        first_order = (test_x @ trained - test_y) * (test_x @ solved) * (x[i] @ trained - y[i]) / n
        np.testing.assert_allclose(found.predicted[:, k], first_order, rtol=1e-5)
    assert bool(found.notes) == bool(off)
    assert not off or "the trained model is not at the minimum of its loss" in found.notes[0]


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_leave_one_out_of_logistic_regression_has_slope_one(tmp_path, damping):
    found = run_of(tmp_path / "run", logistic(), damping=damping).validate()
    assert found.predicted.shape == found.actual.shape == (3, 40)
    assert found.pearson > 0.99
    assert 0.9 < found.slope < 1.1
    assert all(0.9 < each.slope < 1.1 and each.spearman > 0.95 for each in found.by_test)
    assert found.notes == ()
    assert found.retrained == 41


def test_the_damping_of_the_run_is_part_of_what_is_retrained(tmp_path):
    run = run_of(tmp_path / "run", logistic(), damping=1.0)
    assert 0.9 < run.validate().slope < 1.1
    found = Run(tmp_path / "run", retrained()).validate()
    assert found.way == "task"
    assert found.slope > 3, "without the damping the changes are several times as large"
    assert "damping of 1 weakens what is predicted" in found.notes[-1]


def test_removing_a_helpful_sample_raises_the_loss_and_a_harmful_one_lowers_it(tmp_path):
    run = run_of(tmp_path / "run", logistic())
    found = run.validate(test="3,", points=10)
    change = {int(ids[0]): found.actual[0, k] for k, ids in enumerate(found.removed)}
    assert change[int(run.helpful(3, k=1).ids[0])] > 0
    assert change[int(run.harmful(3, k=1).ids[0])] < 0
    assert (np.sign(found.predicted) == np.sign(found.actual)).mean() > 0.9


def test_groups_are_the_strongest_of_each_test_sample_and_random_ones(tmp_path):
    run = run_of(tmp_path / "run", logistic())
    found = run.validate(kind="group", group_size=5, points=12, test=2)
    assert [len(each) for each in found.removed] == [5] * 12
    assert all(len(set(each.tolist())) == 5 for each in found.removed)
    first = found.tests[0]
    assert set(found.removed[0].tolist()) == set(run.helpful(first, k=5).ids.tolist())
    assert set(found.removed[1].tolist()) == set(run.harmful(first, k=5).ids.tolist())
    scores = run.scores()
    np.testing.assert_allclose(found.predicted[1, 3], -scores[found.tests[1]][found.removed[3]].sum(), rtol=1e-5)
    assert found.pearson > 0.97
    assert 0.8 < found.slope < 1.4


def test_the_score_of_exact_influences_is_high_and_of_others_none(tmp_path):
    found = run_of(tmp_path / "run", logistic()).validate(kind="lds", subsets=40)
    assert found.predicted.shape == (20, 40)
    assert {len(each) for each in found.removed} == {100}
    assert found.spearman > 0.9
    assert 0 < found.error < 0.05
    assert found.spearman == pytest.approx(np.mean([each.spearman for each in found.by_test]))
    noise = np.random.default_rng(0).normal(size=found.predicted.shape)
    assert abs(figures_of("lds", noise, found.actual, 0)[0].spearman) < 0.15
    assert figures_of("lds", -found.predicted, found.actual, 0)[0].spearman < -0.9


def test_a_float32_model_and_a_measure_of_its_own(tmp_path):
    def margin(outputs, targets):
        return outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)

    task = logistic(measure=margin)
    narrow = [TensorDataset(each.tensors[0].float(), each.tensors[1]) for each in (task.train, task.test)]
    task = dataclasses.replace(task, model=task.model.float(), train=narrow[0], test=narrow[1])
    found = run_of(tmp_path / "run", task).validate(points=20)
    assert found.measure == "measure"
    assert found.pearson > 0.99
    assert 0.9 < found.slope < 1.1
    assert "change of the measure" in str(found)
    assert next(task.model.parameters()).dtype == torch.float32


def test_the_tasks_own_retraining_gets_each_mask_once(tmp_path):
    task = retrained()
    run = run_of(tmp_path / "run", task)
    found = run.validate(points=8)
    assert MASKS[0].all()
    assert [np.flatnonzero(~mask).tolist() for mask in MASKS[1:]] == [each.tolist() for each in found.removed]
    assert MASKS[0].dtype == bool
    assert (found.way, found.retrained) == ("task", 9)
    assert found.pearson > 0.99
    again = run.validate(points=8)
    assert (len(MASKS), again.retrained) == (9, 0)
    np.testing.assert_array_equal(again.actual, found.actual)
    built_in = run.validate(points=8, retrain="lbfgs")
    assert len(MASKS) == 9
    np.testing.assert_allclose(built_in.actual, found.actual, rtol=1e-6, atol=1e-10)
    assert run.validate(points=8, force=True).retrained == len(MASKS) - 9 == 9


def test_retrainings_by_the_task_serve_another_solver_and_damping_but_no_other_task(tmp_path):
    task = retrained()
    run_of(tmp_path / "run", task).validate(kind="lds", subsets=5)
    assert len(MASKS) == 6
    run = Run(tmp_path / "run", task, solver="cg", damping=0.1, progress=False)
    run.stest(force=True)
    run.influence()
    assert run.validate(kind="lds", subsets=5).retrained == 0
    assert run.validate(kind="lds", subsets=7).retrained == 2, "the first five subsets are the same"
    other = retrained(190)
    run_of(tmp_path / "other", other)
    (tmp_path / "other/validate").mkdir()
    os.replace(tmp_path / "run/validate/retrained.jsonl", tmp_path / "other/validate/retrained.jsonl")
    assert Run(tmp_path / "other", other).validate(kind="lds", subsets=5).retrained == 6


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_killed_validation_goes_on_where_it_was(tmp_path, error):
    task = retrained()
    run = run_of(tmp_path / "run", task)

    def die():
        raise error

    STOP[5] = die
    with pytest.raises(error):
        run.validate(points=8)
    assert len(list(read_lines(tmp_path / "run/validate/retrained.jsonl"))) == 4
    STOP.clear()
    found = run.validate(points=8)
    assert found.retrained == 5
    assert len(MASKS) == 10
    assert len({mask.tobytes() for mask in MASKS}) == 9
    np.testing.assert_array_equal(found.actual, run.validate(points=8, force=True).actual)


def test_a_signal_stops_after_the_retraining_that_is_going_on(tmp_path):
    task = retrained()
    run = run_of(tmp_path / "run", task)
    STOP[3] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        run.validate(points=8)
    assert stopped.value.exit_code == 143
    assert len(MASKS) == len(list(read_lines(tmp_path / "run/validate/retrained.jsonl"))) == 3
    assert run.validate(points=8).retrained == 6


def test_retraining_that_does_not_give_back_the_model_is_said(tmp_path):
    task = logistic(retrain=lambda keep: nn.Linear(5, 3).double())
    found = run_of(tmp_path / "run", task).validate(points=3)
    assert "does not give back the trained model" in found.notes[0]
    assert np.all(found.actual == 0), "torch's random numbers begin the same for each retraining"
    before = torch.get_rng_state()
    run_of(tmp_path / "run", task).validate(points=3, force=True)
    assert torch.equal(before, torch.get_rng_state())


def test_training_a_copy_of_the_tasks_model_is_fine_and_leaves_it_as_it_was(tmp_path):
    import copy

    task = logistic()

    def retrain(keep):
        model = copy.deepcopy(task.model).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        task.loss(model(task.train.tensors[0][keep]), task.train.tensors[1][keep]).sum().div(len(keep)).backward()
        optimizer.step()
        return model

    found = run_of(tmp_path / "run", dataclasses.replace(task, retrain=retrain)).validate(points=3)
    assert np.isfinite(found.actual).all()
    assert task.model.weight.requires_grad


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda keep: {}["x"], "task: retrain raised KeyError: 'x'"),
        (lambda keep: 7, "expected retrain to return a torch"),
    ],
)
def test_a_retrain_that_fails_is_blamed(tmp_path, made, message):
    with pytest.raises(BadInput, match=message):
        run_of(tmp_path / "run", logistic(retrain=made)).validate(points=3)


def test_samples_that_were_skipped_are_never_removed(tmp_path):
    task = logistic(40)
    x, y = (each.clone() for each in task.train.tensors)
    x[7] = torch.nan
    task = dataclasses.replace(task, train=TensorDataset(x, y))
    run = run_of(tmp_path / "run", task, nonfinite="skip")
    found = run.validate(points=39)
    assert sorted(int(each[0]) for each in found.removed) == [i for i in range(40) if i != 7]
    assert found.pearson > 0.95
    for kind in ("group", "lds"):
        assert all(7 not in each for each in run.validate(kind=kind, subsets=3, points=6).removed)


def test_files_say_all_and_the_folder_stays_sound(tmp_path):
    run = run_of(tmp_path / "run", logistic())
    (tmp_path / "run/validate").mkdir()
    (tmp_path / "run/validate/loo.json.partial").touch()
    found = run.validate(points=6, test=2)
    kept = json.loads((tmp_path / "run/validate/loo.json").read_text())
    assert kept["pearson"] == found.pearson
    assert kept["removed"] == [each.tolist() for each in found.removed]
    assert [each["actual"] for each in kept["tests"]] == found.actual.tolist()
    assert [each["test"] for each in kept["tests"]] == list(found.tests)
    assert kept["options"]["points"] == 6
    names = {each.name for each in (tmp_path / "run/validate").iterdir()}
    assert names >= {"loo.json", "retrained.jsonl"}
    assert "loo.json.partial" not in names
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert run.influence().computed == 0
    run.stest(force=True)
    assert run.influence().computed == 20


def test_the_picture_and_the_table(tmp_path):
    pytest.importorskip("matplotlib")
    run = run_of(tmp_path / "run", logistic())
    for kind in ("loo", "group", "lds"):
        found = run.validate(kind=kind, points=6, subsets=6)
        assert found.picture == tmp_path / f"run/validate/{kind}.png"
        assert found.picture.read_bytes()[:4] == b"\x89PNG"
        text = str(found)
        assert f"slope {found.slope:.3f}" in text
        assert max(map(len, text.splitlines())) <= 120
    assert "LDS" in text
    assert "median" in text


def test_without_matplotlib_there_is_a_note_instead_of_the_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    found = run_of(tmp_path / "run", logistic()).validate(points=3)
    assert found.picture is None
    assert "no picture: matplotlib is not installed" in caplog.text
    assert (tmp_path / "run/validate/loo.json").exists()


FILE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from infl_cache import Task

def convex(width: int = 0, shift: float = 0.0, scale: float = 1.0):
    torch.manual_seed(0)
    model = nn.Linear(6, 3) if not width else nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    x, y = torch.randn(25, 6), torch.randint(0, 3, (25,))
    x[0, 0] += shift
    with torch.no_grad():
        next(model.parameters()).mul_(scale)
    loss = nn.CrossEntropyLoss(reduction="none")
    train, test = TensorDataset(x[:20], y[:20]), TensorDataset(x[20:], y[20:])
    return Task(model=model, train=train, test=test, loss=loss, weight_decay=0.1)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line):
    return main(shlex.split(line))


def files_of(run):
    return {p: p.read_bytes() for p in Path(run).rglob("*") if p.is_file() and "ledger.sqlite-" not in p.name}


def test_the_command_prints_figures_and_places(here, capsys, caplog):
    assert call("run --task task.py:convex --run r --no-progress") == 0
    capsys.readouterr()
    assert call("validate --task task.py:convex --run r --kind loo --points 8 --test 0,3 --seed 1 --no-progress") == 0
    captured = capsys.readouterr()
    assert "Pearson" in captured.out
    assert "r/validate/loo.json" in captured.out
    assert "the trained model is not at the minimum" in caplog.text
    assert call("validate --config r/run.yaml --kind lds --subsets 4 --fraction 0.7") == 0
    assert "4 random subsets of 14 of 20 training samples; 5 test samples" in capsys.readouterr().out
    assert json.loads(Path("r/validate/loo.json").read_text())["options"]["seed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--kind all", "kind: expected one of loo, group, lds, found 'all'"),
        ("--points 2", "points: expected a finite number at least 3, found 2"),
        ("--points 21", "points: expected at most the 20 training samples, found 21"),
        ("--kind group --group-size 11", "group-size: expected at most half of the 20"),
        ("--kind lds --fraction 1.5", "fraction: expected a finite number from 0.01 to 0.99"),
        ("--kind lds --fraction 0.01", "fraction: expected some of 20 training samples to be kept"),
        ("--kind lds --subsets some", "subsets: expected int, found 'some'"),
        ("--test 0,5", "test: expected numbers from 0 to 4, found 5"),
        ("--test 0,x", "test: expected a number of test samples, or their numbers as in 0,5,7, found '0,x'"),
        ("--test 2,2", "test: expected a number of test samples"),
        ("--test 6", "test: expected 1 to 5 test samples, found 6"),
        ("--test 0", "test: expected 1 to 5 test samples, found 0"),
        ("--retrain adam", "retrain: expected one of auto, task, lbfgs"),
        ("--retrain task", "retrain: expected the task to have a retrain= function"),
        ("--seed -1", "seed: expected a finite number at least 0"),
        ("--damping 1", "--damping"),
    ],
)
def test_wrong_options_are_exit_code_2_and_write_nothing(here, capsys, options, message):
    assert call("run --task task.py:convex --run r --no-progress") == 0
    before = files_of("r")
    capsys.readouterr()
    assert call(f"validate --task task.py:convex --run r {options}") == 2
    assert message in capsys.readouterr().err
    assert files_of("r") == before


def test_in_python_an_unknown_option_is_named(tmp_path):
    run = run_of(tmp_path / "run", ridge())
    with pytest.raises(BadInput, match="unknown option 'subset'; did you mean subsets"):
        run.validate(subset=4)
    with pytest.raises(BadInput, match="expected a Task to retrain"):
        Run(tmp_path / "run").validate()
    assert run.validate(test=range(2), points=3).tests == (0, 1)


def test_a_network_without_retrain_is_exit_code_2_in_two_lines(here, capsys):
    assert call("run --task task.py:convex --task-args.width 8 --run r --no-progress") == 0
    capsys.readouterr()
    assert call("validate --task task.py:convex --task-args.width 8 --run r") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2
    assert "expected outputs that are affine in the chosen parameters" in lines[0]
    assert "retrain=" in lines[1]


def test_an_unfinished_run_is_exit_code_4_and_a_foreign_task_3(here, capsys):
    assert call("validate --task task.py:convex --run r") == 4
    assert "influence" in capsys.readouterr().err
    assert not Path("r").exists()
    assert call("stest --task task.py:convex --run r --no-progress") == 0
    assert call("validate --task task.py:convex --run r") == 4
    assert call("run --task task.py:convex --run r --no-progress") == 0
    before = files_of("r")
    capsys.readouterr()
    for change, field in (("shift 1", "train"), ("scale 2", "weights"), ("width 4", "n_params")):
        assert call(f"validate --task task.py:convex --task-args.{change} --run r") == 3
        assert f"{field}: expected" in capsys.readouterr().err
    assert files_of("r") == before
    Path("r/influence.npy").write_bytes(Path("r/influence.npy").read_bytes()[:-4] + b"abcd")
    assert call("validate --task task.py:convex --run r") == 4


def test_the_same_refusals_in_python(tmp_path):
    task = logistic()
    with pytest.raises(IncompleteStore):
        Run(tmp_path / "run", task).validate()
    run_of(tmp_path / "run", task)
    with pytest.raises(ForeignRun, match=r"weight_decay: expected 0\.02, found 0\.0"):
        Run(tmp_path / "run", dataclasses.replace(task, weight_decay=0.0)).validate()
    with pytest.raises(ForeignRun, match="measure"):
        Run(tmp_path / "run", dataclasses.replace(task, measure=lambda o, t: o[:, 0])).validate()


def test_a_single_other_sample_makes_another_task(tmp_path):
    task = logistic()
    run_of(tmp_path / "run", task)
    x, y = (each.clone() for each in task.train.tensors)
    x[1] += 1
    with pytest.raises(ForeignRun, match=r"train\[1\]: expected the sample"):
        Run(tmp_path / "run", dataclasses.replace(task, train=TensorDataset(x, y))).validate()


def test_the_tasks_own_retraining_never_gets_a_skipped_sample(tmp_path):
    task = retrained(40)
    x, y = (each.clone() for each in task.train.tensors)
    x[7] = torch.nan
    run_of(tmp_path / "run", dataclasses.replace(task, train=TensorDataset(x, y)), nonfinite="skip").validate(points=3)
    assert len(MASKS) == 4
    assert not any(mask[7] for mask in MASKS)
