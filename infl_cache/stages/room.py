"""Whether the disk has room for a stage, before it writes anything: exit code 5 where it has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infl_cache.disk.ledger import array_bytes
from infl_cache.disk.run import RunFolder
from infl_cache.disk.trial import allocated_bytes, free_bytes
from infl_cache.errors import DiskFull
from infl_cache.maths.solvers.pcg import HISTORY
from infl_cache.progress import human_bytes
from infl_cache.stages.opening import Opened, stored_dtype
from infl_cache.stages.solving import sides_at_once
from infl_cache.stages.standings import standing_bytes
from infl_cache.stages.system import solve_dtype
from infl_cache.stages.tally import STATE
from infl_cache.stages.tiles import FINAL, PARTIAL

# Bytes of what is kept beside a row of s_test.
BESIDE = 80
# Vectors of n_params that the state of an iteration holds for each test sample of a block.
STATE_VECTORS = {"cg": 5, "pcg": 3 + 2 * HISTORY, "lissa": 3}


def require_room(folder: RunFolder, stage: str, needed: float, what: str, remedy: str) -> None:
    """`DiskFull` unless `needed` bytes are free for `what`."""
    free = free_bytes(folder.path)
    if needed > free:
        raise DiskFull(
            f"{stage}: expected {human_bytes(needed)} free for {what}, found {human_bytes(free)};"
            f" use another disk, {remedy}"
        )


def require_room_for_s_test(run: Opened, rows: int, anew: bool) -> None:
    """Room for so many more rows of s_test, uncompressed, and for the state of an iteration.

    What is begun `anew` takes the place of what is there.
    """
    size = run.parameters.size
    itemsize = 8 if stored_dtype(run.parameters, run.task) == "float64" else 4
    together = min(rows, sides_at_once(run, run.options.resources.test_block_rows))
    state = STATE_VECTORS.get(run.options.stest.solver, 0) * together * size * solve_dtype(run).itemsize
    replaced = array_bytes(run.folder.records("stest").values()) if anew and run.folder.exists else 0
    require_room(
        run.folder, "stest", rows * (size * itemsize + BESIDE) + state - replaced, f"s_test of {rows:,} test samples",
        "fewer test samples (--test) or fewer parameters=",
    )  # fmt: skip


def require_room_for_influence(run: Opened, plan: Mapping[str, Any] | None) -> None:
    """Room for the matrix, or without one for what the rankings are made of; what is on the disk already counts.

    Nothing is asked of a stage that is done; its `plan` is None where it begins.
    """
    if plan is not None and len(run.folder.records("influence")) >= plan["n_rows"]:
        return
    n_test, n_train, options = len(run.task.test), len(run.task.train), run.options.influence
    kept = standing_bytes(n_test, n_train, options.top_k, options.top_k_train, 0)
    there = sum(allocated_bytes(run.folder.path / name) for name in (FINAL, PARTIAL, STATE))
    needed = 4 * n_test * n_train if options.matrix else kept
    what = f"the influences of {n_train:,} training on {n_test:,} test samples"
    require_room(run.folder, "influence", needed - there, what if options.matrix else f"the rankings of {what}",
                 "or --no-matrix" if options.matrix else "or shorter rankings (--top-k, --top-k-train)")  # fmt: skip
