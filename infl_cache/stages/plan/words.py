"""A plan as text: short tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.plan.grads import GradsPlan, PlannedLayer
from infl_cache.stages.plan.influence import InfluencePlan
from infl_cache.stages.plan.stest import StestPlan
from infl_cache.stages.rounding import rounding_line

if TYPE_CHECKING:
    from infl_cache.stages.plan.whole import Plan

YEAR = 365.25 * 86400


def as_text(plan: Plan) -> str:
    """Everything that was planned."""
    fits = "" if plan.fits else ": TOO SMALL"
    rows = [
        ("1 grads", plan.grads.n_bytes, plan.grads.memory, plan.grads.seconds),
        ("2 stest", plan.stest.n_bytes + plan.stest.chosen.disk, plan.stest.memory, plan.stest.seconds),
        ("3 influence", float(plan.influence.n_bytes), plan.influence.memory, plan.influence.seconds),
        ("all", plan.n_bytes, plan.memory - plan.base, plan.seconds),
    ]
    cells = [
        (name, human_bytes(size), human_bytes(plan.base + held), duration(time)) for name, size, held, time in rows
    ]
    return "\n".join([
        *_layers(plan.grads.layers), "", *_store(plan.grads), "", *_solving(plan.stest), "", *_scoring(plan), "",
        *_choices(plan), "", f"on {plan.machine}:",
        *columns(("stage", "on the disk", "memory at most", "time"), cells),
        f"disk       {human_bytes(plan.to_write)} still to be written, {human_bytes(plan.free)} free{fits}",
        *(f"assumed: {each}" for each in plan.assumed),
        *(f"note: {each}" for each in plan.grads.notes),
    ])  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds for people, also of what nobody will wait for.

    >>> duration(3.2), duration(4e5), duration(1e12), duration(float("inf"))
    ('3.2 s', '4.6 days', '31,688 years', '-')
    """
    if not math.isfinite(seconds):
        return "-"
    if seconds < 2 * 86400:
        return human_seconds(seconds)
    return f"{seconds / 86400:,.1f} days" if seconds < 2 * YEAR else f"{seconds / YEAR:,.0f} years"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table, the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def _layers(layers: tuple[PlannedLayer, ...]) -> list[str]:
    head = ("layer", "gradient by", "kept", "scores", "numbers", "of plain", "mult.")
    rows = [
        (each.name, each.by, each.form, each.scored, f"{each.numbers:,}", f"{each.plain:,}", f"{each.operations:,}")
        for each in layers
    ]
    return ["numbers and multiplications a sample:", *columns(head, rows, 4)]


def _store(plan: GradsPlan) -> list[str]:
    plain = 4 * plan.n_params
    best = "store them" if plan.stored_seconds <= plan.uncached_seconds else "do not store them (--no-cache)"
    lines = [
        f"store      {human_bytes(plan.n_bytes)} for {plan.n_train:,} samples, {plan.bytes_a_sample:,.0f} bytes each"
        f" ({plain / plan.bytes_a_sample:,.1f} times smaller than float32 rows), {plan.dtype}, {plan.codec}",
        f"rates      {plan.compute_rate:,.0f} samples/s computed, {plan.write_rate:,.0f} written and synced,"
        f" {plan.read_rate:,.0f} read, in batches of {plan.batch_size} and blocks of {plan.block_rows}",
        f"gradients  {duration(plan.stored_seconds)} to store and read them {_often(plan.passes)} in stage 3,"
        f" {duration(plan.uncached_seconds)} to compute them again each time: {best}",
    ]
    if plan.rounding:
        lines.append(f"rounding   {rounding_line(plan.rounding)}, with gradients in place of s_test")
    return lines


def _often(times: int) -> str:
    return "once" if times == 1 else f"{times:,} times"


def _solving(plan: StestPlan) -> list[str]:
    sizes, needed = plan.sizes, plan.iterations
    known = f"; sqrt(kappa)/2 log(2/tolerance) is {plan.cg_bound:,.0f}" if math.isfinite(plan.cg_bound) else ""
    return [
        f"s_test     {human_bytes(plan.n_bytes)} for {sizes.n_test:,} test samples, {sizes.together} solved together,"
        f" solver {plan.solver}, damping {plan.damping:.3g}",
        f"products   {needed.mean:.0f} a test sample by cg, {needed.longest:.0f} at most ({needed.known}){known}",
    ]


def _scoring(plan: Plan) -> list[str]:
    stage: InfluencePlan = plan.influence
    return [
        f"matrix     {human_bytes(stage.matrix_bytes)}, rankings {human_bytes(stage.ranking_bytes)} (alone with"
        f" --no-matrix); tiles of {stage.tile_rows:,} test by {min(stage.columns, stage.n_train):,} training samples,"
        f" the gradients read {_often(stage.passes)}"
    ]


def _choices(plan: Plan) -> list[str]:
    """What other choices would cost."""
    solvers = [
        (each.name + (" *" if each.name == plan.stest.solver else ""), duration(each.seconds),
         human_bytes(plan.base + each.memory) if math.isfinite(each.memory) else "-", human_bytes(each.disk), each.note)
        for each in plan.stest.choices
    ]  # fmt: skip
    lines = columns(("solver", "stage 2", "memory", "disk besides", ""), solvers)
    grads = plan.grads
    stores = [
        (f"{each.dtype} {each.codec}{' *' if (each.dtype, each.codec) == (grads.dtype, grads.codec) else ''}",
         human_bytes(each.bytes_a_sample * grads.n_train), duration(each.write * grads.n_train),
         duration(each.read * grads.n_train))
        for each in grads.choices
    ]  # fmt: skip
    return lines + (["", *columns(("gradients as", "store", "to write", "to read"), stores)] if stores else [])
