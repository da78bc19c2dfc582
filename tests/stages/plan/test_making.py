"""What is planned of all stages is what they then write; other sizes, machines and disks; a disk that is too small."""

import dataclasses
import math
import shutil
from collections import namedtuple

import pytest
import torch

from infl_cache import BadInput, Run, Task
from infl_cache.__main__ import main
from infl_cache.errors import DiskFull
from infl_cache.stages.plan.costs import Costs, Iterations, Sizes, iterated, solver_choice
from infl_cache.stages.plan.machines import MACHINES
from tests import tasks
from tests.stages.plan.test_grads import QUIET, images

Usage = namedtuple("Usage", "total used free")
TASK = f"{tasks.__file__}:mlp"


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("plan") / "run", images(40), damping=0.1, **QUIET)
    return run, run.plan()


def small_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(free, 0, free))


def test_the_bytes_of_every_stage_are_those_that_are_written(planned):
    run, plan = planned
    results = {result.stage: result for result in run.all()}
    assert plan.grads.n_bytes == pytest.approx(results["grads"].n_bytes, rel=0.05)
    assert plan.stest.n_bytes == pytest.approx(results["stest"].n_bytes, rel=0.05)
    assert plan.influence.matrix_bytes == (run.path / "influence.npy").stat().st_size
    assert plan.influence.ranking_bytes == pytest.approx((run.path / "rankings.npz").stat().st_size, rel=0.05)
    again = run.plan(matrix=False)
    assert again.influence.n_bytes == plan.influence.ranking_bytes + again.influence.state_bytes
    assert again.to_write < 0.5 * plan.to_write


def test_sizes_that_are_not_here(planned):
    run, _ = planned
    plan = run.plan(n_train="10^9", n_test="1e6", disk="2GB/s", free="1TB")
    assert (plan.influence.n_train, plan.influence.n_test, plan.free) == (10**9, 10**6, 10**12)
    assert plan.influence.matrix_bytes == 4 * 10**15 + 128
    assert plan.grads.write_rate == pytest.approx(2e9 / plan.grads.bytes_a_sample)
    assert all(math.isfinite(each.seconds) for each in plan.stest.choices)
    assert "TOO SMALL" in str(plan)
    assert "2 GB/s" in str(plan)
    with pytest.raises(DiskFull, match=r"expected .* PB free .* found 1.0 TB; use another disk"):
        plan.require_room()


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_every_machine_of_the_table_is_there_on_paper(machine):
    found = MACHINES[machine]
    assert found.float64 <= found.float32 <= found.tf32 <= found.bfloat16
    assert found.bus < found.bandwidth
    task = images()
    plan = Run("nowhere", dataclasses.replace(task, model=task.model.to("meta")), **QUIET).plan(device=machine)
    assert plan.machine.startswith(found.title)
    assert plan.memory < found.memory
    assert [layer.form for layer in plan.grads.layers] == ["factored", "factored", "dense"]


def test_on_paper_a_real_model_and_one_without_weights_cost_the_same_operations(planned):
    run, here = planned
    real = run.plan(device="h100", disk="7GB/s")
    task = images(40)
    bare = Run("nowhere", dataclasses.replace(task, model=task.model.to("meta")), **QUIET).plan(
        device="h100", disk="7GB/s"
    )
    assert real.grads.layers == bare.grads.layers == here.grads.layers
    assert real.influence.scoring.score == bare.influence.scoring.score
    assert real.stest.costs.vector == bare.stest.costs.vector
    assert real.grads.bytes_a_sample == pytest.approx(here.grads.bytes_a_sample, rel=0.01)
    assert bare.grads.bytes_a_sample == 4 * (174 + 33 + 112) + 24


def test_flops_of_a_linear_layer_are_counted():
    model = torch.nn.Linear(30, 7, device="meta")
    data = torch.utils.data.TensorDataset(torch.zeros(4, 30), torch.zeros(4, dtype=torch.long))
    task = Task(model=model, train=data, test=data, loss=torch.nn.CrossEntropyLoss(reduction="none"))
    plan = Run("nowhere", task, **QUIET).plan(device="h100")
    # Forwards, and backwards to the weight: 2 x 30 x 7 each; nothing goes back to the inputs.
    seconds = 4 * 30 * 7 / MACHINES["h100"].operations + 4 * (30 + 7) / MACHINES["h100"].moved
    assert 1 / plan.grads.compute_rate == pytest.approx(seconds)


