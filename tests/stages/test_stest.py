import dataclasses
import os
import signal

import numpy as np
import pytest
import torch

from infl_cache import BadInput, ForeignRun, IncompleteStore, Interrupted, Run
from infl_cache.stages import stest as stage
from tests import tasks
from tests.tasks import TASKS
from tests.twins import dense_ggn, dense_hessian, gradient_rows

QUIET = {"progress": False}
DENSE = {"ggn": dense_ggn, "hessian": dense_hessian}


def dense_s_test(task, curvature, damping, measure=False):
    matrix = DENSE[curvature](task)
    matrix = matrix + (damping + task.weight_decay) * torch.eye(len(matrix), dtype=matrix.dtype)
    rows = gradient_rows(task, range(len(task.test)), data="test", measure=measure)
    return torch.linalg.solve(matrix, rows.T).T.numpy()


def worst_row(found, expected):
    return (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("solver", ["exact", "cg"])
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"branching"}))
def test_exact_and_cg_equal_a_dense_solve(name, solver, curvature, tmp_path):
    task, damping = TASKS[name](), 0.05 if curvature == "ggn" else 5.0
    run = Run(tmp_path / "r", task, solver=solver, curvature=curvature, damping=damping, tolerance=1e-9, **QUIET)
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, curvature, damping)) <= 1e-6


@pytest.mark.parametrize("name", ["logistic", "mlp", "tokens", "convnet"])
def test_lissa_is_within_five_percent_with_options_it_chose_itself(name, tmp_path):
    task = TASKS[name](n_train=150)
    run = Run(tmp_path / "r", task, solver="lissa", damping=0.05, **QUIET)
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, "ggn", 0.05)) <= 0.05
    assert column(run, "converged").all()


@pytest.mark.parametrize("name", ["logistic", "mlp", "tokens", "convnet"])
def test_float32_agrees_with_the_float64_dense_solve(name, tmp_path):
    run = Run(tmp_path / "r", TASKS[name](torch.float32), damping=0.05, tolerance=1e-6, **QUIET)
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(TASKS[name](), "ggn", 0.05)) <= 1e-4


def column(run, name):
    store, every = run.folder.store("stest"), run.folder.stage_blocks("stest")
    return np.concatenate([store.read_block(block, [name])[name] for block in every])


def test_residual_iterations_and_convergence_are_stored_and_true(tmp_path):
    task = tasks.mlp()
    run = Run(tmp_path / "r", task, damping=0.05, tolerance=1e-3, test_block_rows=3, **QUIET)
    run.stest()
    matrix = (dense_ggn(task) + 0.05 * torch.eye(dense_ggn(task).shape[0])).numpy()
    rhs = gradient_rows(task, range(4), data="test").numpy()
    true = np.linalg.norm(run.s_test(slice(None)) @ matrix - rhs, axis=1) / np.linalg.norm(rhs, axis=1)
    assert np.allclose(column(run, "residual"), true, rtol=1e-6, atol=1e-12)
    assert column(run, "converged").all()
    assert (column(run, "residual") <= 1e-3).all()
    assert (column(run, "iterations") > 0).all()


def test_rows_that_do_not_converge_are_stored_marked_and_reported(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=1e-4, tolerance=1e-12, max_iterations=2, **QUIET)
    result = run.stest()
    assert not column(run, "converged").any()
    assert "s_test of 4 test samples did not converge: 0, 1, 2, 3" in result.notes[0]


def test_weight_decay_and_measure_enter_the_system(tmp_path):
    def margin(outputs, targets):
        return outputs.gather(1, targets.unsqueeze(1)).squeeze(1)

    task = tasks.mlp(weight_decay=0.3, measure=margin)
    run = Run(tmp_path / "r", task, solver="exact", damping=0.02, **QUIET)
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, "ggn", 0.02, measure=True)) <= 1e-9
    batch = task.collate([task.test[i] for i in range(4)])
    losses = task.loss(task.model.eval()(batch[0]), batch[1]).detach()
    assert np.allclose(column(run, "loss"), losses), "the stored loss is the loss, not the measure"


