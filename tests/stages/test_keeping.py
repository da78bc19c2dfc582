"""A solver that offers its state: killed and stopped anywhere, it goes on from there with the bits of a calm run."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from infl_cache import Interrupted, Run
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import read_header
from infl_cache.maths.solvers import Solution
from infl_cache.maths.solvers.base import FORGETFUL, relative_residual
from infl_cache.stages import keeping, kept, solving
from infl_cache.stages import stest as stage
from tests import tasks
from tests.faults.killing import started

STEPS, BLOCKS = 6, 2
OPTIONS = {"damping": 0.5, "test_block_rows": 2, "progress": False}


class Richardson:
    """`value += (rhs - operator(value)) / 4`, a fixed number of times; writes down each step it has taken."""

    def __init__(self, log, happens=lambda step: None):
        self.log, self.happens = log, happens

    def check(self, size):
        pass

    def prepare(self, operator):
        def solved(rhs, keeper=FORGETFUL):
            kept = keeper.found() or {"value": torch.zeros_like(rhs), "step": torch.tensor(0)}
            value, step = kept["value"].clone(), int(kept["step"])
            while step < STEPS:
                self.happens(step)
                value = value + (rhs - operator(value)) / 4
                step += 1
                keeper.offer(lambda value=value, step=step: {"value": value, "step": torch.tensor(step)})
                with open(self.log, "a") as file:
                    file.write(f"{step}\n")
            residual = relative_residual(operator, value, rhs)
            every = torch.ones(len(rhs), dtype=torch.bool)
            return Solution(value, residual, torch.full((len(rhs),), step), every, ("",) * len(rhs))

        return solved


def solve(path, log, kill_before=None):
    """Stage 2 of a small task; killed before the given step of the process, counted over blocks."""
    torch.set_num_threads(1)
    taken = []

    def happens(step):
        taken.append(step)
        if len(taken) - 1 == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    keeping.CHECKPOINT_SECONDS = 0.0
    solving.make_solver = lambda *_: Richardson(log, happens)
    Run(path, tasks.mlp(n_test=4), **OPTIONS).stest()


def in_a_process(path, log, kill_before=None):
    child = started(solve, path, log, kill_before)
    child.join(120)
    return child.exitcode


def steps(log):
    return [int(line) for line in log.read_text().split()]


def store_of(path):
    return {p.relative_to(path): p.read_bytes() for p in (path / "s_test.zarr").rglob("*") if p.is_file()}


def test_killed_before_any_step_it_repeats_none_and_ends_with_the_same_bytes(tmp_path):
    assert in_a_process(tmp_path / "calm", tmp_path / "calm.log") == 0
    assert steps(tmp_path / "calm.log") == [1, 2, 3, 4, 5, 6] * BLOCKS
    for moment in (1, 3, STEPS, STEPS + 2):
        path, log = tmp_path / str(moment), tmp_path / f"{moment}.log"
        assert in_a_process(path, log, moment) == -signal.SIGKILL
        assert (path / keeping.STATE).exists() == (moment % STEPS > 0)
        assert in_a_process(path, log) == 0
        assert steps(log) == [1, 2, 3, 4, 5, 6] * BLOCKS, "a step was taken twice, or not at all"
        assert store_of(path) == store_of(tmp_path / "calm")
        assert not (path / keeping.STATE).exists()


def begun(tmp_path, monkeypatch, happens=lambda step: None, **options):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(solving, "make_solver", lambda *_: Richardson(tmp_path / "log", happens))
    return Run(tmp_path / "r", tasks.mlp(n_test=4), **{**OPTIONS, **options})


def stopped_after(steps_taken, tmp_path, monkeypatch, **options):
    """A run that was asked to stop in the middle of a step."""
    taken = []

    def happens(step):
        taken.append(step)
        if len(taken) == steps_taken:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        begun(tmp_path, patch, happens, **options).stest()
    return tmp_path / "r"


def test_a_signal_waits_for_the_step_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 3600.0)
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "CHECKPOINT_SECONDS", 3600.0)
        path = stopped_after(3, tmp_path, monkeypatch)
    assert read_header(path / keeping.STATE).facts["iteration"] == 3
    begun(tmp_path, monkeypatch).stest()
    assert steps(tmp_path / "log") == [1, 2, 4, 5, 6, 1, 2, 3, 4, 5, 6], "the third was kept, then it stopped"


def test_a_signal_does_not_wait_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "PATIENCE_SECONDS", -1.0)
    path = stopped_after(3, tmp_path, monkeypatch)
    assert read_header(path / keeping.STATE).facts["iteration"] == 2


def test_status_says_what_is_kept_and_force_drops_it(tmp_path, monkeypatch):
    path = stopped_after(3, tmp_path, monkeypatch)
    assert "iteration: iteration 3 of block 0 kept 0." in str(Run(path).status())
    assert "0 of 4 rows (0%), 0 B" in str(Run(path).status()), "nothing is known yet of the time that is left"
    (path / keeping.STATE).write_bytes(b"nonsense")
    assert "cannot be read" in str(Run(path).status())
    run = Run(path, tasks.mlp(n_test=4), **OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_compute", lambda *_: [])
        run.stest(force=True)
    assert not (path / keeping.STATE).exists()
    assert "iteration" not in str(Run(path).status())


def damage(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def of_another_stage(path):
    path.write_bytes(path.read_bytes().replace(b'"stage": "', b'"stage": "x')[:-1])


@pytest.mark.parametrize(
    ("spoil", "said"), [(damage, "checksum"), (cut, "damaged file"), (of_another_stage, "damaged")]
)
def test_a_state_that_is_damaged_is_left_alone(spoil, said, tmp_path, monkeypatch, caplog):
    path = stopped_after(3, tmp_path, monkeypatch)
    spoil(path / keeping.STATE)
    (tmp_path / "log").unlink()
    begun(tmp_path, monkeypatch).stest()
    assert said in caplog.text
    assert steps(tmp_path / "log") == [1, 2, 3, 4, 5, 6] * BLOCKS


@pytest.mark.parametrize("change", [{"damping": 0.6}, {"test": "1:3"}])
def test_a_state_of_another_system_or_of_other_samples_is_left_alone(change, tmp_path, monkeypatch, caplog):
    stopped_after(3, tmp_path, monkeypatch)
    (tmp_path / "log").unlink()
    begun(tmp_path, monkeypatch, **change).stest()
    # Another damping begins the stage anew and removes the state, other samples leave it to be found out.
    assert ("the state of another iteration" in caplog.text) == ("test" in change)
    assert steps(tmp_path / "log")[:6] == [1, 2, 3, 4, 5, 6]


def test_a_disk_that_takes_no_state_ends_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write_state", full)
    begun(tmp_path, monkeypatch).stest()
    assert "could not be kept (No space left on device)" in caplog.text
    assert np.isfinite(Run(tmp_path / "r").s_test(slice(None))).all()


def test_a_state_is_kept_only_when_the_last_one_is_old(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(kept, "write_state", lambda path, identity, facts, arrays: written.append(facts))
    run = begun(tmp_path, monkeypatch)
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 3600.0)
    run.stest()
    assert written == []
    assert RunFolder(tmp_path / "r").records("stest").keys() == {0, 1}
    assert json.dumps(written) == "[]"


@pytest.mark.parametrize("solver", ["cg", "pcg"])
def test_the_solvers_that_keep_their_state_go_on_with_the_same_bits(solver, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 3600.0)
    torch.set_num_threads(1)
    options = {**OPTIONS, "solver": solver, "damping": 0.01, "tolerance": 1e-10}
    offered, original = [], keeping.Keeping.offer

    def counted(self, state):
        offered.append(self._block.index)
        if len(offered) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state)

    monkeypatch.setattr(keeping.Keeping, "offer", counted)
    stop = 0
    Run(tmp_path / "calm", tasks.mlp(n_test=4), **options).stest()
    calm = list(offered)
    assert calm.count(0) > 3
    assert calm.count(1) > 3
    for stop in (1, 3, len(calm) - 1):
        offered.clear()
        path = tmp_path / str(stop)
        with pytest.raises(Interrupted):
            Run(path, tasks.mlp(n_test=4), **options).stest()
        Run(path, tasks.mlp(n_test=4), **options).stest()
        assert offered == calm, "an iteration was taken twice, or not at all"
        assert store_of(path) == store_of(tmp_path / "calm")
