r"""A symmetric positive definite matrix in square tiles of its lower half: filled, factorised and solved with.

The factorisation looks to the left: `L_ij = (K_ij - sum_{k<j} L_ik L_jk^T) L_jj^{-T}` reads finished tiles of the
factor and one tile of the matrix, so each tile is written twice in its life, once as `gram` and once as `factor`, and
what a kill leaves is carried on from the tiles that are there. No more than a row of tiles is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

import torch
from torch import Tensor

from infl_cache.maths.curvature.jacobian import Jacobian

Kind = Literal["gram", "factor"]
TILE = 2048
SMALLEST_TILE = 256
# Samples held at once, whatever memory there is.
SMALLEST_PANEL = 16

# An inner product of all rows of one Jacobian with all of another, float64.
Product = Callable[[Jacobian, Jacobian], Tensor]


class Tiles(Protocol):
    """Where tiles of `side` rows are kept, by kind, row and column of tiles; on a disk they survive a kill."""

    @property
    def side(self) -> int:
        """Rows of a tile, fewer in the last row of tiles."""
        ...

    def has(self, kind: Kind, i: int, j: int) -> bool:
        """Whether that tile is there."""
        ...

    def get(self, kind: Kind, i: int, j: int) -> Tensor:
        """That tile, float64, not to be written into."""
        ...

    def put(self, kind: Kind, i: int, j: int, tile: Tensor) -> None:
        """Keep a tile. A tile of the factor takes the place of the matrix's."""
        ...


class InMemory:
    """Tiles that are lost with the process."""

    def __init__(self, side: int) -> None:
        self.side = side
        self._tiles: dict[tuple[int, int], tuple[Kind, Tensor]] = {}

    def has(self, kind: Kind, i: int, j: int) -> bool:
        """Whether that tile is there."""
        return (i, j) in self._tiles and self._tiles[i, j][0] == kind

    def get(self, kind: Kind, i: int, j: int) -> Tensor:
        """That tile."""
        found, tile = self._tiles[i, j]
        if found != kind:
            raise KeyError((kind, i, j))
        return tile

    def put(self, kind: Kind, i: int, j: int, tile: Tensor) -> None:
        """Keep a tile."""
        self._tiles[i, j] = (kind, tile)


