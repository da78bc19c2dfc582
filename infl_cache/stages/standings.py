"""Rankings while the tiles of the matrix pass: what they need of it is kept, and never the matrix.

For each test and each training sample the strongest values so far are kept as integers: a value's float32 bits, made to
sort as the values do, above the 32 bits of the id. These order by value and then by id, so that the k lowest of
them are the ranking whatever comes first. A tile is first compared with the weakest value that each sample keeps; only
what beats it is sorted in. Sums are float64: means are the same for any tiles up to their rounding, rankings exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.matrix import Floats
from infl_cache.stages import rank

Ids = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]

# The class of a test sample that has none.
NO_CLASS = int(np.iinfo(np.int64).min)
# A place of a ranking that nothing has taken yet: after every value.
EMPTY = int(np.iinfo(np.int64).max)
ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1
# Pairs that are looked at together, so that they stay in the processor's cache, and columns of them at most.
PAIRS, COLUMNS = 1 << 20, 1 << 13
# Of samples without a full ranking, so many are looked at first: what they keep already spares most of the rest.
FIRST = 64


class Standings:
    """The rankings of a matrix (n_test, n_train) whose tiles come in any order, every pair exactly once.

    Args:
        k: length of the rankings of training samples: per test sample, per class of test samples, over all.
        k_train: length of the rankings of test samples, per training sample.
        sign: -1 where a positive influence is the helpful one.
        classes: the class of each test sample, (n_test,), `NO_CLASS` where it has none; None if none has.
        room: bytes that the sums per class may take, 12 n_train a class; `by_class` says whether they do.

    Ties are settled by the lower id. NaN is in no ranking, NaN and Inf are in no mean.
    """

    def __init__(
        self, n_test: int, n_train: int, k: int, k_train: int, sign: int, classes: Ids | None, room: int
    ) -> None:
        self.shape, self.k, self.k_train, self.sign = (n_test, n_train), min(k, n_train), min(k_train, n_test), sign
        labels = np.unique(classes[classes != NO_CLASS]) if classes is not None else np.empty(0, np.int64)
        self.has_classes = len(labels) > 0
        self.by_class = self.has_classes and 12 * (len(labels) + 1) * n_train <= room
        self.labels = labels if self.by_class else labels[:0]
        # The row of the sums that each test sample goes into; the last one is of those without a class.
        self._group = np.full(n_test, len(self.labels), np.int64)
        if self.by_class and classes is not None:
            with_class = classes != NO_CLASS
            self._group[with_class] = np.searchsorted(labels, classes[with_class])
        self._sums = np.zeros((len(self.labels) + 1, n_train))
        self._counts = np.zeros(self._sums.shape, np.int32)
        self._tests = {end: Strongest(n_test, self.k, end == "highest") for end in ("lowest", "highest")}
        self._trains = {end: Strongest(n_train, self.k_train, end == "highest") for end in ("lowest", "highest")}

    @property
    def n_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(array.nbytes for array in self.state().values())

    def add(self, tests: Ids, column: int, values: Floats) -> None:
        """A tile: influences (len(tests), width) on the test samples `tests`, of training samples from `column` on."""
        values = np.asarray(values, np.float32)
        for across in blocks(values.shape[1], COLUMNS):
            for down in blocks(len(tests), max(1, PAIRS // across.rows)):
                piece = values[down.start : down.stop, across.start : across.stop]
                asked, trains = tests[down.start : down.stop], np.arange(across.start, across.stop) + column
                self._add_sums(asked, slice(int(trains[0]), int(trains[-1]) + 1), piece)
                for end in ("lowest", "highest"):
                    self._tests[end].add(asked, trains, piece)
                    self._trains[end].add(trains, asked, piece.T)

    def _add_sums(self, tests: Ids, columns: slice, values: Floats) -> None:
        """One row after the other, as they come: the sum of a column does not depend on where tiles are cut."""
        finite, groups = np.isfinite(values), self._group[tests]
        if finite.all():
            for group, count in zip(*np.unique(groups, return_counts=True), strict=True):
                self._counts[group, columns] += np.int32(count)
        else:
            values = np.where(finite, values, np.float32(0))
            for group, row in zip(groups, finite, strict=True):
                self._counts[group, columns] += row
        for group, row in zip(groups, values, strict=True):
            self._sums[group, columns] += row

    def arrays(self) -> Arrays:
        """What `rankings.npz` holds: ids padded with -1, values padded with NaN, the strongest first.

        `helpful_*`, `harmful_*` (n_test, k); `train_helpful_*`, `train_harmful_*` (n_train, k_train), the ids those of
        test samples; `mean` (n_train,) over the test samples with `mean_helpful_*`, `mean_harmful_*`; and of the mean
        over each class of `class_labels` (C,) `class_helpful_*`, `class_harmful_*` (C, k).
        """
        mean = _mean(self._sums.sum(0), self._counts.sum(0))
        found: Arrays = {"mean": mean, "class_labels": self.labels}
        of_classes = [_mean(*each) for each in zip(self._sums[:-1], self._counts[:-1], strict=True)]
        for name, ends, ranking in (
            ("helpful", ("lowest", "highest"), rank.helpful),
            ("harmful", ("highest", "lowest"), rank.harmful),
        ):
            end = ends[0 if self.sign > 0 else 1]
            found[f"{name}_ids"], found[f"{name}_values"] = self._tests[end].ranking()
            found[f"train_{name}_ids"], found[f"train_{name}_values"] = self._trains[end].ranking()
            found[f"mean_{name}_ids"], found[f"mean_{name}_values"] = ranking(mean, self.k, self.sign)
            ids = found[f"class_{name}_ids"] = np.full((len(of_classes), self.k), -1, np.int64)
            values = found[f"class_{name}_values"] = np.full(ids.shape, np.nan, np.float32)
            for row, of_class in enumerate(of_classes):
                best = ranking(of_class, self.k, self.sign)
                ids[row, : len(best.ids)], values[row, : len(best.ids)] = best
        return found

    def state(self) -> Arrays:
        """What is kept, as plain arrays (not copied) from which `restore` goes on."""
        kept: Arrays = {f"test_{end}": each.codes for end, each in self._tests.items()}
        kept.update({f"train_{end}": each.codes for end, each in self._trains.items()})
        return {**kept, "labels": self.labels, "sums": self._sums, "counts": self._counts}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Take over a state, in place of what is kept: its classes may be some of these, its pairs any.

        Raises `ValueError` for the state of a matrix or of rankings of another shape, and of other classes.
        """
        own = self.state()
        wrong = [name for name in own if name not in state or state[name].shape[1:] != own[name].shape[1:]]
        wrong += [name for name in own if name.startswith("t") and name in state and len(state[name]) != len(own[name])]
        if wrong or not np.isin(state["labels"], self.labels).all():
            raise ValueError(f"expected the state of the same rankings, found another one ({wrong or 'labels'})")
        rows = [*np.searchsorted(self.labels, state["labels"]), len(self.labels)]
        for name in ("sums", "counts"):
            own[name][:] = 0
            own[name][rows] = state[name]
        for end in ("lowest", "highest"):
            self._tests[end].restore(state[f"test_{end}"])
            self._trains[end].restore(state[f"train_{end}"])


