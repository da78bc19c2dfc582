"""Which test samples a page shows."""

import numpy as np
import pytest

from infl_cache import BadInput, IncompleteStore
from infl_cache.stages.page.choosing import PageOptions, candidates, chosen


@pytest.mark.parametrize("count", [1_000, 1_000_000])
def test_of_many_test_samples_half_are_those_of_largest_loss_and_half_are_spread(count):
    tests = np.arange(count) * 3
    losses = np.random.default_rng(0).permutation(count).astype(float)
    losses[:5] = np.nan
    found, words = chosen(tests, losses, 200)
    assert len(np.unique(found)) == 200
    assert np.array_equal(found, np.sort(found))
    worst = set(tests[np.argsort(-np.nan_to_num(losses, nan=-1))[:100]].tolist())
    assert worst <= set(found.tolist())
    others = np.sort([each for each in found.tolist() if each not in worst])
    assert np.diff(others).max() <= 3 * 1.3 * count / 100
    assert words == "the 100 of largest loss and 100 spread over the others"


@pytest.mark.parametrize(("most", "expected"), [(1, [4]), (2, [3, 4]), (3, [3, 4, 9]), (4, [3, 4, 7, 9])])
def test_few_are_chosen_of_few(most, expected):
    found, words = chosen(np.array([3, 4, 7, 9]), np.array([0.1, 5.0, 0.2, 0.3]), most)
    assert found.tolist() == expected
    assert (words == "") == (most == 4)


def test_named_samples_are_shown_in_order_and_must_be_there():
    have = np.array([0, 2, 4])
    assert candidates(PageOptions(), have, 6).tolist() == [0, 2, 4]
    assert candidates(PageOptions(tests="4,0:1"), have, 6).tolist() == [0, 4]
    with pytest.raises(IncompleteStore, match=r"found 3, 5; run infl-cache stest and influence with --test 3,5"):
        candidates(PageOptions(tests="3,4,5"), have, 6)
    with pytest.raises(BadInput, match="expected indices of test samples, 0 to 5, found 9"):
        candidates(PageOptions(tests="9"), have, 6)


@pytest.mark.parametrize("tests", [[1, 2], (1, 2), np.array([1, 2]), "1,2"])
def test_options_are_checked(tests):
    assert PageOptions.resolve({"tests": tests, "neighbours": "3"}) == PageOptions("1,2", 200, 3)
    for wrong in ({"neighbours": 0}, {"most_tests": "many"}, {"neighbors": 3}):
        with pytest.raises(BadInput, match=r"neighbours|most-tests"):
            PageOptions.resolve(wrong)
