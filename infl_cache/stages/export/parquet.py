"""A long table in Parquet, the only door to pyarrow: a row for each pair, written a million pairs at a time.

`test_id`, `train_id`, `rank`, `effect`, `influence`, `loss_change_if_removed`, `test_label`, `train_label`. `effect` is
"helpful" or "harmful" as the sign of the influence says (of a margin or logit the other way round), `rank` counts from
the strongest of that effect on that test sample, 1; a sample that does neither has null in both. The schema's metadata
say what the numbers mean (`facts_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from infl_cache.errors import BadInput
from infl_cache.stages import rank
from infl_cache.stages.columns import classes_of
from infl_cache.stages.export.text import COLUMNS, End, Row
from infl_cache.stages.standings import NO_CLASS

# Pairs that are held and written together.
PAIRS = 1 << 20
EFFECTS = tuple(rank.ENDS)
# The code of a sample that neither helps nor harms.
NEITHER = -1


class Labels(NamedTuple):
    """The target of each test and of each training sample, NaN where there is none."""

    test: NDArray[np.float64]
    train: NDArray[np.float64]


class Pairs(NamedTuple):
    """Some rows of the table as columns; effects are places in `EFFECTS` or `NEITHER`."""

    test_id: NDArray[np.int64]
    train_id: NDArray[np.int64]
    rank: NDArray[np.int64]
    effect: NDArray[np.int8]
    influence: NDArray[np.float32]


def require_pyarrow() -> Any:
    """The modules `pyarrow` and `pyarrow.parquet`; `BadInput` that names the extra where they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BadInput("format parquet: expected pyarrow, found none; pip install 'infl_cache[parquet]'") from error
    return pyarrow


def write_ends(file: IO[bytes], ends: Iterable[End], labels: Labels, facts: Mapping[str, object]) -> None:
    """The strongest of either end of each test sample."""

    def pairs() -> Iterator[Pairs]:
        for test, name, (ids, values) in ends:
            effect = np.full(len(ids), EFFECTS.index(name), np.int8)
            yield Pairs(np.full(len(ids), test), ids, np.arange(1, len(ids) + 1), effect, values)

    _write(file, pairs(), labels, facts)


def write_all(file: IO[bytes], rows: Iterable[Row], labels: Labels, sign: int, facts: Mapping[str, object]) -> None:
    """Every pair, in the order of the matrix; what is not finite is null."""

    def pairs() -> Iterator[Pairs]:
        for test, row in rows:
            places, effect = ranks(row, sign), effects(row, sign)
            for start in range(0, len(row), PAIRS):
                part = slice(start, min(start + PAIRS, len(row)))
                ids = np.arange(part.start, part.stop)
                yield Pairs(np.full(len(ids), test), ids, places[part], effect[part], row[part])

    _write(file, pairs(), labels, facts)


def effects(values: NDArray[np.float32], sign: int) -> NDArray[np.int8]:
    """The place in `EFFECTS` of each influence, `NEITHER` of what is zero or not finite.

    >>> effects(np.array([-1, 2, 0, np.nan], np.float32), 1).tolist(), EFFECTS
    ([0, 1, -1, -1], ('helpful', 'harmful'))
    """
    keys = np.where(np.isfinite(values), sign * values, 0)
    return np.where(keys < 0, 0, np.where(keys > 0, 1, NEITHER)).astype(np.int8)


def ranks(row: NDArray[np.float32], sign: int) -> NDArray[np.int64]:
    """The rank of each training sample among those of its effect, the strongest 1, ties by lower id; 0 for neither.

    >>> ranks(np.array([-1, 3, -2, 0, np.nan, 3, -1], np.float32), 1).tolist()
    [2, 1, 1, 0, 0, 2, 3]
    """
    found, keys, kinds = np.zeros(len(row), np.int64), -np.abs(row), effects(row, sign)
    for effect in range(len(EFFECTS)):
        ids = np.flatnonzero(kinds == effect)
        found[ids[np.argsort(keys[ids], kind="stable")]] = np.arange(1, len(ids) + 1)
    return found


def _write(file: IO[bytes], pairs: Iterable[Pairs], labels: Labels, facts: Mapping[str, object]) -> None:
    arrow = require_pyarrow()
    test_labels, train_labels = (_as_stored(arrow, each) for each in labels)
    kinds = [
        arrow.int64(), arrow.int64(), arrow.int64(), arrow.dictionary(arrow.int8(), arrow.string()), arrow.float32(),
        arrow.float32(), test_labels.type, train_labels.type,
    ]  # fmt: skip
    metadata = {name: str(value) for name, value in facts.items()}
    schema = arrow.schema(list(zip(COLUMNS, kinds, strict=True)), metadata=metadata)
    with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in _gathered(pairs):
            writer.write_table(_table(arrow, schema, group, test_labels, train_labels), row_group_size=len(group.rank))


def _gathered(pairs: Iterable[Pairs]) -> Iterator[Pairs]:
    """The same rows, about `PAIRS` of them together; none at all make one empty table."""
    kept: list[Pairs] = []
    count, some = 0, False
    for each in pairs:
        kept.append(each)
        count += len(each.rank)
        if count >= PAIRS:
            yield Pairs(*map(np.concatenate, zip(*kept, strict=True)))
            kept, count, some = [], 0, True
    if count or (kept and not some):
        yield Pairs(*map(np.concatenate, zip(*kept, strict=True)))


def _table(arrow: Any, schema: Any, group: Pairs, test_labels: Any, train_labels: Any) -> Any:
    """A group of rows as an Arrow table: null where there is no effect and no number."""
    neither = group.effect == NEITHER
    unknown = ~np.isfinite(group.influence)
    codes = arrow.array(group.effect, arrow.int8(), mask=neither)
    columns = [
        group.test_id,
        group.train_id,
        arrow.array(group.rank, mask=neither),
        arrow.DictionaryArray.from_arrays(codes, arrow.array(EFFECTS, arrow.string())),
        arrow.array(group.influence, mask=unknown),
        arrow.array(-group.influence, mask=unknown),
        test_labels.take(arrow.array(group.test_id)),
        train_labels.take(arrow.array(group.train_id)),
    ]
    return arrow.table(dict(zip(COLUMNS, columns, strict=True)), schema=schema)


def _as_stored(arrow: Any, labels: NDArray[np.float64]) -> Any:
    """Labels as integers where all that are known are, else as numbers; null where there is none."""
    classes = classes_of(labels)
    if classes is None:
        return arrow.array(labels, arrow.float64(), mask=~np.isfinite(labels))
    return arrow.array(classes, arrow.int64(), mask=classes == NO_CLASS)