def standing_bytes(n_test: int, n_train: int, k: int, k_train: int, classes: int) -> int:
    """Bytes of the standings of such a matrix: both ends of the rankings, sums and counts.

    >>> standing_bytes(6, 9, 3, 2, 0) == Standings(6, 9, 3, 2, 1, None, 0).n_bytes
    True
    """
    ends = 16 * (n_test * min(k, n_train) + n_train * min(k_train, n_test))
    return ends + 12 * (classes + 1) * n_train + 8 * classes


class Strongest:
    """Of each of `n` samples the `k` lowest (or highest) values so far, with the ids that they belong to."""

    def __init__(self, n: int, k: int, highest: bool) -> None:
        self.codes = np.full((n, k), EMPTY, np.int64)
        self._direction = np.float32(-1 if highest else 1)
        self._reaches = np.greater_equal if highest else np.less_equal
        # The weakest value that each sample keeps, and its id: what comes later has to reach it.
        self._limit = np.full(n, self._direction * np.inf, np.float32)
        self._last = np.full(n, ID_MASK, np.int64)

    def add(self, samples: Ids, ids: Ids, values: Floats) -> None:
        """Values (len(samples), len(ids))."""
        parts = [Block(0, 0, len(ids))]
        if np.isinf(self._limit[samples]).any():
            parts = list(growing(len(ids), max(FIRST, 2 * self.codes.shape[1])))
        for part in parts:
            self._add(samples, ids[part.start : part.stop], values[:, part.start : part.stop])

    def _add(self, samples: Ids, ids: Ids, values: Floats) -> None:
        limit = self._limit[samples]
        # An equal value counts only with a lower id than that of the weakest.
        tighter = np.nextafter(limit, -self._direction * np.float32(np.inf))
        mask = self._reaches(values, np.where(ids.min() > self._last[samples], tighter, limit)[:, None])
        found = np.flatnonzero(mask.ravel(order="K"))
        if not len(found):
            return
        if len(found) > mask.size // 4:
            codes = np.where(mask, encoded(self._direction * values, ids), EMPTY)
            self._keep(samples, np.concatenate([self.codes[samples], codes], axis=1))
            return
        row, place = _sorted_by_row(found, mask)
        first = np.flatnonzero(np.diff(row, prepend=-1))
        counts = np.diff(first, append=len(row))
        touched, k = samples[row[first]], self.codes.shape[1]
        together = np.full((len(touched), k + int(counts.max())), EMPTY, np.int64)
        together[:, :k] = self.codes[touched]
        within = np.arange(len(row)) - np.repeat(first, counts)
        together[np.repeat(np.arange(len(touched)), counts), k + within] = encoded(
            self._direction * values[row, place], ids[place]
        )
        self._keep(touched, together)

    def _keep(self, samples: Ids, codes: Ids) -> None:
        """The k lowest of the codes (len(samples), at least k), in no order but that the weakest is the last."""
        k = self.codes.shape[1]
        codes.partition(k - 1, axis=1)
        self.codes[samples] = codes[:, :k]
        self._limit[samples], self._last[samples] = self._weakest(codes[:, k - 1])

    def _weakest(self, codes: Ids) -> tuple[Floats, Ids]:
        keys, ids = decoded(codes)
        return self._direction * np.where(codes == EMPTY, np.float32(np.inf), keys), ids

    def ranking(self) -> tuple[Ids, Floats]:
        """Ids and values (n, k), the strongest first, padded with -1 and NaN."""
        codes = np.sort(self.codes, axis=1)
        keys, ids = decoded(codes)
        empty = codes == EMPTY
        ids[empty], keys[empty] = -1, np.nan
        return ids, self._direction * keys

    def restore(self, codes: Ids) -> None:
        """Go on from `codes` of another one."""
        self.codes[:] = codes
        self._limit, self._last = self._weakest(self.codes.max(axis=1))


