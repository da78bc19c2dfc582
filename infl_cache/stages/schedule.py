r"""In which order stage 3 reads its two stores, so that the fewest bytes move; reckoned on plain integers.

There are M test samples with s bytes of s_test each and n training samples with g bytes of stored gradients each. A
part R of the memory budget holds s_test, a part A the accumulator: the tile of the matrix that is being summed up, a
bytes a number. Two orders are possible:

1. *s_test stays.* `m = min(R / s, A / (a w))` rows of s_test stay in memory while all gradients pass by once, w
   columns of the matrix after the others. Read are :math:`M s + \lceil M / m \rceil\, n g` bytes: s_test once, the
   gradients once for each tile of test samples. As soon as R holds all of s_test no order can read less.
2. *The accumulator stays.* A tile of m rows and w columns, `a m w <= A`, stays in memory while the parameters
   stream by in slabs: of each slab its columns of the m rows of s_test, at most R bytes, and then its part of the w
   gradients. Read are :math:`\lceil n / w \rceil M s + \lceil M / m \rceil\, n g`: where one tile holds the whole
   matrix, each store once, however many parameters there are. If none does, `w = A / (a m)` and the sum is least
   near :math:`m = \sqrt{A g / (a s)}`; all whole numbers of tiles are tried.

A slab is one factored layer or several, or a run of plain columns. The plain columns are cut to fit R; the factors of a
layer cannot be cut, so that a layer u of s_u bytes a test sample with `m s_u > R` reads its gradients `ceil(m s_u / R)`
times, for some of the m rows after the others. What is read is whole chunks: each slab after the first is reckoned to
read one chunk of s_test once more, and one of plain rows where it is narrower than these. Test tiles are outermost in
both orders. Which is chosen, and how large its tiles are, is written down in the plan of the stage: a run that is
carried on with another `--memory` keeps its order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from infl_cache.disk.layout import blocks
from infl_cache.maths.parts import Part, joined, units_of


@dataclass(frozen=True)
class Unit:
    """What is read together: bytes of s_test a test sample, of gradients a training sample.

    What can be cut is stored in chunks that belong to `chunk` bytes of a test sample; 0 if it cannot.
    """

    test_bytes: int
    train_bytes: int
    chunk: int = 0


@dataclass(frozen=True)
class Stores:
    """Both stores: the units, and bytes of a test sample in one chunk of s_test."""

    units: tuple[Unit, ...]
    test_chunk: int

    @property
    def test_bytes(self) -> int:
        """Of a test sample."""
        return sum(unit.test_bytes for unit in self.units)

    @property
    def train_bytes(self) -> int:
        """Of a training sample."""
        return sum(unit.train_bytes for unit in self.units)


@dataclass(frozen=True)
class Order:
    """Tiles of `rows` test samples by `columns` training samples; slabs of `slab_bytes`, 0 for one with everything."""

    rows: int
    columns: int
    slab_bytes: int
    n_bytes: int


@dataclass(frozen=True)
class Room:
    """Bytes for s_test and for the accumulator, and those of a number in it."""

    s_test: int
    accumulator: int
    number: int = 4


@dataclass(frozen=True)
class Slab:
    """A part of the parameters, for the rows `start <= row < stop` of a tile."""

    part: Part
    start: int
    stop: int


def best_order(n_test: int, n_train: int, stores: Stores, room: Room, columns: int) -> Order:
    """The order that moves the fewest bytes; its tiles have some times `columns` training samples, or all of them.

    >>> stores = Stores((Unit(400, 40),) * 10, test_chunk=400)
    >>> best_order(100, 1000, stores, Room(10**6, 10**6), 50)  # all of s_test fits
    Order(rows=100, columns=50, slab_bytes=0, n_bytes=800000)
    >>> best_order(100, 1000, stores, Room(10**5, 10**6), 50)  # only the matrix does
    Order(rows=100, columns=1000, slab_bytes=100000, n_bytes=960000)
    """
    columns = min(columns, n_train)
    staying = order_of_rows(n_test, n_train, stores, room, columns)
    found = [staying]
    for rows in sorted({-(-n_test // tiles) for tiles in range(1, n_test + 1)}):
        wide = room.accumulator // (room.number * rows)
        wide = n_train if wide >= n_train else wide - wide % columns
        if wide:
            found.append(Order(rows, wide, room.s_test, slab_bytes_moved(n_test, n_train, stores, room, rows, wide)))
    return min(found, key=lambda order: (order.n_bytes, order.slab_bytes, -order.rows))


def order_of_rows(n_test: int, n_train: int, stores: Stores, room: Room, columns: int) -> Order:
    """The order in which rows of s_test stay."""
    s, g = stores.test_bytes, stores.train_bytes
    rows = max(1, min(n_test, room.s_test // s, room.accumulator // (room.number * columns)))
    return Order(rows, columns, 0, n_test * s + -(-n_test // rows) * n_train * g)


def most_rows(order: Order, test_bytes: int, room: Room) -> int:
    """Rows of a tile as wide as those of `order` that the room has place for: of test samples that come later."""
    fitting = room.accumulator // (room.number * order.columns)
    if not order.slab_bytes:
        fitting = min(fitting, room.s_test // test_bytes)
    return max(order.rows, fitting)


def slab_bytes_moved(n_test: int, n_train: int, stores: Stores, room: Room, rows: int, columns: int) -> int:
    """Bytes that are read if a tile of `rows` by `columns` stays."""
    limit, count, group, g = max(1, room.s_test // rows), 0, 0, 0
    for unit in stores.units:  # as `slabs` cuts them
        if group and group + unit.test_bytes > limit:
            count, group = count + 1, 0
        g += unit.train_bytes
        if unit.test_bytes <= limit:
            group += unit.test_bytes
        elif not unit.chunk:
            count += 1
            g += unit.train_bytes * (-(-rows // max(1, room.s_test // unit.test_bytes)) - 1)
        else:
            width = limit - limit % unit.chunk or limit
            pieces, chunks = -(-unit.test_bytes // width), -(-unit.test_bytes // unit.chunk)
            count += pieces
            g += unit.train_bytes * (pieces - 1) // chunks if width % unit.chunk else 0
    count += group > 0
    s = stores.test_bytes
    s += s * (count - 1) // -(-s // stores.test_chunk)
    return -(-n_train // columns) * n_test * s + -(-n_test // rows) * n_train * g


def slabs(part: Part, rows: int, itemsize: int, slab_bytes: int, chunk_columns: int = 1) -> Iterator[Slab]:
    """The slabs of a tile of `rows` test samples, of at most `slab_bytes` of s_test where the parameters allow it.

    Together they are `part`: all parameters, or some. Runs of plain columns are whole chunks of `chunk_columns` where
    these are small enough and the part begins with one.
    """
    if not slab_bytes:
        yield Slab(part, 0, rows)
        return
    limit, group = max(1, slab_bytes // (rows * itemsize)), list[Part]()
    for unit in units_of(part):
        if group and sum(each.size for each in group) + unit.size > limit:
            yield Slab(joined(group), 0, rows)
            group = []
        if unit.size <= limit:
            group.append(unit)
        elif unit.names:
            for block in blocks(rows, max(1, slab_bytes // (unit.size * itemsize))):
                yield Slab(unit, block.start, block.stop)
        else:
            width = limit - limit % chunk_columns or limit
            for block in blocks(unit.size, width):
                start, stop = unit.start + block.start, unit.start + block.stop
                yield Slab(Part(part.forms, (), start, stop), 0, rows)
    if group:
        yield Slab(joined(group), 0, rows)
