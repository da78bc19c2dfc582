"""Make a plan: measured here, or reckoned for a machine of the table."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import psutil

from infl_cache.config import Options
from infl_cache.disk.layout import choose_block_rows
from infl_cache.disk.ledger import array_bytes
from infl_cache.disk.run import RunFolder
from infl_cache.disk.trial import free_bytes
from infl_cache.errors import BadInput
from infl_cache.heap import freed_memory_kept
from infl_cache.maths.capture import Forms
from infl_cache.maths.task import Task
from infl_cache.progress import progress
from infl_cache.stages.grads import bytes_a_number, planned
from infl_cache.stages.opening import Opened, looked_at, options_identity, stored_dtype
from infl_cache.stages.plan.asked import PlanOptions
from infl_cache.stages.plan.grads import (
    SETTLED,
    GradsPlan,
    held_by_grads,
    measured,
    planned_layers,
    settled,
    store_choices,
)
from infl_cache.stages.plan.influence import (
    InfluencePlan,
    classes_among,
    held,
    scoring,
    temporaries,
    tile_of,
)
from infl_cache.stages.plan.machines import MACHINES
from infl_cache.stages.plan.pieces import compared
from infl_cache.stages.plan.reckoned import on_machine, on_meta
from infl_cache.stages.plan.stest import StestPlan, plan_stest, sizes_of
from infl_cache.stages.plan.trial import Tried, tried
from infl_cache.stages.plan.whole import Plan
from infl_cache.stages.selection import asked_tests
from infl_cache.stages.system import curvature_kind


def plan(folder: RunFolder, task: Task, options: Options, asked: PlanOptions, machine: str | None) -> Plan:
    """Time a few samples and a trial block, or reckon with `machine`; nothing is kept on the disk."""
    curvature_kind(options.stest)
    free = asked.free or free_bytes(folder.path)
    if next(task.model.parameters()).is_meta:
        if machine is None:
            raise BadInput(
                f"device: expected a machine of the table ({', '.join(MACHINES)}) for a model on meta, found none;"
                " give --device"
            )
        return on_meta(task, options, asked, MACHINES[machine], free)
    with looked_at(folder, task, options) as run, freed_memory_kept():
        here, found = _measured(run, asked, free)
        forms = found[0]
        if machine is None:
            return _on_disk(here, asked.disk) if asked.disk else here
        return on_machine(here, run, forms, MACHINES[machine], asked)


def _measured(run: Opened, asked: PlanOptions, free: int) -> tuple[Plan, tuple[Forms, Tried]]:
    """The plan for this machine."""
    tests = asked_tests(run.options.selection, run.task, run.options.resources.progress) or range(len(run.task.test))
    n_train, n_test = asked.n_train or len(run.task.train), asked.n_test or len(tests)
    base = psutil.Process().memory_info().rss
    with progress("plan", 4, 0, "step", run.options.resources.progress) as bar:
        grads, forms = _grads(run, n_train)
        bar.advance(1)
        read = 1 / grads.read_rate if grads.cache else 1 / grads.compute_rate
        stest, found = _stest(run, forms, (n_train, n_test), (grads.start, read), tests)
        bar.advance(2)
        influence = _influence(run, forms, grads, (n_train, n_test), tests)
        start = influence.start + settled(replace(found.kept, create_seconds=0.0), *SETTLED["influence"])
        load = found.kept.read_seconds / found.rows
        influence = replace(influence, read=read, start=start, scoring=replace(influence.scoring, load=load))
        bar.advance(1)
    grads = replace(grads, passes=influence.passes)
    where = f"this machine ({run.device})"
    here = Plan(where, grads, stest, influence, run.budget, base, free, _written(run.folder), _scaled(run, n_train))
    return here, (forms, found)


def _scaled(run: Opened, n_train: int) -> tuple[str, ...]:
    there = len(run.task.train)
    if n_train == there:
        return ()
    return (f"{n_train:,} training samples cost and compress as the task's {there:,} do",)


def _grads(run: Opened, n_train: int) -> tuple[GradsPlan, Forms]:
    """Stage 1, timed."""
    options = run.options.grads
    dtype = stored_dtype(run.parameters, run.task, options.dtype)
    started = time.perf_counter()
    forms, found, notes = planned(run, options_identity(options, dtype=dtype))
    start = time.perf_counter() - started
    row_bytes = max(1, forms.row_size * bytes_a_number(dtype))
    asked = run.options.resources.block_rows
    block_rows = min(asked or choose_block_rows(n_train, row_bytes, run.budget // 8), n_train)
    batch_size = forms.at_once(found["batch_size"])
    rate, rows, trial = measured(run, forms, batch_size, dtype)
    choices = store_choices(run, forms, dtype, trial.write_seconds / trial.n_bytes) if options.cache else ()
    return GradsPlan(
        tuple(planned_layers(forms)), n_train, run.parameters.size, found["batch_size"], block_rows, rate,
        rows / trial.encode_seconds, rows / trial.write_seconds, rows / trial.read_seconds, trial.n_bytes / rows, 1,
        found.get("rounding"), tuple(notes), options.cache, dtype, options.codec,
        start + settled(trial, *SETTLED["grads"]), trial.commit_seconds,
        held_by_grads(run, forms, batch_size, block_rows * row_bytes), choices,
    ), forms  # fmt: skip


def _stest(
    run: Opened, forms: Forms, counts: tuple[int, int], seconds: tuple[float, float], tests: Sequence[int]
) -> tuple[StestPlan, Tried]:
    """Stage 2, tried; `seconds` are those of proving the forms, and of reading a gradient."""
    options = run.options.stest
    wide = options.solve_dtype == "float64" or stored_dtype(run.parameters, run.task) == "float64"
    wide = wide or (options.solve_dtype == "auto" and options.solver in ("exact", "fisher"))
    asked = run.options.resources.test_block_rows
    sizes = sizes_of(options, asked, run.budget, run.parameters.size, 8 if wide else 4, counts)
    start = seconds[0] + compared(run, "train", counts[0])
    found = tried(run, forms, sizes, start, seconds[1], tests)
    return plan_stest(options, found.costs, sizes, found.needed, found.spectrum.largest, found.damping,
                      found.kept.n_bytes / found.rows), found  # fmt: skip


def _influence(
    run: Opened, forms: Forms, grads: GradsPlan, counts: tuple[int, int], tests: Sequence[int]
) -> InfluencePlan:
    """Stage 3, its pieces timed."""
    itemsize = 8 if grads.dtype == "float64" else 4
    tile, columns, slab = tile_of(run.options, forms, run.budget, counts, grads.dtype, grads.block_rows)
    start = compared(run, "train", counts[0]) + compared(run, "test", counts[1])
    made = InfluencePlan(
        *counts, tile, columns, run.options.influence, classes_among(run, tests, counts[0]), 0.0,
        scoring(run, forms, tile, min(columns, counts[0])), start, slab,
    )  # fmt: skip
    room = min(run.budget / 8, temporaries(forms, tile, grads.block_rows, itemsize))
    block_bytes = grads.block_rows * forms.row_size * itemsize
    return replace(made, memory=held(made, room, run.parameters.size * itemsize, block_bytes))


def _on_disk(here: Plan, rate: int) -> Plan:
    """The same on a disk of so many bytes a second."""
    grads = here.grads
    write = rate / grads.bytes_a_sample
    grads = replace(grads, write_rate=write, read_rate=1 / (1 / grads.read_rate + grads.bytes_a_sample / rate))
    influence = here.influence
    influence = replace(influence, read=1 / grads.read_rate, scoring=replace(influence.scoring, write=1 / rate))
    return replace(here, grads=grads, influence=influence, machine=f"{here.machine}, a disk of {rate / 1e9:g} GB/s")


def _written(folder: RunFolder) -> float:
    """Bytes that the stages have committed already."""
    if not folder.exists:
        return 0.0
    stages = [stage for stage in ("grads", "stest", "influence") if stage in folder.manifest.stages]
    return math.fsum(array_bytes(folder.records(stage).values()) for stage in stages)