def test_a_row_that_is_not_finite_is_named_never_done_and_the_others_go_on(tmp_path):
    task = tasks.logistic()
    task.test.tensors[0][2] = torch.inf
    run = Run(tmp_path / "r", task, test_block_rows=2, damping=0.1, **QUIET)
    with pytest.raises(IncompleteStore, match=r"NaN or Inf at test samples 2; the other 3 are done.*--nonfinite skip"):
        run.stest()
    rows = run.s_test(slice(None))
    assert np.isnan(rows[2]).all()
    clean = tasks.logistic()
    expected = dense_s_test(clean, "ggn", 0.1)
    assert worst_row(rows[[0, 1, 3]], expected[[0, 1, 3]]) <= 1e-3
    with pytest.raises(IncompleteStore, match="test samples 2"):
        Run(tmp_path / "r", task, **QUIET).stest()
    assert Run(tmp_path / "r", task, nonfinite="skip", **QUIET).stest().rows == 4


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 4}, {"test_block_rows": 1}, {"workers": 1}])
def test_results_do_not_depend_on_block_batch_or_workers(options, tmp_path):
    task = tasks.mlp(n_train=31)
    first, other = (
        Run(tmp_path / name, task, damping=0.05, tolerance=1e-10, **given, **QUIET)
        for name, given in (("a", {}), ("b", options))
    )
    first.stest(), other.stest()
    assert worst_row(other.s_test(slice(None)), first.s_test(slice(None))) <= 1e-6


def test_a_resumed_stage_computes_only_what_is_missing_and_the_same_bits(tmp_path, lights_out):
    task = tasks.mlp(n_test=6)
    options = {"damping": 0.05, "test_block_rows": 2, **QUIET}
    Run(tmp_path / "calm", task, **options).stest()
    calls = lights_out(at=2)
    with pytest.raises(RuntimeError, match="lights"):
        Run(tmp_path / "r", task, **options).stest()
    Run(tmp_path / "r", task, **options).stest()
    assert calls == [0, 1, 1, 2]
    for file in (p for p in (tmp_path / "calm" / "s_test.zarr").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "r" / file.relative_to(tmp_path / "calm")).read_bytes()


def test_force_replaces_s_test_and_what_hangs_on_it_but_no_gradients(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET)
    run.all()
    gradients = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "grad_z.zarr").rglob("*")}
    other = Run(tmp_path / "r", tasks.mlp(), damping=0.2, **QUIET)
    with pytest.raises(ForeignRun, match=r"damping: expected 0\.1, found 0\.2"):
        other.stest()
    assert (tmp_path / "r" / "influence.npy").exists()
    other.stest(force=True)
    assert not (tmp_path / "r" / "influence.npy").exists()
    assert gradients == {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "grad_z.zarr").rglob("*")}
    assert worst_row(other.s_test(slice(None)), dense_s_test(tasks.mlp(), "ggn", 0.2)) <= 1e-3


def test_force_with_other_weights_does_not_remove_gradients(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), **QUIET).all()
    other = tasks.mlp()
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.5)
    with pytest.raises(ForeignRun, match="weights"):
        Run(tmp_path / "r", other, **QUIET).stest(force=True)
    assert (tmp_path / "r" / "influence.npy").exists()
    assert Run(tmp_path / "r", other, **QUIET).grads(force=True).computed == 10
    assert not (tmp_path / "r" / "s_test.zarr").exists()


def test_a_changed_test_sample_is_noticed(tmp_path):
    task = tasks.mlp()
    Run(tmp_path / "r", task, **QUIET).stest()
    task.test.tensors[0][1, 0] += 1e-6
    with pytest.raises(ForeignRun, match=r"test: expected|test\[1\]"):
        Run(tmp_path / "r", task, **QUIET).stest()


def test_options_that_were_chosen_once_hold_for_the_next_call(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), damping=0.3, solver="exact", memory="1GB", **QUIET).stest()
    again = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    assert (again.options.stest.damping, again.options.stest.solver) == (0.3, "exact")
    assert again.options.resources.memory is None
    assert again.stest().computed == 0


def test_a_signal_stops_a_long_solve_and_drops_only_the_block_in_flight(tmp_path, monkeypatch):
    original, calls = stage._right_hand_sides, []

    def signalled(run, forms, block):
        calls.append(block.index)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, forms, block)

    monkeypatch.setattr(stage, "_right_hand_sides", signalled)
    with pytest.raises(Interrupted) as stopped:
        Run(tmp_path / "r", tasks.mlp(), test_block_rows=1, **QUIET).stest()
    assert stopped.value.exit_code == 143
    assert Run(tmp_path / "r", tasks.mlp(), **QUIET).stest().computed == 3


def test_exact_refuses_what_does_not_fit_into_memory(tmp_path):
    with pytest.raises(BadInput, match=r"solver exact: expected [\d,]+ bytes .* found a budget of 20,000; give more"):
        Run(tmp_path / "r", tasks.mlp(), solver="exact", memory=20_000, **QUIET).stest()


