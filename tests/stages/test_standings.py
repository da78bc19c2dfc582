"""Rankings made tile by tile equal those of the whole matrix, whatever the tiles and their order."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infl_cache.stages import rank, standings
from infl_cache.stages.standings import EMPTY, NO_CLASS, Standings, Strongest, decoded, encoded

ENDS = {"helpful": rank.helpful, "harmful": rank.harmful}
# Few different ones, so that there are ties, and sums that are exact in any order.
VALUES = (-2.0, -1.0, -0.5, 0.0, -0.0, 0.5, 3.0, 2.0**-20, -(2.0**-20), np.inf, -np.inf, np.nan)


def padded(rankings, k):
    ids, values = np.full((len(rankings), k), -1), np.full((len(rankings), k), np.nan, np.float32)
    for row, each in enumerate(rankings):
        ids[row, : len(each.ids)], values[row, : len(each.ids)] = each.ids, each.values
    return ids, values


def mean_of(rows):
    found = np.full(rows.shape[1], np.nan)
    for column in range(rows.shape[1]):
        finite = [float(each) for each in rows[:, column] if np.isfinite(each)]
        found[column] = sum(finite) / len(finite) if finite else np.nan
    return found.astype(np.float32)


def plain(matrix, k, k_train, sign, classes):
    """The slow way: every row and every column of the whole matrix by itself."""
    k, k_train = min(k, matrix.shape[1]), min(k_train, matrix.shape[0])
    labels = sorted(set(classes.tolist()) - {NO_CLASS}) if classes is not None else []
    mean, of_class = mean_of(matrix), [mean_of(matrix[classes == label]) for label in labels]
    found = {"mean": mean, "class_labels": np.array(labels, np.int64)}
    for name, ranking in ENDS.items():
        several = {"": (matrix, k), "train_": (matrix.T, k_train), "class_": (of_class, k)}
        for kind, (rows, length) in several.items():
            ids, values = padded([ranking(row, length, sign) for row in rows], length)
            found[f"{kind}{name}_ids"], found[f"{kind}{name}_values"] = ids, values
        best = ranking(mean, k, sign)
        found[f"mean_{name}_ids"], found[f"mean_{name}_values"] = best.ids, best.values
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found[name].dtype == expected[name].dtype, name


@st.composite
def cases(draw):
    n_test, n_train = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    few = draw(st.integers(1, len(VALUES)))
    matrix = random.choice(random.permutation(VALUES)[:few], (n_test, n_train)).astype(np.float32)
    classes = random.choice([NO_CLASS, -1, 0, 7], n_test) if draw(st.booleans()) else None
    return matrix, draw(st.integers(1, 11)), draw(st.integers(1, 11)), draw(st.sampled_from([1, -1])), classes, random


def cut(random, shape):
    """Tiles that hold every pair once, in any order: any test samples by any columns that follow each other."""
    tests = np.split(random.permutation(shape[0]), np.sort(random.integers(0, shape[0], 2)))
    for rows in tests:
        borders = [0, *np.sort(random.integers(0, shape[1], 2)), shape[1]]
        for start, stop in random.permutation(list(itertools.pairwise(borders))):
            if len(rows) and stop > start:
                yield rows, int(start), int(stop)


@given(cases(), st.sampled_from([(2, 2), (4, 3), (1 << 20, 1 << 13)]), st.sampled_from([1, 2, 64]))
def test_any_tiles_in_any_order_give_what_the_whole_matrix_gives(case, piece, first):
    matrix, k, k_train, sign, classes, random = case
    tiles = list(cut(random, matrix.shape))
    tiles = [tiles[i] for i in random.permutation(len(tiles))]
    kept = standings.PAIRS, standings.COLUMNS, standings.FIRST
    try:
        (standings.PAIRS, standings.COLUMNS), standings.FIRST = piece, first
        found = made(matrix, k, k_train, sign, classes, tiles, stopped=int(random.integers(0, len(tiles) + 1)))
    finally:
        standings.PAIRS, standings.COLUMNS, standings.FIRST = kept
    assert_same(found.arrays(), plain(matrix, k, k_train, sign, classes))


def made(matrix, k, k_train, sign, classes, tiles, stopped=0):
    """The standings after all tiles, with a restart from a copy of the state after `stopped` of them."""
    found = Standings(*matrix.shape, k, k_train, sign, classes, 1 << 30)
    for index, (rows, start, stop) in enumerate(tiles):
        if index == stopped:
            state = {name: array.copy() for name, array in found.state().items()}
            found = Standings(*matrix.shape, k, k_train, sign, classes, 1 << 30)
            found.restore(state)
        found.add(rows, start, matrix[rows, start:stop])
    return found


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("levels", [5, 10**6])
def test_tiles_of_many_pieces_and_ties(sign, levels):
    random = np.random.default_rng(levels)
    matrix = (random.integers(-levels, levels, (300, 2500)) / 8).astype(np.float32)
    matrix[17], matrix[:, 2100] = np.nan, np.nan
    classes = random.integers(0, 3, 300)
    tiles = [(np.arange(a, a + 150), b, b + 625) for b in (1250, 0, 1875, 625) for a in (150, 0)]
    found = made(matrix, 20, 10, sign, classes, tiles, stopped=5)
    assert_same(found.arrays(), plain(matrix, 20, 10, sign, classes))


def test_test_samples_that_no_tile_holds_have_padding_alone():
    found = Standings(3, 4, 2, 2, 1, None, 0)
    found.add(np.array([1]), 0, np.array([[4, 3, -1, 2]], np.float32))
    arrays = found.arrays()
    assert arrays["helpful_ids"].tolist() == [[-1, -1], [2, 3], [-1, -1]]
    assert np.isnan(arrays["harmful_values"][[0, 2]]).all()
    assert arrays["train_harmful_ids"].tolist() == [[1, -1]] * 4


def test_sums_by_class_are_kept_where_there_is_room():
    classes = np.array([0, 1, NO_CLASS])
    assert Standings(3, 10, 2, 2, 1, classes, 12 * 3 * 10).by_class
    left_out = Standings(3, 10, 2, 2, 1, classes, 12 * 3 * 10 - 1)
    assert (left_out.has_classes, left_out.by_class) == (True, False)
    left_out.add(np.arange(3), 0, np.ones((3, 10), np.float32))
    assert left_out.arrays()["class_harmful_ids"].shape == (0, 2)
    assert left_out.arrays()["mean"].tolist() == [1.0] * 10
    nothing = Standings(3, 10, 2, 2, 1, np.full(3, NO_CLASS), 10**6)
    assert (nothing.has_classes, nothing.by_class) == (False, False)


def test_a_state_of_fewer_classes_is_gone_on_with_and_another_one_refused():
    matrix = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    before = Standings(3, 5, 2, 2, 1, np.array([7, NO_CLASS, NO_CLASS]), 10**6)
    before.add(np.array([0]), 0, matrix[:1])
    classes = np.array([7, 3, 9])
    after = Standings(3, 5, 2, 2, 1, classes, 10**6)
    after.add(np.arange(3), 0, matrix + 1)  # what restore is to replace
    after.restore(before.state())
    after.add(np.array([1, 2]), 0, matrix[1:])
    assert_same(after.arrays(), plain(matrix, 2, 2, 1, classes))
    for other in (
        Standings(3, 5, 1, 2, 1, classes, 10**6),
        Standings(3, 6, 2, 2, 1, classes, 10**6),
        Standings(4, 5, 2, 2, 1, None, 10**6),
        Standings(3, 5, 2, 2, 1, np.array([7, 3, 8]), 10**6),
    ):
        with pytest.raises(ValueError, match="expected the state of the same rankings"):
            other.restore(after.state())


def test_only_what_reaches_the_weakest_is_sorted_in(monkeypatch):
    kept, original = [], Strongest._keep
    monkeypatch.setattr(Strongest, "_keep", lambda self, samples, codes: (kept.append(codes.size),
                                                                          original(self, samples, codes)))  # fmt: skip
    values = np.tile(np.arange(100, dtype=np.float32), (4, 1))
    found = Strongest(4, 3, highest=False)
    found.add(np.arange(4), np.arange(100), values)
    kept.clear()
    found.add(np.arange(4), np.arange(100, 200), values + 3)
    assert kept == []
    found.add(np.arange(4), np.arange(200, 300), np.maximum(values, 2))
    assert kept == [], "equal values of higher ids"
    found.add(np.array([2]), np.arange(300, 400), values[:1] - 1)
    assert kept == [3 + 3], "-1, 0 and 1 beside the three that were kept"
    assert found.ranking()[0].tolist() == [[0, 1, 2], [0, 1, 2], [300, 0, 301], [0, 1, 2]]


def test_a_state_is_of_types_that_a_checkpoint_takes():
    state = Standings(3, 5, 2, 2, 1, np.zeros(3, np.int64), 10**6).state()
    assert {array.dtype.name for array in state.values()} == {"int64", "int32", "float64"}


def test_codes_order_as_the_values_do_down_to_the_smallest():
    tiny, huge = np.finfo(np.float32).smallest_subnormal, np.finfo(np.float32).max
    keys = np.array([-np.inf, -huge, -1, -2 * tiny, -tiny, 0, tiny, 2 * tiny, 1, huge, np.inf], np.float32)
    codes = encoded(keys, np.arange(len(keys))[::-1])
    assert (np.diff(codes) > 0).all()
    assert (codes < EMPTY).all()
    assert np.array_equal(decoded(codes)[0], keys)
    equal = encoded(np.zeros(2, np.float32), np.array([2**32 - 1, 2**31]))
    assert (equal[0] > equal[1], decoded(equal)[1].tolist()) == (True, [2**32 - 1, 2**31])


def test_more_rows_than_short_integers_can_count_in_either_order():
    matrix = np.random.default_rng(1).standard_normal((70_000, 24))
    before = plain_ends(matrix.astype(np.float32))
    for given_as in (matrix, np.asfortranarray(matrix.astype(np.float32))):
        found = Standings(*matrix.shape, 2, 3, 1, None, 0)
        for start, stop in ((0, 20), (20, 24)):
            found.add(np.arange(len(matrix)), start, given_as[:, start:stop])
        arrays = found.arrays()
        np.testing.assert_array_equal(arrays["helpful_ids"], before[0])
        np.testing.assert_array_equal(arrays["train_harmful_ids"], before[1])


def plain_ends(matrix):
    return np.argsort(matrix, axis=1, kind="stable")[:, :2], np.argsort(-matrix.T, axis=1, kind="stable")[:, :3]