def tile_side(n: int, panel: int, memory: int | None) -> int:
    """Rows of a tile for a matrix of n rows: a row of tiles is held in a quarter of `memory`, its samples are a panel.

    >>> tile_side(50_000, 50_000, 2 * 10**9), tile_side(50_000, 300, 2 * 10**9), tile_side(100, 100, None)
    (1250, 300, 100)
    """
    fitting = TILE if memory is None else min(TILE, memory // 4 // (8 * max(1, n)))
    return max(1, min(n, max(SMALLEST_TILE, fitting), max(SMALLEST_PANEL, panel)))


def count(n: int, side: int) -> int:
    """Tiles in a row."""
    return -(-n // side)


def matrix_bytes(n: int, side: int) -> int:
    """Bytes of all tiles.

    >>> matrix_bytes(10, 4)  # 4 x 4, 4 x 4, 4 x 4, 2 x 4, 2 x 4, 2 x 2
    544
    """
    rows = [min(side, n - start) for start in range(0, n, side)]
    return 8 * sum(height * sum(rows[: i + 1]) for i, height in enumerate(rows))


def all_and_there(tiles: Tiles, n: int) -> tuple[int, int]:
    """How often a tile is put from the beginning to the end, and how often it has been."""
    pairs = [(i, j) for i in range(count(n, tiles.side)) for j in range(i + 1)]
    return 2 * len(pairs), sum(2 * tiles.has("factor", i, j) or int(tiles.has("gram", i, j)) for i, j in pairs)


def fill(
    tiles: Tiles, n: int, passes: Callable[[], Iterable[Jacobian]], product: Product, panel_rows: int,
    done: Callable[[], None],
) -> None:  # fmt: skip
    """Put the `gram` tiles that are not there in any kind; `done()` is called after each.

    A panel of at least one row of tiles, `panel_rows` samples if that is more, is held in memory while the samples
    before it pass by: the samples are read once or twice a panel.
    """
    number = count(n, tiles.side)
    missing = {
        (i, j) for i in range(number) for j in range(i + 1)
        if not tiles.has("gram", i, j) and not tiles.has("factor", i, j)
    }  # fmt: skip
    height, whole = max(1, panel_rows // tiles.side), True
    for first in range(0, number, height):
        rows = range(first, min(first + height, number))
        columns = sorted({j for i, j in missing if i in rows})
        if columns:
            _fill_panel(tiles, rows, columns, missing, _cut(passes, tiles.side), product, done, whole)
            whole = False


def _fill_panel(
    tiles: Tiles, rows: range, columns: list[int], missing: set[tuple[int, int]],
    cut: Callable[[], Iterator[tuple[int, Jacobian]]], product: Product, done: Callable[[], None], whole: bool,
) -> None:  # fmt: skip
    panel: dict[int, list[Jacobian]] = {i: [] for i in rows}
    for tile, piece in cut():
        if tile >= rows.stop and not whole:  # the first pass may be kept in memory by whoever makes it, if it is whole
            break
        if tile in panel:
            panel[tile].append(piece)
    before = [j for j in columns if j < rows.start]
    streamed = _gathered(cut(), before[-1]) if before else iter(())
    held = ((j, panel[j]) for j in columns if j in panel)
    for j, pieces in (each for part in (streamed, held) for each in part):
        for i in rows:
            if (i, j) in missing:
                tiles.put("gram", i, j, _tile(panel[i], pieces, product, i == j))
                done()


def _cut(passes: Callable[[], Iterable[Jacobian]], side: int) -> Callable[[], Iterator[tuple[int, Jacobian]]]:
    """Passes in pieces that belong to one tile each, with its number."""

    def cut() -> Iterator[tuple[int, Jacobian]]:
        at = 0
        for jacobian in passes():
            start = 0
            while start < jacobian.size:
                stop = min(jacobian.size, start + side - at % side)
                yield at // side, part_of(jacobian, start, stop)
                at, start = at + stop - start, stop

    return cut


def part_of(jacobian: Jacobian, start: int, stop: int) -> Jacobian:
    """Samples `start` to `stop - 1`."""
    if (start, stop) == (0, jacobian.size):
        return jacobian
    at = slice(start, stop)
    hessian = None if jacobian.hessian is None else jacobian.hessian[at]
    return Jacobian({key: (a[at], g[at]) for key, (a, g) in jacobian.factors.items()}, jacobian.dense[at], hessian)


def _gathered(pieces: Iterator[tuple[int, Jacobian]], last: int) -> Iterator[tuple[int, list[Jacobian]]]:
    """The pieces of each tile up to number `last` together."""
    held: list[Jacobian] = []
    number = 0
    for tile, piece in pieces:
        if tile != number:
            yield number, held
            held, number = [], tile
        if tile > last:
            return
        held.append(piece)
    yield number, held


def _tile(rows: list[Jacobian], columns: list[Jacobian], product: Product, diagonal: bool) -> Tensor:
    """One tile from the pieces of its rows and columns; of one on the diagonal only what is below it counts."""
    heights, widths = [each.size for each in rows], [each.size for each in columns]
    tile = torch.zeros(sum(heights), sum(widths), dtype=torch.float64, device=rows[0].dense.device)
    for a, (into, piece) in enumerate(zip(torch.split(tile, heights), rows, strict=True)):
        for b, (place, other) in enumerate(zip(torch.split(into, widths, dim=1), columns, strict=True)):
            if not diagonal or b <= a:
                place.copy_(product(piece, other))
    return tile


def factorise(tiles: Tiles, n: int, shift: float, done: Callable[[], None]) -> bool:
    """Turn the tiles of K into those of L with `L L^T = K + shift I`; False if that is not positive definite."""
    number = count(n, tiles.side)
    for j in range(number):
        left = [tiles.get("factor", j, k) for k in range(j)]
        diagonal: Tensor | None = None
        for i in range(j, number):
            if tiles.has("factor", i, j):
                continue
            tile = tiles.get("gram", i, j).clone()
            for k in range(j):
                tile.addmm_(left[k] if i == j else tiles.get("factor", i, k), left[k].T, alpha=-1)
            if i == j:
                tile.diagonal().add_(shift)
                tile, failed = torch.linalg.cholesky_ex(tile)
                if int(failed) or not bool(torch.isfinite(tile).all()):
                    return False
            else:
                diagonal = tiles.get("factor", j, j) if diagonal is None else diagonal
                tile = torch.linalg.solve_triangular(diagonal.T, tile, upper=True, left=False)
            tiles.put("factor", i, j, tile.contiguous())  # the same bits follow whether it comes from a disk or not
            done()
    return True


def forward(tiles: Tiles, right: Tensor, done: Callable[[], None]) -> list[Tensor]:
    """`L^-1 u` for each row u of `right` (K, n), float64, as pieces (rows of a tile, K); each tile is read once."""
    parts = [part.T.contiguous() for part in torch.split(right.double(), tiles.side, dim=1)]
    for i in range(len(parts)):
        for j in range(i):
            parts[i].addmm_(tiles.get("factor", i, j), parts[j], alpha=-1)
            done()
        parts[i] = torch.linalg.solve_triangular(tiles.get("factor", i, i), parts[i], upper=False)
        done()
    return parts


def solved(tiles: Tiles, right: Tensor, done: Callable[[], None]) -> Tensor:
    """`(L L^T)^-1 u` for each row u of `right` (K, n), float64; each tile of the factor is read twice."""
    parts = forward(tiles, right, done)
    for i in reversed(range(len(parts))):
        parts[i] = torch.linalg.solve_triangular(tiles.get("factor", i, i).T, parts[i], upper=True)
        done()
        for j in range(i):
            parts[j].addmm_(tiles.get("factor", i, j).T, parts[i], alpha=-1)
            done()
    return torch.cat(parts).T.contiguous()
