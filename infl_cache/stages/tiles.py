"""The tiles of the influence matrix: which rows and columns each holds, and whether they are what was committed.

The unit of work and of commit is a tile: some rows of the s_test store by a run of training blocks. Its values lie in
`influence.npy` at the rows of the test samples that these rows belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.ledger import BlockRecord
from infl_cache.disk.matrix import MatrixFile, checksum
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import DamagedStore, IncompleteStore
from infl_cache.maths.measures import HIGHER_IS_BETTER
from infl_cache.stages.blocks import some
from infl_cache.stages.selection import count_of_tests

FINAL, PARTIAL = "influence.npy", "influence.partial.npy"


@dataclass(frozen=True)
class Tile:
    """Rows `test` by the columns of the training blocks `train`: tile `index` of the matrix."""

    index: int
    test: Block
    train: tuple[Block, ...]

    @property
    def columns(self) -> slice:
        """The tile's columns in the matrix."""
        return slice(self.train[0].start, self.train[-1].stop)

    @property
    def width(self) -> int:
        """How many columns."""
        return self.train[-1].stop - self.train[0].start


def all_tiles(tests: Iterable[Block], train: Sequence[Block], tile_blocks: int) -> list[Tile]:
    """The tiles of a matrix in the order they are computed: every entry in exactly one."""
    groups = [tuple(train[i : i + tile_blocks]) for i in range(0, len(train), tile_blocks)]
    pairs = [(test, group) for test in tests for group in groups]
    return [Tile(index, test, group) for index, (test, group) in enumerate(pairs)]


def uncovered(folder: RunFolder, covered: int, tile_rows: int) -> list[list[int]]:
    """Rows `[start, stop]` of the s_test store from `covered` on, in tiles of at most `tile_rows` test samples.

    Rows between two spans may lie inside a tile and count for nothing: samples that came one by one share a pass.
    """
    rows = np.flatnonzero(folder.samples("stest") >= 0)
    rows = rows[rows >= covered]
    groups = [rows[each.start : each.stop] for each in blocks(len(rows), tile_rows)]
    return [[int(group[0]), int(group[-1]) + 1] for group in groups]


def tested(samples: NDArray[np.int64], rows: Block) -> NDArray[np.int64]:
    """The test samples of some rows of the s_test store, those between two spans left out."""
    found = samples[rows.start : rows.stop]
    return found[found >= 0]


def tile_rows_of(folder: RunFolder) -> list[list[int]]:
    """Rows `[start, stop]` of the s_test store of each row of tiles, as planned."""
    plan = folder.plan("influence")
    found: list[list[int]] = plan.get("tests") or [
        [block.start, block.stop] for block in blocks(folder.plan("stest")["n_rows"], plan["tile_rows"])
    ]
    return found


def planned_tiles(folder: RunFolder) -> list[Tile]:
    """The tiles of a run's matrix as the stage was begun and extended."""
    tests = [Block(index, start, stop) for index, (start, stop) in enumerate(tile_rows_of(folder))]
    return all_tiles(tests, folder.stage_blocks("grads"), folder.plan("influence")["tile_blocks"])


def matrix_tests(folder: RunFolder) -> NDArray[np.int64]:
    """The test samples that the matrix holds rows of, in ascending order."""
    samples = folder.samples("stest")
    return np.sort(np.concatenate([tested(samples, Block(0, start, stop)) for start, stop in tile_rows_of(folder)]))


def solved(folder: RunFolder) -> tuple[NDArray[np.int64], dict[str, NDArray[np.generic]]]:
    """The test samples whose s_test is done, and residual, iterations and convergence of each."""
    store, samples, done = folder.store("stest"), folder.samples("stest"), folder.records("stest")
    ready = [block for block in folder.stage_blocks("stest") if block.index in done]
    for block in ready:
        folder.check_block(done[block.index])
    parts = [store.read_block(block, ["residual", "iterations", "converged"]) for block in ready]
    tests = np.concatenate([samples[block.start : block.stop] for block in ready])
    return tests, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def sign_of(folder: RunFolder) -> int:
    """-1 where a positive influence is the helpful one, because what is explained is better when higher."""
    return -1 if folder.plan("stest").get("measure") in HIGHER_IS_BETTER else 1


