"""Whether the task at hand is the one that the stored rows were computed from, sample by sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.disk.manifest import differences
from infl_cache.disk.run import RunFolder
from infl_cache.errors import ForeignRun
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import check_data, probe_batch
from infl_cache.maths.samples import digests_at, plain_tensors, spread
from infl_cache.maths.task import Task, losses_of
from infl_cache.progress import progress
from infl_cache.stages.opening import Opened, as_stored, log, task_identity, test_identity
from infl_cache.stages.selection import count_of_tests

CHECK_SECONDS = 2.0
CHECKED_LOSSES = 8
# Samples of a plain data set that are compared together.
CHECKED_AT_ONCE = 256
# How often a sample that is not the stored one is fetched twice; what is drawn anew may be the same once.
FETCHED_AGAIN = 8
REMEDY = "use another --run, or start this stage over with --force"


def check_against_store(run: Opened, stage: str) -> None:
    """Compare data set and losses with what the finished blocks of a stage were computed from.

    Raises `DamagedStore` if a block's files are not as committed, `ForeignRun` naming the first sample that differs.
    """
    done = run.folder.done(stage)
    if not done:
        return
    name = "train" if stage == "grads" else "test"
    store = run.folder.store(stage)
    every = run.folder.stage_blocks(stage)
    columns = ["digest", "loss"] if stage == "grads" else ["digest", "loss", "measure"]
    parts = [store.read_block(every[index], columns) for index in sorted(done)]
    samples = run.folder.samples(stage)
    rows = np.concatenate([samples[every[index].start : every[index].stop] for index in sorted(done)])
    stored_digests = np.concatenate([part["digest"] for part in parts])
    resources = run.options.resources
    if resources.check_data == "full":
        check_all_digests(getattr(run.task, name), name, rows.tolist(), stored_digests, run.check, resources.progress)
    else:
        check_digests(getattr(run.task, name), name, rows.tolist(), stored_digests)
    for column in columns[1:]:
        stored = np.concatenate([part[column] for part in parts])
        check_values(run.task, name, column, rows.tolist(), stored, run.device)


def check_digests(dataset: Any, name: str, rows: Sequence[int], stored: NDArray[Any]) -> None:
    """`ForeignRun` naming the first sample found that is not the one a stored row was computed from.

    `BadInput` if that sample differs from itself when it is fetched twice.
    Goes through the rows in random order until two seconds have passed, and then says how many it saw; through all of
    them where those suffice.
    """
    deadline, checked = time.perf_counter() + CHECK_SECONDS, 0
    for places in _at_once(dataset, np.random.default_rng(0).permutation(len(rows))):
        _compare(dataset, name, rows, stored, places)
        checked += len(places)
        if checked < len(rows) and time.perf_counter() > deadline:
            log.warning(
                f"{checked:,} of {len(rows):,} {name} samples were compared with those that the stored rows were"
                " computed from; --check-data full compares all"
            )
            return


def check_all_digests(
    dataset: Any, name: str, rows: Sequence[int], stored: NDArray[Any], check: Callable[[], None], show: bool
) -> None:
    """`check_digests` of every row, in their order, however long it takes; `check()` may raise between samples."""
    with progress(f"check {name}", len(rows), show=show) as bar:
        for places in _at_once(dataset, np.arange(len(rows))):
            _compare(dataset, name, rows, stored, places)
            bar.advance(len(places))
            check()


def _at_once(dataset: Any, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Places in that order, one by one; those of a plain data set many at a time."""
    size = 1 if plain_tensors(dataset) is None else CHECKED_AT_ONCE
    return (order[start : start + size] for start in range(0, len(order), size))


def _compare(dataset: Any, name: str, rows: Sequence[int], stored: NDArray[Any], places: NDArray[np.int64]) -> None:
    """`ForeignRun` or `BadInput` for the first of the rows at `places` whose sample is not the stored one."""
    indices = [int(rows[place]) for place in places]
    differing = np.flatnonzero(digests_at(dataset, name, indices) != stored[places])
    if len(differing):
        index = indices[int(differing[0])]
        check_data(dataset, name, [index] * FETCHED_AGAIN)
        raise ForeignRun(
            f"{name}[{index}]: expected the sample that the stored rows were computed from, found another; {REMEDY}"
        )


def check_values(
    task: Task, name: str, column: str, rows: Sequence[int], stored: NDArray[Any], device: torch.device
) -> None:
    """`ForeignRun` if the loss or measure of a stored sample is another now: whatever changed, the numbers did."""
    for position in spread(len(rows), CHECKED_LOSSES):
        with torch.no_grad():
            batch = probe_batch(task, [rows[position]], device, name)
            found = float(losses_of(task, batch, column == "measure")[1][0])
        expected = float(stored[position])
        if not np.isclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ForeignRun(
                f"{column} of {name}[{rows[position]}]: expected {expected:.6g} as stored, found {found:.6g};"
                f" has the code of model, loss or measure changed? {REMEDY}"
            )


def check_same_identity(folder: RunFolder, task: Task, parameters: Parameters) -> None:
    """`ForeignRun` with every differing field unless weights, data, loss and measure are those of a finished run."""
    made_for = {**(folder.manifest.task or {}), **folder.manifest.stages["stest"]["identity"]}
    now = {**task_identity(task, parameters), **test_identity(task)}
    found = differences({name: made_for.get(name) for name in now}, now)
    if found:
        raise ForeignRun(
            f"{folder.path} belongs to another task: {'; '.join(found)}; give the --task that the run was made with"
        )


def check_same_task(folder: RunFolder, task: Task) -> None:
    """`ForeignRun` unless the samples of a task are those of a finished run; for commands that only show them."""
    task = as_stored(folder, task)
    for stage, name in (("grads", "train"), ("stest", "test")):
        expected = folder.plan("grads")["n_rows"] if stage == "grads" else count_of_tests(folder)
        if len(getattr(task, name)) != expected:
            raise ForeignRun(
                f"{name}: expected {expected} samples as in {folder.path}, found {len(getattr(task, name))};"
                " give the --task that the run was made with"
            )
        store, samples, done = folder.store(stage), folder.samples(stage), folder.records(stage)
        ready = [block for block in folder.stage_blocks(stage) if block.index in done]
        parts = [store.read_block(block, ["digest"])["digest"] for block in ready]
        rows = [int(sample) for block in ready for sample in samples[block.start : block.stop]]
        if rows:
            check_digests(getattr(task, name), name, rows, np.concatenate(parts))
