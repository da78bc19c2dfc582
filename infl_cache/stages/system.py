"""The linear system of stage 2: the damped curvature over the training set, in batches that fit the budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from infl_cache.maths.curvature import Curvature, remembered
from infl_cache.maths.probe import activation_bytes, probe_batch
from infl_cache.maths.samples import Batch, batches
from infl_cache.stages.opening import Opened, stored_dtype

# Beyond this the host is thought to spend its time on fresh pages: seen in single, noisy timings of products with a
# small CNN, not yet in a benchmark of the whole stage.
HOST_WORKING_SET = 64 * 2**20
SMALLEST_BATCH, MAX_BATCH = 8, 256


def left_out(run: Opened) -> list[int]:
    """Training samples without a finite gradient, which `--nonfinite skip` leaves out of the curvature."""
    if run.options.influence.nonfinite != "skip":
        return []
    return sorted(row for record in run.folder.records("grads").values() for row in record.bad_rows)


def solve_dtype(run: Opened) -> torch.dtype:
    """The arithmetic of the solver."""
    asked: str = run.options.stest.solve_dtype
    if asked == "auto":
        asked = "float64" if run.options.stest.solver == "exact" else stored_dtype(run.parameters, run.task)
    return torch.float64 if asked == "float64" else torch.float32


def curvature_of(run: Opened, sides: int) -> Curvature:
    """The damped curvature over the training set, its micro-batch and cache chosen from the budget."""
    task, n_train, dtype = run.task, len(run.task.train), solve_dtype(run)
    first = probe_batch(task, range(min(8, n_train)), run.device)
    kept = activation_bytes(task, run.parameters, first) * (2 if dtype == torch.float64 else 1)
    # One pass keeps, per sample, the activations once and their derivatives for each of the vectors.
    room = min(run.budget // 4, HOST_WORKING_SET) if run.device.type == "cpu" else run.budget // 4
    size = run.options.resources.batch_size or max(SMALLEST_BATCH, min(MAX_BATCH, room // (kept * (1 + sides))))
    workers = run.options.resources.workers

    bad = set(left_out(run))
    rows = [index for index in range(n_train) if index not in bad]

    def load() -> Iterable[Batch]:
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        return batches(task.train, "train", task.collate, groups, run.device, workers)

    def pick(positions: Sequence[int]) -> Iterable[Batch]:
        chosen = [rows[position] for position in positions]
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return batches(task.train, "train", task.collate, groups, run.device)

    return Curvature(
        task=task,
        parameters=run.parameters,
        kind=run.options.stest.curvature,
        batches=remembered(load, run.budget // 8),
        pick=pick,
        n_train=len(rows),
        damping=run.options.stest.damping,
        dtype=dtype,
    )
