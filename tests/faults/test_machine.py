"""Anything in any order: some blocks, a stop, damage, more test samples, verify, repair, resume, and one invariant.

*What the ledger calls done is right*: a file that nobody damaged holds the numbers of an undisturbed run, whatever
came before; and nothing that is read gives another number.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from infl_cache import Run
from infl_cache.disk.ledger import Ledger
from infl_cache.disk.run import RunFolder
from infl_cache.errors import DamagedStore, IncompleteStore
from infl_cache.stages.verify import verify
from tests.faults import times
from tests.faults.data import N_TEST, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 5, "test_block_rows": 2, "tile_rows": 2}
STORES = ("grad_z.zarr", "s_test.zarr")


class Stopped(BaseException):
    """The process is gone, as far as the pipeline can tell."""


class Reference:
    """An undisturbed run of everything."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        run = Run(self.folder / "calm", small_task(), **OPTIONS)
        run.all()
        self.grad_z, self.s_test = run.grad_z(slice(None)), run.s_test(slice(None))
        self.scores = np.array(run.scores())


class Machine(RuleBasedStateMachine):
    """A run folder and what has been done to it; `damaged` are the files that somebody changed."""

    reference = None

    @initialize()
    def empty(self):
        if Machine.reference is None:
            Machine.reference = Reference()
        self.place = Path(tempfile.mkdtemp())
        self.path, self.damaged, self.asked = self.place / "run", set(), {0}

    def teardown(self):
        if hasattr(self, "place"):
            shutil.rmtree(self.place)

    def run(self):
        return Run(self.path, small_task(), **OPTIONS, test=sorted(self.asked))

    def attempt(self, act):
        """What refuses damage, or says that something is not there, has not given a wrong number."""
        try:
            return act()
        except IncompleteStore:
            return None
        except DamagedStore:
            if not self.damaged:
                raise
            return None

    def files(self):
        """What the ledger names, with what it says of it; the files of a matrix are damaged tile by tile elsewhere."""
        folder = RunFolder(self.path)
        records = [record for stage in ("grads", "stest", "rankings") if stage in folder.manifest.stages
                   for record in folder.records(stage).values()]  # fmt: skip
        return sorted({file.path for record in records for file in record.files})

    @rule(blocks=st.integers(0, 6), before=st.booleans())
    def run_some_blocks_and_stop(self, blocks, before):
        left, commit = [blocks], Ledger.commit

        def counted(ledger, record):
            if left[0] == 0 and before:
                raise Stopped  # its files are there, the ledger does not know of them
            commit(ledger, record)
            if left[0] == 0:
                raise Stopped
            left[0] -= 1

        with patch.object(Ledger, "commit", counted), contextlib.suppress(Stopped):
            self.attempt(self.run().all)

    @rule()
    def resume(self):
        if self.damaged:
            self.attempt(self.run().all)
        else:
            self.run().all()
            assert np.isfinite(Run(self.path, small_task()).scores()[sorted(self.asked)]).all()

    @rule(more=st.sets(st.integers(0, N_TEST - 1), min_size=1))
    def extend(self, more):
        self.asked |= more

    @precondition(lambda self: self.path.exists())
    @rule(chance=st.randoms(use_true_random=False), how=st.sampled_from(["flip", "cut", "delete"]))
    def damage(self, chance, how):
        there = [name for name in self.files() if (self.path / name).exists()]
        if not there:
            return
        name = chance.choice(there)
        file = self.path / name
        data = bytearray(file.read_bytes())
        if how == "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif how == "cut":
            del data[chance.randrange(len(data)) :]
        file.unlink() if how == "delete" else file.write_bytes(data)
        self.damaged |= {name}

    @precondition(lambda self: self.path.exists())
    @rule()
    def repair(self):
        self.attempt(lambda: self.run().verify(repair=True))
        self.notice()

    def notice(self):
        """Damage that is no more: made again, or no longer claimed."""
        found = {fault.file for fault in verify(RunFolder(self.path), show=False).faults} if self.begun() else set()
        assert found <= self.damaged, "damage where nobody did any"
        self.damaged = found

    def begun(self):
        return (self.path / "manifest.json").exists()

    @invariant()
    def what_is_called_done_is_right(self):
        if not hasattr(self, "path") or not self.begun():
            return
        self.notice()
        run = Run(self.path, small_task())
        folder = run.folder
        if "grads" in folder.manifest.stages:
            for index, record in folder.records("grads").items():
                rows = range(record.start, record.stop)
                found = self.attempt(lambda rows=rows: run.grad_z(list(rows)))
                if found is not None:
                    np.testing.assert_array_equal(found, self.reference.grad_z[rows], err_msg=f"grads {index}")
        if "stest" in folder.manifest.stages:
            samples = folder.samples("stest")
            for record in folder.records("stest").values():
                tests = samples[record.start : record.stop].tolist()
                found = self.attempt(lambda tests=tests: run.s_test(tests))
                if found is not None:
                    np.testing.assert_allclose(found, self.reference.s_test[tests], rtol=1e-9, atol=1e-12)
        scores = self.attempt(run.scores)
        if scores is not None:
            asked = np.isfinite(scores).all(1)
            np.testing.assert_allclose(scores[asked], self.reference.scores[asked], rtol=1e-6, atol=1e-9)
            assert np.isnan(scores[~asked]).all()


def test_what_the_ledger_calls_done_is_right():
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=times(3, 30), stateful_step_count=times(8, 20), deadline=None, suppress_health_check=checks,
            database=None, print_blob=True,
        ),
    )  # fmt: skip
    shutil.rmtree(Machine.reference.folder)
    Machine.reference = None