def test_a_model_without_weights_needs_a_machine():
    task = images()
    with pytest.raises(BadInput, match=r"expected a machine of the table .*h100.* found none; give --device"):
        Run("nowhere", dataclasses.replace(task, model=task.model.to("meta")), **QUIET).plan()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_train": "many"}, "n-train: expected a count such as 50_000"),
        ({"n_test": "1.5"}, "n-test: expected a count"),
        ({"n_train": 0}, "n-train: expected a count"),
        ({"n_train": "10^60"}, "n-train: expected a count"),
        ({"disk": "fast"}, "disk: expected a rate such as 7GB/s"),
        ({"free": "-1"}, "free: expected a size"),
        ({"device": "h1000"}, "device: expected one that works here"),
        ({"speed": 3}, "unknown option 'speed'"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, given, message):
    with pytest.raises(BadInput, match=message):
        Run(tmp_path / "run", images(), **QUIET).plan(**given)


def test_the_command_ends_with_5_where_the_disk_is_too_small(tmp_path, capsys):
    words = ["plan", "--task", TASK, "--run", str(tmp_path / "run"), "--free", "2kB"]
    assert main(words) == 5
    out, err = capsys.readouterr()
    assert "TOO SMALL" in out
    assert "plan: expected" in err
    assert main([*words, "--device", "h100", "--n-test", "2", "--free", "1MB"]) == 0
    assert "NVIDIA H100" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_stage_1_does_not_begin_on_a_disk_that_is_too_small(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", images(40), **QUIET)
    small_disk(monkeypatch, 20_000)
    with pytest.raises(DiskFull, match=r"grads: expected .* kB free for the gradients of 40 samples, found 20.0 kB"):
        run.grads()
    assert not (tmp_path / "run" / "grad_z.zarr").exists()
    small_disk(monkeypatch, 10**9)
    assert run.grads().computed == 40


def test_what_fits_when_compressed_is_begun(tmp_path, monkeypatch):
    flat = tasks.classified(torch.nn.Linear(500, 3), torch.zeros(44, 500), 40)
    small_disk(monkeypatch, 60_000)  # 80 kB of zeros before they are compressed
    assert Run(tmp_path / "run", flat, **QUIET).grads().computed == 40


COSTS = Costs(capture=2.0, product=3.0, vector=5.0, row_bytes=8)


@pytest.mark.parametrize(("budget", "captures"), [(10**6, 1), (30, 22)])
def test_the_time_of_an_iteration_counts_products_vectors_and_captures(budget, captures):
    sizes = Sizes(n_train=7, n_test=6, n_params=4, together=3, itemsize=4, budget=budget)
    found = iterated(COSTS, sizes, Iterations(8.0, 10.0, ""))
    # Two blocks of eleven products each; nine vectors a test sample, the certificate's among them.
    assert found == 7 * (captures * 2.0 + 22 * 3.0 + 6 * 9 * 5.0)


def test_solvers_that_cannot_take_so_many_parameters_say_so():
    sizes = Sizes(10, 2, 10**6, 2, 4, 10**9)
    choice = solver_choice("exact", COSTS, sizes, Iterations(1, 1, ""), 1.0)
    assert (choice.seconds, choice.note) == (math.inf, "for up to 20,000 parameters")


def test_fisher_goes_to_the_disk_where_its_matrix_does_not_fit():
    small, large = (
        solver_choice("fisher", COSTS, Sizes(n, 2, 10, 2, 4, 10**8), Iterations(1, 1, ""), 1.0) for n in (100, 10**9)
    )
    assert (small.disk, large.disk) == (0.0, 4e18)


@pytest.mark.parametrize("solver", ["fisher", "pcg", "lissa"])
def test_other_solvers_can_be_planned_before_there_are_gradients(tmp_path, solver):
    plan = Run(tmp_path / "run", images(), solver=solver, damping=0.1, **QUIET).plan()
    assert plan.stest.chosen.name == solver
    assert 0 < plan.stest.seconds < math.inf
