"""Which test samples a page shows: those that were named, else some of largest loss and some of all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.config import only_options_of, option, short
from infl_cache.errors import IncompleteStore
from infl_cache.stages.blocks import some
from infl_cache.stages.selection import as_text, parse_tests

NEIGHBOURS = 8
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class PageOptions:
    """The page: which test samples it shows, and how much of each. Nothing of it is part of a run's identity."""

    tests: str | None = option(
        None, "test samples to show, by indices and slices such as 0,5,100:200; if not given --most-tests are chosen"
    )
    most_tests: int = option(
        200, "how many test samples are chosen: half of them of largest loss, the others spread over the rest", 1
    )
    neighbours: int | None = option(
        None, f"helpful and harmful training samples of each, so many of either; {NEIGHBOURS} if not given", 1
    )

    @classmethod
    def resolve(cls, given: Mapping[str, Any]) -> PageOptions:
        """Options from a mapping, `tests` as text, a number or a list; `BadInput` for a wrong one."""
        tests = given.get("tests")
        if isinstance(tests, (list, tuple, range, np.ndarray)):
            tests = ",".join(str(each) for each in tests)
        return only_options_of(cls, {**given, "tests": tests if tests is None else str(tests)})


def candidates(asked: PageOptions, tests: Ids, n_test: int) -> Ids:
    """The test samples that may be shown, ascending: those that were named, else all that the run has.

    Raises `BadInput` for words that name none, `IncompleteStore` for samples that the run was not asked about.
    """
    if asked.tests is None:
        return tests
    named = np.array(sorted(parse_tests(asked.tests, n_test)), np.int64)
    missing = named[~np.isin(named, tests)]
    if len(missing):
        raise IncompleteStore(
            f"tests: expected test samples that the run was asked about ({short(as_text(tests, n_test))}), found"
            f" {some(missing.tolist())}; run infl-cache stest and influence with --test {as_text(missing, 0)[:60]}"
        )
    return named


def chosen(tests: Ids, losses: NDArray[np.float64], most: int) -> tuple[Ids, str]:
    """At most `most` of the test samples, ascending, and in words how they were chosen (empty: these are all).

    `losses` are theirs, in the same order. NaN counts as the smallest.

    >>> chosen(np.array([3, 4, 7, 9]), np.array([0.1, 5.0, 0.2, 0.3]), 2)
    (array([3, 4]), 'the 1 of largest loss and 1 spread over the others')
    """
    if len(tests) <= most:
        return tests, ""
    order = np.argsort(-np.nan_to_num(losses, nan=-np.inf), kind="stable")
    worst, rest = order[: most - most // 2], np.sort(order[most - most // 2 :])
    spread = rest[np.arange(most // 2) * len(rest) // max(1, most // 2)]
    words = f"the {len(worst):,} of largest loss" + (f" and {len(spread):,} spread over the others" if most > 1 else "")
    return np.sort(tests[np.concatenate([worst, spread])]), words