def test_a_refused_option_writes_nothing_and_the_same_command_still_carries_on(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET).all()
    before = (tmp_path / "r" / "run.yaml").read_bytes()
    for stage_of in ("grads", "stest", "influence"):
        with pytest.raises(ForeignRun, match=r"damping: expected 0\.1, found 0\.5"):
            getattr(Run(tmp_path / "r", tasks.mlp(), damping=0.5, **QUIET), stage_of)()
    assert (tmp_path / "r" / "run.yaml").read_bytes() == before
    assert [result.computed for result in Run(tmp_path / "r", tasks.mlp(), **QUIET).all()] == [0, 0, 0]
    assert Run(tmp_path / "r", tasks.mlp(), damping=0.5, **QUIET).all(force=True)[1].computed == 4


def test_force_removes_nothing_before_the_new_configuration_has_been_tried(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET).all()
    refused = tasks.mlp(measure=lambda outputs, targets: outputs.mean())
    with pytest.raises(BadInput, match="measure: expected one value a sample"):
        Run(tmp_path / "r", refused, **QUIET).stest(force=True)
    with pytest.raises(BadInput, match="solver exact"):
        Run(tmp_path / "r", tasks.mlp(), solver="exact", memory=20_000, **QUIET).stest(force=True)
    with pytest.raises(BadInput, match="loss: expected one value a sample"):
        Run(tmp_path / "r", tasks.mlp(loss=torch.nn.CrossEntropyLoss()), **QUIET).grads(force=True)
    assert [result.computed for result in Run(tmp_path / "r", tasks.mlp(), **QUIET).all()] == [0, 0, 0]


def test_a_stage_without_one_block_claims_nothing(tmp_path):
    class Fails(Exception):
        pass

    run = Run(tmp_path / "r", tasks.mlp(), solver="lissa", **QUIET)
    run.grads()

    def fail(*_):
        raise Fails

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_right_hand_sides", fail)
        with pytest.raises(Fails):
            run.stest()
    assert Run(tmp_path / "r", tasks.mlp(), solver="cg", **QUIET).stest().computed == 4


CLASS = 0


def logit(outputs, targets):
    return outputs[:, CLASS]


class TwoWays(torch.nn.Module):
    """Its second output uses a weight by hand, which the loss never sees."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        return {"logits": self.head(hidden), "again": hidden @ self.inner.weight}


def test_a_measure_of_what_the_loss_does_not_see_has_its_own_gradient(tmp_path):
    task = tasks.mlp(
        model=tasks.built(TwoWays, torch.float64),
        loss=lambda outputs, targets: tasks.cross_entropy(outputs["logits"], targets),
        measure=lambda outputs, targets: outputs["again"].square().sum(1),
    )
    run = Run(tmp_path / "r", task, damping=0.05, solver="exact", **QUIET)
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, "ggn", 0.05, measure=True)) <= 1e-9


def test_a_measure_that_reads_another_setting_is_noticed(tmp_path, monkeypatch):
    Run(tmp_path / "r", tasks.mlp(measure=logit), **QUIET).stest()
    monkeypatch.setitem(globals(), "CLASS", 1)
    with pytest.raises(ForeignRun, match="measure"):
        Run(tmp_path / "r", tasks.mlp(measure=logit), **QUIET).stest()


def test_training_samples_that_are_not_finite_are_left_out_of_the_curvature(tmp_path):
    task = tasks.logistic()
    task.train.tensors[0][3] = torch.inf
    run = Run(tmp_path / "r", task, nonfinite="skip", solver="exact", damping=0.1, **QUIET)
    run.all()
    others = [i for i in range(10) if i != 3]
    clean = dataclasses.replace(tasks.logistic(), train=torch.utils.data.Subset(tasks.logistic().train, others))
    assert worst_row(run.s_test(slice(None)), dense_s_test(clean, "ggn", 0.1)) <= 1e-9
    assert np.isfinite(run.scores()[:, others]).all()
    assert np.isnan(run.scores()[:, 3]).all()


def test_lissa_claims_nothing_about_an_indefinite_hessian(tmp_path):
    task = tasks.mlp()
    lowest = float(torch.linalg.eigvalsh(dense_hessian(task))[0])
    assert lowest < 0
    for damping in (-0.5 * lowest, -3 * lowest):
        path = tmp_path / f"{damping}"
        run = Run(path, task, solver="lissa", curvature="hessian", damping=damping, **QUIET)
        run.stest()
        found, expected = run.s_test(slice(None)), dense_s_test(task, "hessian", damping)
        errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert (errors[column(run, "converged")] <= 0.05).all()


def test_options_of_one_solver_are_not_handed_to_another(tmp_path):
    Run(tmp_path / "r", tasks.mlp(), solver="lissa", tolerance=0.3, **QUIET).stest()
    assert Run(tmp_path / "r", tasks.mlp(), solver="cg").options.stest.tolerance is None
    assert Run(tmp_path / "r", tasks.mlp()).options.stest.tolerance == 0.3