def checked_tiles(folder: RunFolder, tiles: Sequence[Tile]) -> dict[int, BlockRecord]:
    """The committed tiles, each compared with its checksum; `DamagedStore` names rows and columns otherwise."""
    return check_tiles(folder, "influence", tiles, "run infl-cache influence --force")


def check_tiles(
    folder: RunFolder, stage: str, tiles: Sequence[Tile], remedy: str, layers: Sequence[str] = ()
) -> dict[int, BlockRecord]:
    """The committed tiles of a stage's matrix, each compared with its checksum.

    With `layers` it has a matrix for each of them, one after the other, and a block for each tile of each: `in_layer`.
    Raises `DamagedStore` that names file, rows and columns, with the remedy.
    """
    records, remedy = folder.records(stage), f"infl-cache verify {folder.path} --repair makes them again, or {remedy}"
    if not records:
        return {}
    try:
        opened = open_matrix(folder, stage, len(layers))
    except DamagedStore as error:
        raise DamagedStore(f"{error}; {remedy}") from error
    with closing(opened) as matrix:
        for each in committed_tiles(folder, stage, tiles, layers):
            values = matrix.read_rows(each.rows, each.columns.start, each.columns.stop - each.columns.start)
            if checksum(values) != each.crc:
                raise DamagedStore(f"{matrix.path}: {each.words} are not what was committed; {remedy}")
    return records


def open_matrix(folder: RunFolder, stage: str, n_layers: int) -> MatrixFile:
    """The matrix of a stage, finished or not; `DamagedStore` if there is none of its shape."""
    final, partial = (folder.path / name for name in OUTPUTS[stage][:2])
    path = final if final.exists() else partial
    if not path.exists():
        raise DamagedStore(f"{final}: expected a matrix, found no file")
    matrix = MatrixFile(path, leading=(n_layers,) if n_layers else ())
    expected = (max(1, n_layers) * count_of_tests(folder), int(folder.plan("grads")["n_rows"]))
    if matrix.shape != expected:
        matrix.close()
        raise DamagedStore(f"{path}: expected {expected} numbers, found {matrix.shape}")
    return matrix


@dataclass(frozen=True)
class CommittedTile:
    """Where in the matrix block `block` of its stage lies, its checksum, and how to speak of it."""

    block: int
    rows: NDArray[np.int64]
    columns: slice
    crc: int
    words: str

    @property
    def n_bytes(self) -> int:
        """Size of its numbers."""
        return 4 * len(self.rows) * int(self.columns.stop - self.columns.start)


def committed_tiles(
    folder: RunFolder, stage: str, tiles: Sequence[Tile], layers: Sequence[str] = ()
) -> Iterator[CommittedTile]:
    """What the ledger calls done of a stage's matrix, or of its matrices one after the other."""
    records, samples, n_test = folder.records(stage), folder.samples("stest"), count_of_tests(folder)
    for tile in tiles:
        rows = tested(samples, tile.test)
        at = f"test rows {_words(rows)}, train columns {tile.columns.start} to {tile.columns.stop - 1}"
        for layer in range(max(1, len(layers))):
            index = in_layer(tile, layer, len(layers)) if layers else tile.index
            if index in records:
                whose = f"layer {layers[layer]!r}, " if layers else ""
                crc = records[index].files[0].crc if records[index].files else -1
                yield CommittedTile(index, layer * n_test + rows, tile.columns, crc, whose + at)


def in_layer(tile: Tile, layer: int, n_layers: int) -> int:
    """The number of a tile's block among those of all layers: it stays when tiles are added.

    >>> [in_layer(Tile(tile, Block(0, 0, 1), ()), layer, 2) for tile in range(2) for layer in range(2)]
    [0, 1, 2, 3]
    """
    return tile.index * n_layers + layer


def require_sound_matrix(folder: RunFolder) -> None:
    """Raise unless `influence.npy` is finished and, byte for byte, what was committed."""
    folder.require_complete("influence")
    checked_tiles(folder, planned_tiles(folder))
    if not (folder.path / FINAL).exists():
        raise IncompleteStore(f"{folder.path / FINAL}: expected a finished matrix, found none; run influence")


def _words(rows: NDArray[np.int64]) -> str:
    following = np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows)))
    return f"{rows[0]} to {rows[-1]}" if following else some(rows.tolist())
