"""Self-influence of every training sample, `grad_i . (C + damping I)^-1 grad_i`: the finder of wrong labels.

It needs stage 1 alone. The system is that of stage 2, with options of its own: blocks of training gradients take the
place of the test samples' as right-hand sides, and of each solution one number and its certificate are kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infl_cache.config import Options, StestOptions
from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block, array_layout
from infl_cache.disk.run import Force, RunFolder
from infl_cache.errors import IncompleteStore
from infl_cache.maths.capture import Forms, decide_forms, rows_of
from infl_cache.maths.curvature import Curvature, Rows
from infl_cache.maths.self_influence import SelfInfluence, by_gram, by_inverse, by_norm, by_solver
from infl_cache.maths.solvers import ByEKFAC, Fisher, make_solver
from infl_cache.maths.solvers.ekfac import approximate_inverse
from infl_cache.maths.solvers.exact import COLUMNS
from infl_cache.progress import progress
from infl_cache.stages.again import chosen, claim_again
from infl_cache.stages.blocks import some
from infl_cache.stages.fisher import check_damping
from infl_cache.stages.grads import first_samples, rows_at_once
from infl_cache.stages.keeping import Keeping
from infl_cache.stages.opening import Opened, StageResult, log, options_identity, summary
from infl_cache.stages.same import check_against_store
from infl_cache.stages.solving import Products, sides_at_once, system
from infl_cache.stages.suspects import CERTIFICATE, column, write_ranking
from infl_cache.stages.system import curvature_kind, curvature_samples, left_out, solve_dtype, stored_rows

STAGE = "self_influence"
SMALLEST_BLOCK = 16
# Copies of a block's inner products with all samples that `fisher` holds at once.
COPIES = 3

# Values of a block's rows, all of which have finite gradients.
Compute = Callable[[Block, Rows], SelfInfluence]


def self_influence(run: Opened, force: Force = False, only: Collection[int] | None = None) -> StageResult:
    """Compute what is missing of `self_influence.zarr`, then `self_influence.npz`.

    The damaged blocks `only` are forgotten and made again, and the second file if it is damaged; nothing else is done.
    Raises `IncompleteStore` unless stage 1 is finished, and at the end if some values are not finite; the others are
    done by then.
    """
    started, folder = time.perf_counter(), run.folder
    skipped = _require_gradients(run)
    _keep_options_of_stage_2(folder)
    identity = _identity(run)
    plan: dict[str, Any] | None
    if only is not None:
        only, plan = claim_again(run, STAGE, identity, only), folder.plan(STAGE)
    else:
        plan = folder.claim(STAGE, run.task_identity, identity, force)
    check_against_store(run, "grads")
    if plan is None:
        _begin(run, identity)
    elif only is None:
        folder.write_configuration()
    done = folder.done(STAGE)
    every = folder.stage_blocks(STAGE)
    todo = [block for block in every if block.index not in done and chosen(block.index, only)]
    if todo:
        _compute(run, todo)
    if only is not None and len(folder.records(STAGE)) < len(every):
        return summary(run, STAGE, len(run.task.train), sum(block.rows for block in todo), started)
    bad = sorted({row for record in folder.records(STAGE).values() for row in record.bad_rows} - set(skipped))
    count = len(run.task.train)
    if bad and (run.options.influence.nonfinite == "stop" or len(bad) + len(skipped) == count):
        raise IncompleteStore(
            f"self-influence: expected finite numbers, found NaN or Inf at train samples {some(bad)}; the other"
            f" {count - len(bad)} are done. More damping or --curvature ggn may help, or go on without them by"
            " --nonfinite skip"
        )
    write_ranking(run, bool(force) or (bool(todo) and only is None))
    notes = [f"train samples {some(skipped)} have no finite gradient; they are NaN"] if skipped else []
    for note in (uncertain := _uncertain(run)):
        log.warning(note)
    return summary(run, STAGE, count, sum(block.rows for block in todo), started, notes + uncertain)


def begun_with(folder: RunFolder, options: Options, given: Mapping[str, Any]) -> Options:
    """The options with those that self-influence was begun with in place of stage 2's, but for what is given."""
    entry = folder.manifest.stages.get(STAGE)
    if entry is None or given.get("solver") not in (None, entry["identity"]["solver"]):
        return options
    names = {field.name for field in dataclasses.fields(StestOptions)} & entry["identity"].keys() - given.keys()
    kept = {name: entry["identity"][name] for name in names}
    return dataclasses.replace(options, stest=dataclasses.replace(options.stest, **kept))


