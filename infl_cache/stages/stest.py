"""Stage 2: s_test of every test sample into `s_test.zarr`, K of them solved together and committed as a block."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block, array_layout
from infl_cache.disk.run import Force
from infl_cache.errors import IncompleteStore
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.probe import check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import batches, groups_of, spread
from infl_cache.maths.solvers import Identity, Solution, Solve, make_solver
from infl_cache.maths.solvers.exact import COLUMNS
from infl_cache.maths.task import losses_of
from infl_cache.progress import Bar, progress
from infl_cache.stages.blocks import some
from infl_cache.stages.fisher import check_damping, known_damping, needs_spectrum, with_tiles
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.opening import (
    Opened,
    StageResult,
    block_digest,
    log,
    options_identity,
    stored_dtype,
    summary,
    test_identity,
)
from infl_cache.stages.same import check_against_store
from infl_cache.stages.spectrum import advice, chosen_damping, known_spectrum
from infl_cache.stages.system import curvature_kind, curvature_samples, damped_curvature, left_out, solve_dtype

MAX_RIGHT_HAND_SIDES = 128
# Vectors of n_params a right-hand side needs at once: itself, solution, residual, direction, product, vmap's own.
VECTORS_A_SIDE = 12


def stest(run: Opened, force: Force = False) -> StageResult:
    """Compute what is missing of `s_test.zarr`; a finished store is left as it is.

    Raises `IncompleteStore` at the end if some rows are not finite; the others are done by then.
    """
    started = time.perf_counter()
    identity = {
        **options_identity(run.options.stest),
        **test_identity(run.task),
        "left_out": left_out(run),
        "stored_dtype": stored_dtype(run.parameters, run.task),
    }
    if curvature_kind(run.options.stest) == "fisher":  # made of the stored gradients, and of another store another one
        identity["grads"] = run.folder.fingerprint("grads")
    if run.folder.claim("stest", run.task_identity, identity, force) is None:
        _begin(run, identity)
    done = run.folder.done("stest")
    check_against_store(run, "stest")
    if "grads" in run.folder.manifest.stages:
        check_against_store(run, "grads")
    todo = [block for block in run.folder.stage_blocks("stest") if block.index not in done]
    notes = _compute(run, todo, len(run.task.test) - sum(b.rows for b in todo)) if todo else []
    bad = [row for record in run.folder.records("stest").values() for row in record.bad_rows]
    if bad and (run.options.influence.nonfinite == "stop" or len(bad) == len(run.task.test)):
        raise IncompleteStore(
            f"s_test: expected finite numbers, found NaN or Inf at test samples {some(bad)}; the other"
            f" {len(run.task.test) - len(bad)} are done. More damping or --curvature ggn may help,"
            " or go on without them by --nonfinite skip"
        )
    return summary(run, "stest", len(run.task.test), sum(block.rows for block in todo), started, notes)


def _begin(run: Opened, identity: dict[str, Any]) -> None:
    """Try the task on test samples and lay out the store."""
    task, n_test, size = run.task, len(run.task.test), run.parameters.size
    check_independence(task, "test", spread(n_test, 4), run.device)
    check_gradients_arrive(task, run.parameters, spread(len(task.train), 4), run.device)
    with torch.no_grad():
        losses_of(task, probe_batch(task, [0], run.device, "test"), measure=True)
    curvature_kind(run.options.stest)
    make_solver(run.options.stest, run.budget).check(size)
    check_damping(run)
    itemsize = 8 if solve_dtype(run) == torch.float64 else 4
    asked = run.options.resources.test_block_rows
    fitting = run.budget // 3 // (size * itemsize * VECTORS_A_SIDE)
    block_rows = min(asked or max(1, min(fitting, MAX_RIGHT_HAND_SIDES)), n_test)
    arrays = [("s_test", (size,), identity["stored_dtype"]), ("residual", (), "float64"), ("iterations", (), "int64"),
              ("converged", (), "bool"), ("loss", (), "float64"), ("measure", (), "float64"), ("target", (), "float64"),
              ("prediction", (), "float64"), ("digest", (), "uint64")]  # fmt: skip
    run.folder.begin_store(
        "stest", run.task_identity, identity, {"n_rows": n_test, "block_rows": block_rows},
        [array_layout(path, n_test, shape, kind, block_rows) for path, shape, kind in arrays],
        Codec("lz4", 5),
    )  # fmt: skip


def _compute(run: Opened, todo: Sequence[Block], finished: int) -> list[str]:
    """Solve, write, sync and commit the given blocks one after the other; notes on rows that did not converge."""
    store = run.folder.store("stest", "r+")
    # What is differentiated here is the measure, of test samples: it is what the forms are proved on.
    explained = replace(run.task, train=run.task.test, loss=run.task.measure or run.task.loss, measure=None)
    first = probe_batch(explained, range(min(CHECKED_SAMPLES, len(run.task.test))), run.device)
    forms, notes = decide_forms(explained, run.parameters, first, "dense", rows_at_once(run))
    with progress("stest", len(run.task.test), finished, show=run.options.resources.progress) as bar:
        products = _Products(run.check, bar)
        # The planned block, not the longest that is left: a resumed run does the same arithmetic as a calm one.
        sides = COLUMNS if run.options.stest.solver == "exact" else run.folder.plan("stest")["block_rows"]
        solver = _prepared(run, forms, sides, products)
        failed = _NotConverged()
        for block in todo:
            started = time.perf_counter()
            rhs, kept, digests = _right_hand_sides(run, forms, block)
            solution = solver(rhs.to(solve_dtype(run)))
            data, bad = _stored(solution, kept, digests, block)
            nonfinite = int((~np.isfinite(data["s_test"])).sum())
            files = store.write_block(block, data)
            seconds = time.perf_counter() - started
            run.folder.commit("stest", block, files, seconds, block_digest(digests), nonfinite, bad)
            failed.add(solution, block, bad)
            bar.advance(block.rows, sum(file.size for file in files), f"residual {float(solution.residual.max()):.1e}")
            run.check()
    notes += failed.notes()
    for note in notes:
        log.warning(note)
    return notes


def _prepared(run: Opened, forms: Forms, sides: int, products: _Products) -> Solve:
    """The solver of the run's system, after a look at its spectrum."""
    if run.options.stest.solver == "identity":
        return Identity().prepare(lambda v: v)
    spectrum = known_spectrum(run, forms, products.note) if needs_spectrum(run) else None
    damping = known_damping(run) if spectrum is None else chosen_damping(run, spectrum)
    for text in [] if spectrum is None else advice(run, spectrum, damping):
        products.note(text)
    run.folder.remember("stest", damping=damping)
    rows = curvature_samples(run)
    operator = damped_curvature(run, forms, sides, damping, rows, tick=products.tick, note=products.note)
    solver = make_solver(run.options.stest, run.budget, spectrum)
    return with_tiles(run, solver, rows, operator.shift).prepare(operator)


