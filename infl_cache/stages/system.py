"""The linear system of stage 2: the damped curvature over the training set, in batches that fit the budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from infl_cache.config import StestOptions
from infl_cache.errors import BadInput
from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.cast import in_dtype
from infl_cache.maths.curvature import Curvature, Rows, captured, output_rows, remembered
from infl_cache.maths.curvature.jacobian import Jacobian, capture_jacobian, forms_for_products, of_gradients
from infl_cache.maths.probe import activation_bytes, probe_batch
from infl_cache.maths.samples import Batch, batches
from infl_cache.stages.opening import Opened, stored_dtype
from infl_cache.stages.source import gradient_reader

# Beyond this the host is thought to spend its time on fresh pages: seen in single, noisy timings of products with a
# small CNN, not yet in a benchmark of the whole stage.
HOST_WORKING_SET = 64 * 2**20
# Products with captured rows are fastest at 16 to 256 samples at a time (scripts/bench_stest.py).
ROWS_WORKING_SET = 256 * 2**20
SMALLEST_BATCH, MAX_BATCH = 8, 256
# Rows that must be captured anew for a product cost a backward pass for each output.
OUTPUTS_A_SIDE = 2


def curvature_kind(options: StestOptions) -> Literal["ggn", "hessian", "fisher"]:
    """What `auto` stands for; `BadInput` for a solver that cannot solve the system asked for."""
    if options.solver == "fisher":
        if options.curvature not in ("auto", "fisher"):
            raise BadInput(
                f"curvature: expected fisher for the solver of that name, found {options.curvature};"
                " use --curvature auto, or --solver pcg"
            )
        return "fisher"
    return "ggn" if options.curvature == "auto" else options.curvature


def left_out(run: Opened) -> list[int]:
    """Training samples without a finite gradient, which `--nonfinite skip` leaves out of the curvature."""
    if run.options.influence.nonfinite != "skip":
        return []
    return sorted(row for record in run.folder.records("grads").values() for row in record.bad_rows)


def solve_dtype(run: Opened) -> torch.dtype:
    """The arithmetic of the solver."""
    asked: str = run.options.stest.solve_dtype
    if asked == "auto":
        asked = "float64" if run.options.stest.solver in ("exact", "fisher") else stored_dtype(run.parameters, run.task)
    return torch.float64 if asked == "float64" else torch.float32


def curvature_samples(run: Opened, most: int | None = None) -> list[int]:
    """The training samples that the curvature is a mean over: all, or a fixed random subsample of at most `most`."""
    bad = set(left_out(run))
    rows = [index for index in range(len(run.task.train)) if index not in bad]
    asked = run.options.stest.curvature_samples
    wanted = min(each for each in (len(rows), asked, most) if each is not None)
    if wanted == len(rows):
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.options.stest.seed))
    return sorted(rows[position] for position in order[:wanted].tolist())


def damped_curvature(
    run: Opened, forms: Forms, sides: int, damping: float, rows: Sequence[int], **hooks: Any
) -> Curvature:
    """The operator over the training samples `rows`, for `sides` vectors at once; `hooks` are its `tick` and `note`."""
    kind, dtype = curvature_kind(run.options.stest), solve_dtype(run)
    # One pass keeps, per sample, the activations once and their derivatives for each of the vectors.
    size, load = _batches(run, rows, dtype, 1 + sides)

    def pick(positions: Sequence[int]) -> Iterable[Batch]:
        chosen = [rows[position] for position in positions]
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        return batches(run.task.train, "train", run.task.collate, groups, run.device)

    made = None
    if kind == "ggn":
        made = _output_rows(run, forms, sides, rows, dtype, hooks["note"])
    elif kind == "fisher":
        made = stored_rows(run, rows, dtype)
    return Curvature(
        task=run.task,
        parameters=run.parameters,
        kind=kind,
        batches=remembered(load, run.budget // 8),
        pick=pick,
        n_train=len(rows),
        damping=damping,
        dtype=dtype,
        rows=made,
        other_rows=lambda: _rows_to_fit(run, forms, rows, dtype, hooks["note"]),
        **hooks,
    )


def _batches(
    run: Opened, rows: Sequence[int], dtype: torch.dtype, copies: int, row_bytes: int = 0, most: int = MAX_BATCH
) -> tuple[int, Callable[[], Iterable[Batch]]]:
    """Samples in a micro-batch, and a function that loads one pass of them.

    A sample takes `copies` times its activations, and `row_bytes`.
    """
    first = probe_batch(run.task, range(min(8, len(run.task.train), run.most_samples or 8)), run.device)
    kept = activation_bytes(run.task, run.parameters, first) * (2 if dtype == torch.float64 else 1)
    working_set = ROWS_WORKING_SET if row_bytes else HOST_WORKING_SET
    room = min(run.budget // 4, working_set) if run.device.type == "cpu" else run.budget // 4
    fitting = room // (kept * copies + row_bytes)
    size = min(most, run.options.resources.batch_size or max(SMALLEST_BATCH, min(MAX_BATCH, fitting)))
    size = min(size, run.most_samples or size)

    def load() -> Iterable[Batch]:
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        workers = run.options.resources.workers
        return batches(run.task.train, "train", run.task.collate, groups, run.device, workers)

    return size, load


def with_half_the_samples(run: Opened) -> Opened | None:
    """The run with batches of at most half as many samples in stage 2; None where they have a single one already."""
    before = run.most_samples or min(run.options.resources.batch_size or MAX_BATCH, len(run.task.train))
    return replace(run, most_samples=before // 2) if before > 1 else None


def _output_rows(
    run: Opened, forms: Forms, sides: int, rows: Sequence[int], dtype: torch.dtype, note: Callable[[str], None]
) -> Rows | None:
    """Rows of the outputs' Jacobian, where that is the cheaper way to Gauss-Newton products."""
    probe = probe_batch(run.task, rows[: min(4, run.most_samples or 4)], run.device)
    found = output_rows(run.task, forms, probe, dtype, note)
    if found is None:
        return None
    task, forms, row_bytes, outputs = found
    budget = run.budget // 3
    if len(rows) * row_bytes > budget and outputs > OUTPUTS_A_SIDE * sides:
        return None
    # A product holds what each vector sends to the outputs of one layer and back.
    widest = max((math.prod(layer.grad_shape) for layer in forms.factored), default=1)
    held = row_bytes + 2 * sides * widest * (8 if dtype == torch.float64 else 4)
    _, load = _batches(run, rows, dtype, 2, held)
    passes = remembered(captured(task, forms, remembered(load, run.budget // 8)), budget, Jacobian.n_bytes.__get__)
    few = outputs <= OUTPUTS_A_SIDE * sides
    return Rows(forms, passes, row_bytes, partial(capture_jacobian, task, forms) if few else None)


def _rows_to_fit(
    run: Opened, forms: Forms, rows: Sequence[int], dtype: torch.dtype, note: Callable[[str], None]
) -> Rows:
    """Rows for an approximation where products are made otherwise: of the outputs, else of the loss."""
    found = _output_rows(run, forms, MAX_BATCH, rows, dtype, note)
    if found is not None:
        return found
    note("the outputs cannot be differentiated one by one: EK-FAC is fitted to the empirical Fisher matrix")
    task = in_dtype(run.task, dtype)
    made = forms_for_products(forms, 1)
    row_bytes = 4 * (made.row_size + forms.parameters.size)
    _, load = _batches(run, rows, dtype, 2, row_bytes, made.at_once(MAX_BATCH))

    def gradients() -> Iterable[Jacobian]:
        for batch in load():
            captured = capture(task, made, batch)
            yield of_gradients(made, made, captured.factors, captured.dense)

    return Rows(made, gradients, 0)


def stored_rows(run: Opened, rows: Sequence[int], dtype: torch.dtype) -> Rows:
    """The training gradients as stage 1 stored them, one row a sample."""
    run.folder.require_complete("grads")
    stored = Forms.from_json(run.folder.plan("grads")["forms"])
    forms = forms_for_products(stored, 1, stored.factored)
    numbers = forms.n_dense + sum(layer.factor_size for layer in forms.factored)
    row_bytes = numbers * (8 if dtype == torch.float64 else 4)
    read, wanted = gradient_reader(run, stored, dtype), torch.tensor(rows)
    step = max(1, min(1024, run.budget // 16 // row_bytes))

    def load() -> Iterable[Jacobian]:
        for block in run.folder.stage_blocks("grads"):
            inside = wanted[(wanted >= block.start) & (wanted < block.stop)] - block.start
            if not len(inside):
                continue
            factors, dense = read(block)
            for start in range(0, len(inside), step):
                at = inside[start : start + step].to(run.device)
                part = {key: (a[at], g[at]) for key, (a, g) in factors.items()}
                yield of_gradients(stored, forms, part, dense[at])

    return Rows(forms, remembered(load, run.budget // 3, Jacobian.n_bytes.__get__), row_bytes)
