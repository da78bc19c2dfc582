"""Stage 2: s_test of the test samples that are asked for, K of them solved together and committed as a block."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import Block, array_layout, from_ranges
from infl_cache.disk.run import Force
from infl_cache.errors import IncompleteStore
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.measures import words_for
from infl_cache.maths.probe import check_gradients_arrive, check_independence, probe_batch
from infl_cache.maths.samples import batches, groups_among, spread
from infl_cache.maths.solvers import Solution, make_solver
from infl_cache.maths.solvers.exact import COLUMNS
from infl_cache.maths.task import losses_of, out_of_memory
from infl_cache.progress import Bar, progress
from infl_cache.stages.again import chosen, claim_again
from infl_cache.stages.blocks import some
from infl_cache.stages.fisher import check_damping
from infl_cache.stages.grads import CHECKED_SAMPLES, rows_at_once
from infl_cache.stages.keeping import Keeping
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
from infl_cache.stages.room import require_room_for_s_test
from infl_cache.stages.same import check_against_store
from infl_cache.stages.selection import appended, asked_tests, say_tests
from infl_cache.stages.solving import Products, prepared, sides_at_once
from infl_cache.stages.system import curvature_kind, left_out, solve_dtype, with_half_the_samples


def stest(run: Opened, force: Force = False, only: Collection[int] | None = None) -> StageResult:
    """Compute what is missing of `s_test.zarr`; a finished store is left as it is.

    The damaged blocks `only` are forgotten and made again, and nothing else is done.
    Raises `IncompleteStore` at the end if some rows are not finite; the others are done by then.
    """
    started = time.perf_counter()
    identity = _identity(run)
    asked = asked_tests(run.options.selection, run.task, run.options.resources.progress) if only is None else None
    if only is None:
        anew = run.folder.claim("stest", run.task_identity, identity, force) is None
    else:
        only, anew = claim_again(run, "stest", identity, only), False
    if not anew:
        check_against_store(run, "stest")
    if "grads" in run.folder.manifest.stages:
        check_against_store(run, "grads")
    require_room_for_s_test(run, _rows_left(run, asked, anew), anew)
    if anew:
        _begin(run, identity, asked or list(range(len(run.task.test))))
    elif only is None:
        run.folder.write_configuration()
        if asked is not None:
            _go_on_with(run, asked)
    done = run.folder.done("stest")
    todo = [each for each in run.folder.stage_blocks("stest") if each.index not in done and chosen(each.index, only)]
    samples = run.folder.samples("stest")
    count = int((samples >= 0).sum())
    notes = _compute(run, todo, count - sum(b.rows for b in todo)) if todo else []
    bad = [int(samples[row]) for record in run.folder.records("stest").values() for row in record.bad_rows]
    if bad and (run.options.influence.nonfinite == "stop" or len(bad) == count):
        raise IncompleteStore(
            f"s_test: expected finite numbers, found NaN or Inf at test samples {some(bad)}; the other"
            f" {count - len(bad)} are done. More damping or --curvature ggn may help,"
            " or go on without them by --nonfinite skip"
        )
    return summary(run, "stest", count, sum(block.rows for block in todo), started, notes)


def _identity(run: Opened) -> dict[str, Any]:
    """What the rows of `s_test` depend on besides the task."""
    identity = {
        **options_identity(run.options.stest),
        **test_identity(run.task),
        "left_out": left_out(run),
        "stored_dtype": stored_dtype(run.parameters, run.task),
    }
    kept = run.folder.manifest.stages.get("stest", {}).get("identity", {})
    if run.options.stest.solver != "pcg" and "preconditioner" not in kept:
        del identity["preconditioner"]  # it decides nothing here, and older runs know of none
    if curvature_kind(run.options.stest) == "fisher":  # made of the stored gradients, and of another store another one
        identity["grads"] = run.folder.fingerprint("grads")
    return identity


def _rows_left(run: Opened, asked: Sequence[int] | None, anew: bool) -> int:
    """Rows of s_test that are still to be written."""
    if anew:
        return len(run.task.test) if asked is None else len(asked)
    folder, samples = run.folder, run.folder.samples("stest")
    wanted = set(samples[samples >= 0].tolist() if asked is None else asked)
    done = [samples[record.start : record.stop].tolist() for record in folder.records("stest").values()]
    return len(wanted.difference(*done))


def _go_on_with(run: Opened, asked: Sequence[int]) -> None:
    """Plan rows for the test samples that are asked for now, besides what is done.

    What was asked for before and is not done yet goes, unless it is asked for again.
    """
    folder, plan = run.folder, run.folder.plan("stest")
    samples, done = folder.samples("stest"), folder.records("stest")
    kept = folder.stage_blocks("stest")[: max(done, default=-1) + 1]
    held = {int(sample) for block in kept for sample in samples[block.start : block.stop]}
    facts = appended(kept, samples, [test for test in asked if test not in held], plan["block_rows"])
    if facts != {name: plan.get(name) for name in facts}:
        say_tests(folder, from_ranges(facts["samples"]), len(run.task.test))
        folder.grow("stest", facts["spans"][-1][1], **facts)


def _begin(run: Opened, identity: dict[str, Any], tests: Sequence[int]) -> None:
    """Try the task on test samples and lay out the store."""
    task, n_test, size = run.task, len(run.task.test), run.parameters.size
    check_independence(task, "test", [tests[place] for place in spread(len(tests), 4)], run.device)
    check_gradients_arrive(task, run.parameters, spread(len(task.train), 4), run.device)
    with torch.no_grad():
        losses_of(task, probe_batch(task, [tests[0]], run.device, "test"), measure=True)
    curvature_kind(run.options.stest)
    make_solver(run.options.stest, run.budget).check(size)
    check_damping(run)
    block_rows = min(sides_at_once(run, run.options.resources.test_block_rows), n_test)
    plan = {
        "n_rows": len(tests),
        "block_rows": block_rows,
        **appended((), np.array([], np.int64), tests, block_rows),
        "measure": words_for(task.measure),
    }
    say_tests(run.folder, tests, n_test)
    run.folder.begin_store(
        "stest", run.task_identity, identity, plan,
        # A row that nobody wrote belongs to no test sample: its index is -1.
        [array_layout(path, len(tests), shape, kind, block_rows, fill=-1 if path == "index" else 0, rows="row",
                      columns="parameter")
         for path, shape, kind in columns_of(size, identity["stored_dtype"])],
        Codec("lz4", 5),
    )  # fmt: skip


def columns_of(size: int, dtype: str) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Path, row shape and type of each array of the store: s_test of `size` numbers and what is kept beside it."""
    beside = {"residual": "float64", "iterations": "int64", "converged": "bool", "loss": "float64",
              "measure": "float64", "target": "float64", "prediction": "float64", "digest": "uint64",
              "index": "int64"}  # fmt: skip
    return (("s_test", (size,), dtype), *((path, (), kind) for path, kind in beside.items()))


