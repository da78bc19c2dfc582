"""Whether the task at hand is the one that the stored rows were computed from, sample by sample."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
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
    resources = run.options.resources
    name = "train" if stage == "grads" else "test"
    store = run.folder.store(stage)
    every = run.folder.stage_blocks(stage)
    columns = ["digest", "loss"] if stage == "grads" else ["digest", "loss", "measure"]
    parts = [store.read_block(every[index], columns) for index in sorted(done)]
    samples = run.folder.samples(stage)
    rows = np.concatenate([samples[every[index].start : every[index].stop] for index in sorted(done)])
    digests, full = np.concatenate([part["digest"] for part in parts]), resources.check_data == "full"
    with progress(f"check {name}", len(rows), show=resources.progress and full) as bar:

        def compared(count: int) -> None:
            bar.advance(count)
            run.check()

        found = check_digests(getattr(run.task, name), name, rows.tolist(), digests, full, compared)
    if found < len(rows):
        log.warning(
            f"{found:,} of {len(rows):,} {name} samples were compared with those that {stage} was computed from;"
            " --check-data full compares all"
        )
    for column in columns[1:]:
        stored = np.concatenate([part[column] for part in parts])
        check_values(run.task, name, column, rows.tolist(), stored, run.device)


def check_digests(
    dataset: Any, name: str, rows: Sequence[int], stored: NDArray[Any], full: bool = False,
    compared: Callable[[int], None] = lambda count: None,
) -> int:  # fmt: skip
    """How many samples were compared with those that the stored rows were computed from.

    Goes through the rows in random order until two seconds have passed, or all of them (`full`); `compared` is told
    of every few. Raises `ForeignRun` naming the first sample found that is another, `BadInput` if that sample differs
    from itself when it is fetched twice.
    """
    deadline = math.inf if full else time.perf_counter() + CHECK_SECONDS
    order = np.random.default_rng(0).permutation(len(rows))
    at_once = 1 if plain_tensors(dataset) is None else CHECKED_AT_ONCE
    for start in range(0, len(rows), at_once):
        places = order[start : start + at_once]
        indices = [int(rows[place]) for place in places]
        differing = np.flatnonzero(digests_at(dataset, name, indices) != stored[places])
        if len(differing):
            index = indices[int(differing[0])]
            check_data(dataset, name, [index] * FETCHED_AGAIN)
            raise ForeignRun(
                f"{name}[{index}]: expected the sample that the stored rows were computed from, found another; {REMEDY}"
            )
        compared(len(indices))
        if time.perf_counter() > deadline:
            return start + len(indices)
    return len(rows)


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
        for block in ready:  # of a chunk that is gone zarr makes zeros
            folder.check_block(done[block.index])
        parts = [store.read_block(block, ["digest"])["digest"] for block in ready]
        rows = [int(sample) for block in ready for sample in samples[block.start : block.stop]]
        if rows:
            check_digests(getattr(task, name), name, rows, np.concatenate(parts))