def encoded(keys: Floats, ids: Ids) -> Ids:
    """Integers that order as the keys do, equal keys as the ids: 0 <= id < 2^32.

    >>> codes = encoded(np.array([0.0, -2.0, 1.0, -0.0], np.float32), np.array([7, 3, 2, 5]))
    >>> np.argsort(codes).tolist(), decoded(codes)[1].tolist()
    ([1, 3, 0, 2], [7, 3, 2, 5])
    """
    bits = (keys + np.float32(0)).view(np.int32)  # -0 is 0
    coded: Ids = (_mirrored(bits).astype(np.int64) << ID_BITS) | ids
    return coded


def decoded(codes: Ids) -> tuple[Floats, Ids]:
    """Keys and ids of some codes."""
    return _mirrored((codes >> ID_BITS).astype(np.int32)).view(np.float32), codes & ID_MASK


def _mirrored(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The bits of negative floats the other way round, as integers sort them; its own inverse."""
    found: NDArray[np.int32] = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return found


def _sorted_by_row(found: Ids, mask: NDArray[np.bool_]) -> tuple[Ids, Ids]:
    """Row and column of places in the memory of `mask`, which may lie in either order, row by row."""
    if mask.flags.c_contiguous:
        row, place = np.divmod(found, mask.shape[1])
        return row, place
    place, row = np.divmod(found, mask.shape[0])
    # Short integers are sorted by counting.
    order = np.argsort(row.astype(np.uint16) if mask.shape[0] <= 1 << 16 else row, kind="stable")
    return row[order], place[order]


def growing(n: int, first: int) -> Iterator[Block]:
    """0 to n - 1 in parts, each as long as all before it.

    >>> [(part.start, part.stop) for part in growing(9, 2)]
    [(0, 2), (2, 4), (4, 8), (8, 9)]
    """
    start, index = 0, 0
    while start < n:
        stop = min(n, start + max(first, start))
        yield Block(index, start, stop)
        start, index = stop, index + 1


def _mean(total: NDArray[np.float64], count: NDArray[Any]) -> Floats:
    found: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    return found