def _compute(run: Opened, todo: Sequence[Block], finished: int) -> list[str]:
    """Solve, write, sync and commit the given blocks one after the other; notes on rows that did not converge."""
    # What is differentiated here is the measure, of test samples: it is what the forms are proved on.
    explained = replace(run.task, train=run.task.test, loss=run.task.measure or run.task.loss, measure=None)
    first = probe_batch(explained, range(min(CHECKED_SAMPLES, len(run.task.test))), run.device)
    forms, notes = decide_forms(explained, run.parameters, first, "dense", rows_at_once(run))
    samples = run.folder.samples("stest")
    total = finished + sum(block.rows for block in todo)
    failed, left = _NotConverged(samples), list(todo)
    with progress("stest", total, finished, show=run.options.resources.progress) as bar:
        while left:
            smaller = None
            try:
                _solve(run, forms, left, failed, bar)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                smaller = with_half_the_samples(run) if out_of_memory(error) else None
                if smaller is None:
                    raise
            # Only here, with the exception gone, is the memory that its frames held free again.
            if smaller is not None:
                run = smaller
                log.warning(f"out of memory, going on with batches of at most {run.most_samples} samples")
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
    notes += failed.notes()
    for note in notes:
        log.warning(note)
    return notes


def _solve(run: Opened, forms: Forms, left: list[Block], failed: _NotConverged, bar: Bar) -> None:
    """Solve, write, sync and commit the first of the blocks `left`, and take it off, until there is none."""
    store, samples = run.folder.store("stest", "r+"), run.folder.samples("stest")
    keeping = Keeping(run)
    products = Products(keeping.tick, bar)
    # The planned block, not the longest that is left: a resumed run does the same arithmetic as a calm one.
    sides = COLUMNS if run.options.stest.solver == "exact" else run.folder.plan("stest")["block_rows"]
    solver = prepared(run, forms, sides, products, "stest")
    while left:
        block, started = left[0], time.perf_counter()
        rhs, kept, digests = _right_hand_sides(run, forms, block)
        rhs = rhs.to(solve_dtype(run))
        solution = solver(rhs, keeping.begin(block, rhs))
        data, bad = _stored(solution, kept, digests, block)
        data["index"] = samples[block.start : block.stop]
        nonfinite = int((~np.isfinite(data["s_test"])).sum())
        files = store.write_block(block, data)
        seconds = time.perf_counter() - started
        run.folder.commit("stest", block, files, seconds, block_digest(digests), nonfinite, bad)
        del left[0]
        keeping.forget()
        failed.add(solution, block, bad)
        bar.advance(block.rows, sum(file.size for file in files), f"residual {float(solution.residual.max()):.1e}")
        run.check()


def _right_hand_sides(run: Opened, forms: Forms, block: Block) -> tuple[Tensor, dict[str, Tensor], Any]:
    """d measure / d theta of the block's test samples (K, P), what is kept of each of them, and their digests."""
    size = min(run.options.resources.batch_size or CHECKED_SAMPLES, rows_at_once(run))
    size = min(size, run.most_samples or size)
    size = forms.at_once(size)
    rows, digests = [], []
    kept: dict[str, list[Tensor]] = {name: [] for name in ("loss", "measure", "target", "prediction")}
    groups = groups_among(run.folder.samples("stest")[block.start : block.stop].tolist(), size)
    for batch in batches(run.task.test, "test", run.task.collate, groups, run.device):
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

    def __init__(self, samples: NDArray[np.int64]) -> None:
        self._samples = samples
        self._rows: list[int] = []
        self._worst = 0.0
        self._reasons: set[str] = set()

    def add(self, solution: Solution, block: Block, bad: Sequence[int]) -> None:
        """Take note of a block's solution."""
        for place, (fine, residual) in enumerate(
            zip(solution.converged.tolist(), solution.residual.tolist(), strict=True)
        ):
            if not fine and block.start + place not in bad:
                self._rows.append(int(self._samples[block.start + place]))
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
