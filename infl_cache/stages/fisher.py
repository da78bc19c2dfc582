"""What the solver `fisher` gets from the run: tiles in its folder where the matrix is too large for the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infl_cache.disk.tiles import FOLDER, TileFolder
from infl_cache.maths.digest import digest_of
from infl_cache.maths.solvers import Solver
from infl_cache.maths.solvers.fisher import Fisher, require_shift
from infl_cache.maths.tiled import Kind, Tiles, matrix_bytes
from infl_cache.progress import human_bytes
from infl_cache.stages.opening import Opened, log
from infl_cache.stages.spectrum import known_damping, needs_spectrum
from infl_cache.stages.system import solve_dtype

KINDS: tuple[Kind, ...] = ("gram", "factor")


class _OnDisk:
    """Tiles of a matrix of n rows as float64 tensors on the run's device."""

    def __init__(self, files: TileFolder, n: int, device: torch.device) -> None:
        self.side, self._files, self._n, self._device = files.side, files, n, device

    def has(self, kind: Kind, i: int, j: int) -> bool:
        """Whether that tile is there."""
        return self._files.has(kind, i, j)

    def get(self, kind: Kind, i: int, j: int) -> Tensor:
        """That tile."""
        height, width = (min(self.side, self._n - each * self.side) for each in (i, j))
        return torch.from_numpy(self._files.get(kind, i, j)).view(height, width).to(self._device)

    def put(self, kind: Kind, i: int, j: int, tile: Tensor) -> None:
        """Write a tile."""
        self._files.put(kind, i, j, tile.cpu().numpy())


def check_damping(run: Opened) -> None:
    """`BadInput` for a system that `fisher` cannot solve, before anything is written."""
    if run.options.stest.solver == "fisher" and not needs_spectrum(run.options.stest):
        require_shift(run.task.weight_decay + known_damping(run))


def with_tiles(run: Opened, solver: Solver, rows: Sequence[int], shift: float) -> Solver:
    """The solver with a place for its tiles, if it is `fisher`; they belong to gradients, samples and shift."""
    if not isinstance(solver, Fisher):
        return solver
    facts = [run.folder.fingerprint("grads"), list(rows), shift, str(solve_dtype(run))]
    return replace(solver, keep=_keeper(run, digest_of(facts)), show=run.options.resources.progress)


def _keeper(run: Opened, identity: str) -> Callable[[int, int], Tiles]:
    def keep(n: int, side: int) -> Tiles:
        files = TileFolder(run.folder.path / FOLDER, identity, side, KINDS)
        needed = matrix_bytes(n, files.side)
        files.require_room(needed)
        log.warning(f"the Gram matrix of {n:,} samples takes {human_bytes(needed)} of the disk, in {FOLDER}")
        return _OnDisk(files, n, run.device)

    return keep