def _require_gradients(run: Opened) -> list[int]:
    """Training samples without a finite gradient; `IncompleteStore` unless stage 1 is finished and fit to be used."""
    records = run.folder.require_complete("grads")
    bad = sorted(row for record in records.values() for row in record.bad_rows)
    if bad and run.options.influence.nonfinite == "stop":
        raise IncompleteStore(
            f"grads: expected finite rows, found NaN or Inf at {some(bad)};"
            " mend them, or leave them out by --nonfinite skip"
        )
    return bad


def _keep_options_of_stage_2(folder: RunFolder) -> None:
    """A finished stage 2 may have been solved otherwise: `run.yaml` goes on to say how, so that it still carries on."""
    entry = folder.manifest.stages.get("stest")
    if entry is not None and folder.records("stest"):
        own = {field.name for field in dataclasses.fields(StestOptions)}
        kept = {name: value for name, value in entry.get("options", {}).items() if name in own}
        folder.configuration = {**folder.configuration, **kept}


def _identity(run: Opened) -> dict[str, Any]:
    """What the values depend on besides the task."""
    identity = {
        **options_identity(run.options.stest),
        "weight_decay": float(run.task.weight_decay),
        "left_out": left_out(run),
        "grads": run.folder.fingerprint("grads"),
    }
    if run.options.stest.solver != "pcg":
        del identity["preconditioner"]  # it decides nothing here
    return identity


def _begin(run: Opened, identity: dict[str, Any]) -> None:
    """Refuse a system that cannot be solved, then lay out the store."""
    curvature_kind(run.options.stest)
    make_solver(run.options.stest, run.budget).check(run.parameters.size)
    check_damping(run)
    n_train = len(run.task.train)
    block_rows = min(run.options.resources.block_rows or _fitting_rows(run), n_train)
    arrays = [(STAGE, "float64"), *CERTIFICATE.items()]
    run.folder.begin_store(
        STAGE, run.task_identity, identity, {"n_rows": n_train, "block_rows": block_rows},
        [array_layout(path, n_train, (), kind, block_rows, rows="train") for path, kind in arrays],
        Codec("lz4", 5),
    )  # fmt: skip


