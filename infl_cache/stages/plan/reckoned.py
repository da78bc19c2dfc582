"""A plan for a machine that is not here: operations of the layers over the rates of its data sheet."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from infl_cache.config import Options
from infl_cache.disk.layout import choose_block_rows
from infl_cache.maths.capture import Forms
from infl_cache.maths.capture.decide import supposed_forms
from infl_cache.maths.ekfac import sides_with_bases
from infl_cache.maths.params import Parameters, select
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.task import Task, evaluating
from infl_cache.stages.opening import Opened, as_asked, stored_dtype
from infl_cache.stages.plan.asked import PlanOptions
from infl_cache.stages.plan.costs import Costs, Iterations, Sizes
from infl_cache.stages.plan.counts import Counts, count
from infl_cache.stages.plan.grads import GradsPlan, planned_layers
from infl_cache.stages.plan.influence import (
    InfluencePlan,
    Scoring,
    held,
    tile_of,
)
from infl_cache.stages.plan.machines import EFFICIENCY, Machine
from infl_cache.stages.plan.stest import plan_stest, sizes_of
from infl_cache.stages.plan.whole import Plan
from infl_cache.stages.selection import asked_tests
from infl_cache.stages.system import OUTPUTS_A_SIDE

# Bytes a second of a disk, of compressing and of decompressing on all cores, where nothing was measured: guesses.
DISK, ENCODE, DECODE = 3e9, 2e9, 4e9
# Seconds of a pair in the rankings, which the host makes: a guess, on the high side.
RANKED = 5e-8
# Products a test sample that cg is thought to take, where nothing was solved: README, "Limits", says 40 to 70.
PRODUCTS = 60
# Vectors that an iteration of cg, and of pcg, reads and writes besides its products.
CG_VECTORS, PCG_VECTORS = 14, 60
# What a process with PyTorch holds besides.
PROCESS = 1e9
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def on_machine(here: Plan, run: Opened, forms: Forms, machine: Machine, asked: PlanOptions) -> Plan:
    """A plan that was measured here, for another machine: its bytes and iterations, but the seconds of operations."""
    found = count(
        run.task, run.parameters, forms, probe_batch(run.task, range(min(2, len(run.task.train))), run.device)
    )
    made = _plan(run.task, run.parameters, run.options, forms, found, machine, asked, here.grads.bytes_a_sample,
                 here.stest.iterations, here.stest.n_bytes / here.stest.sizes.n_test, here.free)  # fmt: skip
    solved = plan_stest(
        run.options.stest, made.stest.costs, made.stest.sizes, here.stest.iterations, here.stest.largest,
        here.stest.damping, here.stest.n_bytes / here.stest.sizes.n_test,
    )  # fmt: skip
    influence = replace(made.influence, classes=here.influence.classes)
    grads = replace(made.grads, notes=here.grads.notes, rounding=here.grads.rounding)
    return replace(
        made,
        grads=grads,
        stest=solved,
        influence=influence,
        written=here.written,
        assumed=(*made.assumed, *here.assumed),
    )


def on_meta(task: Task, options: Options, asked: PlanOptions, machine: Machine, free: float) -> Plan:
    """A plan for a model without weights, on `meta`: nothing is computed, so nothing is proved or compressed."""
    task = as_asked(task, options)
    parameters = select(task.model, task.parameters)
    device = torch.device("meta")
    with evaluating(task.model, device):
        batch = probe_batch(task, range(min(2, len(task.train))), device)
        forms = supposed_forms(task, parameters, batch, options.grads.form, options.grads.layer_forms)
        found = count(task, parameters, forms, batch)
    dtype = stored_dtype(parameters, task, options.grads.dtype)
    needed = Iterations(PRODUCTS, PRODUCTS, "a guess: nothing was solved")
    plan = _plan(task, parameters, options, forms, found, machine, asked, forms.row_size * BYTES[dtype] + 24.0, needed,
                 4.0 * parameters.size, free)  # fmt: skip
    guesses = ("nothing is compressed, and the forms of the layers are as their shapes suggest, unproved",)
    return replace(plan, assumed=(*plan.assumed, *guesses))


def _plan(
    task: Task, parameters: Parameters, options: Options, forms: Forms, found: Counts, machine: Machine,
    asked: PlanOptions, bytes_a_sample: float, needed: Iterations, bytes_a_test: float, free: float,
) -> Plan:  # fmt: skip
    """The three stages by operations, bytes and rates."""
    tests = asked_tests(options.selection, task, False) or range(len(task.test))
    n_train, n_test = asked.n_train or len(task.train), asked.n_test or len(tests)
    size, budget = parameters.size, min(options.resources.memory or 10**18, int(machine.memory) // 2)
    dtype = stored_dtype(parameters, task, options.grads.dtype)
    disk, row_bytes = asked.disk or DISK, forms.row_size * BYTES[dtype]
    passing = (found.forward + found.backward + found.build) / machine.operations
    cache = options.grads.cache
    stored = bytes_a_sample if cache else 24.0
    # A GPU computes the next block while the host compresses and writes the last one.
    compute = passing + (row_bytes / machine.moved if cache else 0)
    written = stored / disk + (row_bytes / ENCODE if cache else 0)
    read = stored / disk + row_bytes / DECODE + row_bytes / machine.moved if cache else passing
    block_rows = min(options.resources.block_rows or choose_block_rows(n_train, row_bytes, budget // 8), n_train)
    batch = options.resources.batch_size or min(256, block_rows)
    tile, columns, slab = tile_of(options, forms, budget, (n_train, n_test), dtype, block_rows)
    product = (found.rebuild / machine.operations, found.score / machine.operations)
    pieces = Scoring(*product, 4 * size / disk, 0.0, 1 / disk, RANKED, RANKED)
    influence = InfluencePlan(n_train, n_test, tile, columns, options.influence, 0, read, pieces, 0.0, slab)
    influence = replace(influence, memory=held(influence, budget / 8, 4 * size, block_rows * row_bytes))
    grads = GradsPlan(
        tuple(planned_layers(forms)), n_train, size, batch, block_rows, 1 / compute, math.inf, 1 / written, 1 / read,
        stored, influence.passes, None, (), cache, dtype, options.grads.codec, 0.0, 0.0,
        3.0 * block_rows * row_bytes + budget / 4,
    )  # fmt: skip
    sizes = sizes_of(options.stest, options.resources.test_block_rows, budget, size, 4, (n_train, n_test))
    damping = options.stest.damping
    stest = plan_stest(
        options.stest, _costs(found, forms, machine, sizes, read), sizes, needed, math.nan,
        math.nan if damping == "auto" else damping, bytes_a_test,
    )  # fmt: skip
    title = f"{machine.title}, a disk of {disk / 1e9:g} GB/s, on paper"
    assumed = (
        f"{EFFICIENCY:.0%} of the float32 operations of the data sheet, compression at {ENCODE / 1e9:g} GB/s and"
        f" decompression at {DECODE / 1e9:g} GB/s on the host",
    )
    return Plan(title, grads, stest, influence, budget, PROCESS, free, 0.0, assumed)


def _costs(found: Counts, forms: Forms, machine: Machine, sizes: Sizes, read: float) -> Costs:
    """Seconds of the pieces of stage 2, from their operations."""
    row_bytes = 4 * found.row_numbers
    fits = sizes.n_train * row_bytes <= sizes.budget // 3
    by_rows = row_bytes > 0 and (fits or found.outputs <= OUTPUTS_A_SIDE * sizes.together)
    side = (found.forward + found.backward + found.build + found.rebuild) / machine.operations
    # Vectors that an iteration reads and writes besides: cg's, and those of pcg's steps before.
    moved = 4 * sizes.n_params / machine.bandwidth
    return Costs(
        side=side, capture=found.rows / machine.operations if by_rows else 0.0,
        vector=(found.vector if by_rows else found.twice) / machine.operations,
        twice_vector=found.twice / machine.operations, read=read, single_vector=found.pair / machine.operations64,
        pair=found.pair / machine.operations64, cg=CG_VECTORS * moved, pcg=PCG_VECTORS * moved,
        square=4 * sizes.n_params / machine.operations64, operation=1 / machine.operations64,
        division=1 / machine.operations64, row_bytes=row_bytes if by_rows else 0, stored_bytes=8 * forms.row_size,
        outputs=found.outputs, sides=tuple(length for pair in sides_with_bases(forms).values() for length in pair),
    )  # fmt: skip