class _Products:
    """Counts products for the bar, lets a signal stop a long solve, and says once what is slow."""

    def __init__(self, check: Callable[[], None], bar: Bar) -> None:
        self._check, self._bar, self._count = check, bar, 0
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)

    def tick(self) -> None:
        self._check()
        self._count += 1
        if self._count % 16 == 0:
            self._bar.advance(0, note=f"{self._count} batch products")


def _right_hand_sides(run: Opened, forms: Forms, block: Block) -> tuple[Tensor, dict[str, Tensor], Any]:
    """d measure / d theta of the block's test samples (K, P), what is kept of each of them, and their digests."""
    size = min(run.options.resources.batch_size or CHECKED_SAMPLES, rows_at_once(run))
    size = forms.at_once(size)
    rows, digests = [], []
    kept: dict[str, list[Tensor]] = {name: [] for name in ("loss", "measure", "target", "prediction")}
    for batch in batches(run.task.test, "test", run.task.collate, groups_of(block.start, block.stop, size), run.device):
        captured = capture(run.task, forms, batch, measure=True)
        rows.append(rows_of(forms, captured.factors, captured.dense))
        digests.append(batch.digests)
        with torch.no_grad():
            kept["loss"].append(losses_of(run.task, batch)[1] if run.task.measure is not None else captured.loss)
        kept["measure"].append(captured.loss)
        kept["target"].append(captured.target)
        kept["prediction"].append(captured.prediction)
    return torch.cat(rows), {name: torch.cat(parts) for name, parts in kept.items()}, np.concatenate(digests)


def _stored(
    solution: Solution, kept: dict[str, Tensor], digests: Any, block: Block
) -> tuple[dict[str, Any], list[int]]:
    """The block's arrays; rows that are not finite become NaN and are named."""
    value = solution.value.clone()
    wrong = ~(torch.isfinite(value).all(1) & torch.isfinite(solution.residual).to(value.device))
    value[wrong] = torch.nan
    found = {"residual": solution.residual, "iterations": solution.iterations, "converged": solution.converged}
    data = {name: tensor.detach().cpu().numpy() for name, tensor in {"s_test": value, **found, **kept}.items()}
    return {**data, "digest": digests}, [block.start + row for row in torch.nonzero(wrong).flatten().tolist()]


class _NotConverged:
    """Collects the finite rows above the tolerance, for one line at the end."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._worst = 0.0
        self._reasons: set[str] = set()

    def add(self, solution: Solution, block: Block, bad: Sequence[int]) -> None:
        """Take note of a block's solution."""
        for place, (fine, residual) in enumerate(
            zip(solution.converged.tolist(), solution.residual.tolist(), strict=True)
        ):
            if not fine and block.start + place not in bad:
                self._rows.append(block.start + place)
                self._worst = max(self._worst, residual)
                self._reasons.add(solution.reasons[place])

    def notes(self) -> list[str]:
        """What there is to say."""
        if not self._rows:
            return []
        return [
            f"s_test of {len(self._rows)} test samples did not converge: {some(self._rows)}"
            f" (relative residual up to {self._worst:.1e}): {'; '.join(sorted(self._reasons))}"
        ]