def _fitting_rows(run: Opened) -> int:
    """Rows of a block: right-hand sides that are solved together, or, where none are, as many as memory holds."""
    solver, stored = run.options.stest.solver, int(run.folder.plan("grads")["block_rows"])
    if solver == "identity":
        return stored
    if solver == "fisher":
        held = 8 * COPIES * len(curvature_samples(run))
        return max(SMALLEST_BLOCK, min(stored, run.budget // 4 // held))
    return sides_at_once(run, None)


def _compute(run: Opened, todo: Sequence[Block]) -> None:
    """Compute, write, sync and commit the given blocks one after the other."""
    folder, store, left = run.folder, run.folder.store(STAGE, "r+"), set(left_out(run))
    total, show = len(run.task.train), run.options.resources.progress
    with progress("self-influence", total, total - sum(block.rows for block in todo), show=show) as bar:
        keeping = Keeping(run, STAGE)
        compute = _computing(run, keeping, Products(keeping.tick, bar))
        for block in todo:
            started = time.perf_counter()
            rows = [row for row in range(block.start, block.stop) if row not in left]
            found = compute(block, stored_rows(run, rows, solve_dtype(run))) if rows else None
            data, bad = _stored(found, rows, block)
            files = store.write_block(block, data)
            folder.commit(STAGE, block, files, time.perf_counter() - started, "", len(bad), bad)
            keeping.forget()
            bar.advance(block.rows, sum(file.size for file in files))
            run.check()


def _computing(run: Opened, keeping: Keeping, products: Products) -> Compute:
    """The cheapest way to the values that the solver allows; what is done once a run is done here."""
    if run.options.stest.solver == "identity":
        return lambda block, rows: _joined(by_norm(rows.forms, part) for part in rows.passes())
    # The planned block, not the longest that is left: a resumed run does the same arithmetic as a calm one.
    sides = COLUMNS if run.options.stest.solver == "exact" else run.folder.plan(STAGE)["block_rows"]
    solver, operator = system(run, _forms(run), sides, products, STAGE)
    if isinstance(solver, Fisher):
        return _by_gram(solver, operator)
    if isinstance(solver, ByEKFAC):
        inverse, tolerance = approximate_inverse(operator, solver.fits), solver.tolerance
        return lambda block, rows: by_inverse(inverse, operator, _plain(rows), tolerance)
    solve = solver.prepare(operator)

    def compute(block: Block, rows: Rows) -> SelfInfluence:
        gradients = _plain(rows)
        return by_solver(solve, gradients, keeping.begin(block, gradients))

    return compute


def _by_gram(solver: Fisher, operator: Curvature) -> Compute:
    assert operator.rows is not None
    values = by_gram(solver, operator, operator.rows)
    return lambda block, rows: _joined(values(part) for part in rows.passes())


def _forms(run: Opened) -> Forms:
    """Forms for products with the curvature, proved on the first samples."""
    if curvature_kind(run.options.stest) == "fisher":  # the rows are those of the store
        return Forms.from_json(run.folder.plan("grads")["forms"])
    forms, notes = decide_forms(run.task, run.parameters, first_samples(run), "dense", rows_at_once(run))
    for note in notes:
        log.warning(note)
    return forms


def _plain(rows: Rows) -> Tensor:
    """Plain gradients (B, n_params) of stored rows."""
    parts = []
    for each in rows.passes():
        factors = {key: (inputs, grads.squeeze(1)) for key, (inputs, grads) in each.factors.items()}
        parts.append(rows_of(rows.forms, factors, each.dense.squeeze(1)))
    return torch.cat(parts)


def _joined(parts: Iterable[SelfInfluence]) -> SelfInfluence:
    """The values of consecutive rows together."""
    every = list(parts)
    names = [field.name for field in dataclasses.fields(SelfInfluence)]
    return SelfInfluence(*(torch.cat([getattr(each, name) for each in every]) for name in names))


def _stored(found: SelfInfluence | None, rows: Sequence[int], block: Block) -> tuple[dict[str, Any], list[int]]:
    """The block's arrays, and the rows whose value is not finite: of these and of those left out it is NaN."""
    places = np.array(rows, np.int64) - block.start
    data = {name: np.zeros(block.rows, kind) for name, kind in CERTIFICATE.items()}
    data[STAGE], data["residual"] = np.full(block.rows, np.nan), np.full(block.rows, np.nan)
    if found is not None:
        data[STAGE][places] = found.value.cpu().numpy()
        for name in CERTIFICATE:
            data[name][places] = getattr(found, name).cpu().numpy()
    wrong = ~np.isfinite(data[STAGE])
    data[STAGE][wrong], data["converged"][wrong] = np.nan, False
    return data, [block.start + int(row) for row in np.flatnonzero(wrong)]


def _uncertain(run: Opened) -> list[str]:
    """What there is to say of values whose system was not solved to the tolerance."""
    values, residual = column(run.folder, STAGE), column(run.folder, "residual")
    if run.options.stest.solver == "ekfac":
        known = np.isfinite(residual)
        return (
            [
                f"ekfac is an approximation: relative residual of {int(known.sum())} rows, median"
                f" {np.median(residual[known]):.1e}, largest {residual[known].max():.1e}; the others' is not measured"
            ]
            if known.any()
            else []
        )
    over = np.flatnonzero(np.isfinite(values) & ~column(run.folder, "converged").astype(bool))
    if not len(over):
        return []
    return [
        f"self-influence of {len(over)} train samples did not converge: {some(over.tolist())}"
        f" (relative residual up to {residual[over].max():.1e})"
    ]
