"""What stage 1 would do and cost, before anything is written: the form of each layer, bytes, seconds, store or not."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from infl_cache.disk.codecs import Codec
from infl_cache.disk.trial import Trial, try_store
from infl_cache.maths.capture import Forms, capture
from infl_cache.maths.capture.cost import cost_of, scored
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import spread
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.buffers import BlockBuffer
from infl_cache.stages.grads import bytes_a_number, planned
from infl_cache.stages.opening import Opened, options_identity, stored_dtype
from infl_cache.stages.rounding import rounding_line
from infl_cache.stages.selection import asked_tests
from infl_cache.stages.stored import arrays_of, layouts

TRIAL_BATCHES = 4
TRIAL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PlannedLayer:
    """A part of the model: how its gradient is had, kept and scored; numbers and multiplications a sample."""

    name: str
    by: str
    form: str
    scored: str
    numbers: int
    plain: int
    operations: int


@dataclass(frozen=True)
class GradsPlan:
    """Stage 1 on paper. Rates are samples a second, measured on a few batches and one trial block."""

    layers: tuple[PlannedLayer, ...]
    n_train: int
    n_params: int
    batch_size: int
    block_rows: int
    compute_rate: float
    write_rate: float
    read_rate: float
    bytes_a_sample: float
    passes: int
    free: int
    rounding: dict[str, float] | None
    notes: tuple[str, ...]

    @property
    def stored_seconds(self) -> float:
        """Computing and writing overlap; then each pass of stage 3 reads the store once."""
        once = max(1 / self.compute_rate, 1 / self.write_rate)
        return self.n_train * (once + self.passes / self.read_rate)

    @property
    def uncached_seconds(self) -> float:
        """One pass for the losses and to see that all gradients are finite, then one in each pass of stage 3."""
        return self.n_train * (1 + self.passes) / self.compute_rate

    @property
    def n_bytes(self) -> float:
        """Size of the store."""
        return self.bytes_a_sample * self.n_train

    def __str__(self) -> str:
        return "\n".join([*_table(self.layers), "", *_summary(self)])


def plan_grads(run: Opened) -> GradsPlan:
    """Choose the forms, then time the gradients of a few batches and the writing of one trial block."""
    options = run.options.grads
    dtype = stored_dtype(run.parameters, run.task, options.dtype)
    identity = options_identity(options, dtype=dtype)
    forms, plan, notes = planned(run, identity)
    compute_rate, rows, trial = _trial(run, forms, forms.at_once(plan["batch_size"]), dtype)
    size = run.parameters.size
    tile = max(1, run.budget // 4 // (size * 4))
    asked = asked_tests(run.options.selection, run.task, run.options.resources.progress) or range(len(run.task.test))
    return GradsPlan(
        tuple(_planned_layers(forms)), plan["n_rows"], size, plan["batch_size"],
        plan["block_rows"], compute_rate, rows / trial.write_seconds, rows / trial.read_seconds,
        trial.n_bytes / rows, -(-len(asked) // tile), trial.free, plan.get("rounding"), tuple(notes),
    )  # fmt: skip


def _trial(run: Opened, forms: Forms, batch_size: int, dtype: str) -> tuple[float, int, Trial]:
    """Samples a second of computing, and a trial store of the same samples."""
    n_train = len(run.task.train)
    row_bytes = max(1, forms.row_size * bytes_a_number(dtype))
    wanted = min(n_train, TRIAL_BATCHES * batch_size, max(1, TRIAL_BYTES // row_bytes))
    chosen = spread(n_train, wanted)
    arrays = layouts(forms, len(chosen), dtype, len(chosen))
    buffer = BlockBuffer(arrays, len(chosen), run.device)
    seconds, timed = 0.0, 0
    for start in range(0, len(chosen), batch_size):
        batch = probe_batch(run.task, chosen[start : start + batch_size], run.device)
        started = time.perf_counter()
        captured = capture(run.task, forms, batch)
        stored = {"loss": captured.loss, "target": captured.target, **arrays_of(forms, captured, dtype)}
        buffer.fill(slice(start, start + len(batch.indices)), stored, batch.digests)
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        if start or len(chosen) <= batch_size:  # the first batch also warms up
            seconds, timed = seconds + time.perf_counter() - started, timed + len(batch.indices)
    buffer.wait()
    codec = Codec(run.options.grads.codec, run.options.grads.level)
    return timed / seconds, len(chosen), try_store(run.folder.path, arrays, codec, buffer.arrays(len(chosen)))


def _planned_layers(forms: Forms) -> list[PlannedLayer]:
    factored = {layer.module for layer in forms.factored}
    found = []
    for layer in forms.layers:
        form = "factored" if layer.module in factored else "dense"
        cost = cost_of(layer, form, with_input=not layer.input_key)
        shared = f" (input of {layer.input_key})" if layer.input_key else ""
        found.append(PlannedLayer(
            layer.module or "(model)", layer.rule, form + shared, scored(layer) if form == "factored" else "stored",
            cost.numbers, layer.gradient_size, cost.operations,
        ))  # fmt: skip
    sizes = dict(zip(forms.parameters.names, forms.parameters.sizes, strict=True))
    for copied in forms.spread:
        found.append(_dense(copied.name, "a copy a sample", sizes[copied.name]))
    for unit in forms.alone:
        size = sum(sizes[name] for name in unit.parameters.values())
        found.append(_dense(unit.module, f"{unit.engine} of the module", size))
    return found + [_dense(name, f"{forms.engine} of the model", sizes[name]) for name in forms.mapped]


def _dense(name: str, by: str, size: int) -> PlannedLayer:
    return PlannedLayer(name, by, "dense", "stored", size, size, 0)


def _table(layers: tuple[PlannedLayer, ...]) -> list[str]:
    head = ("layer", "gradient by", "kept", "scores", "numbers", "of plain", "mult.")
    rows = [
        (each.name, each.by, each.form, each.scored, f"{each.numbers:,}", f"{each.plain:,}", f"{each.operations:,}")
        for each in layers
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    aligned = [
        "  ".join(
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]
    return [f"numbers and multiplications a sample:\n{aligned[0]}", *aligned[1:]]


def _summary(plan: GradsPlan) -> list[str]:
    plain = 4 * plan.n_params
    fits = "" if plan.n_bytes < plan.free else ": TOO SMALL"
    best = "store them" if plan.stored_seconds <= plan.uncached_seconds else "do not store them (--no-cache)"
    lines = [
        f"store      {human_bytes(plan.n_bytes)} for {plan.n_train:,} samples, {plan.bytes_a_sample:,.0f} bytes each"
        f" ({plain / plan.bytes_a_sample:,.1f} times smaller than float32 rows); {human_bytes(plan.free)} free{fits}",
        f"rates      {plan.compute_rate:,.0f} samples/s computed, {plan.write_rate:,.0f} written and synced,"
        f" {plan.read_rate:,.0f} read, in batches of {plan.batch_size} and blocks of {plan.block_rows}",
        f"gradients  {human_seconds(plan.stored_seconds)} to store and read them in {plan.passes} passes of stage 3,"
        f" {human_seconds(plan.uncached_seconds)} to compute them again in each: {best}",
    ]
    if plan.rounding:
        lines.append(f"rounding   {rounding_line(plan.rounding)}, with gradients in place of s_test")
    return lines + [f"note: {note}" for note in plan.notes]
