"""What a page says of test and training samples: numbers as they are stored, and who helps and harms whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.progress import progress
from infl_cache.stages.columns import shown_predictions, stored_column
from infl_cache.stages.layers import MODEL, LayerShares, has_layers, stored_shares
from infl_cache.stages.page.choosing import NEIGHBOURS, Ids, PageOptions
from infl_cache.stages.rank import Ranking, only
from infl_cache.stages.rankings import Arrays, stored_length, stored_rankings, strongest
from infl_cache.stages.suspects import column, descending
from infl_cache.stages.tiles import matrix_tests, sign_of, solved

# Suspects that are listed, and test samples that are named at each training sample, of either kind.
SUSPECTS, NAMED = 50, 8
# Layers that are drawn.
MOST_LAYERS = 40

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Known:
    """What a finished run holds of every sample: columns by sample, rankings, shares of layers where there are any."""

    tests: Ids
    test: Mapping[str, Doubles]
    train: Mapping[str, Doubles]
    rankings: Arrays
    self_influence: Doubles | None
    layers: LayerShares | None
    residual: Mapping[int, tuple[float, bool]]
    sign: int

    def over(self, test: int) -> bool:
        """Whether the system of a test sample was solved, but not to the tolerance."""
        residual, converged = self.residual.get(test, (np.nan, True))
        return bool(np.isfinite(residual)) and not converged


def known(folder: RunFolder) -> Known:
    """Read it, each file compared with its record; `DamagedStore` if one is not what was committed."""
    samples, found = solved(folder)
    residuals = zip(samples.tolist(), found["residual"].tolist(), found["converged"].tolist(), strict=True)
    stages = folder.manifest.stages
    complete = "self_influence" in stages and len(folder.records("self_influence")) == len(
        folder.stage_blocks("self_influence")
    )
    return Known(
        tests=matrix_tests(folder),
        test={
            **{name: stored_column(folder, "stest", name) for name in ("target", "loss")},
            "prediction": shown_predictions(folder),
        },
        train={name: stored_column(folder, "grads", name) for name in ("target", "loss")},
        rankings=stored_rankings(folder) if folder.records("rankings") else {},
        self_influence=column(folder, "self_influence") if complete else None,
        layers=stored_shares(folder) if has_layers(folder) else None,
        residual={test: (float(residual), bool(converged)) for test, residual, converged in residuals},
        sign=sign_of(folder),
    )


def of_tests(
    folder: RunFolder, have: Known, tests: Sequence[int], asked: PageOptions, show: bool = True
) -> list[dict[str, Any]]:
    """Of each test sample label, prediction, loss, certificate, shares of layers, and its strongest training samples.

    Raises `BadInput` where the stored rankings of a run without a matrix are shorter than what is asked for.
    """
    k, found = stored_length(folder, asked.neighbours, NEIGHBOURS), []
    with strongest(folder) as ranking, progress("report: neighbours", len(tests), show=show) as bar:
        for test in tests:
            entry: dict[str, Any] = {
                "id": test, "label": have.test["target"][test], "said": have.test["prediction"][test],
                "loss": have.test["loss"][test], "residual": have.residual.get(test, (np.nan, True))[0],
                "over": have.over(test),
                "helpful": pairs(ranking("helpful", test, k), -have.sign),
                "harmful": pairs(ranking("harmful", test, k), have.sign),
            }  # fmt: skip
            if have.layers is not None:
                entry["layers"] = have.layers.share[drawn_layers(have.layers), test]
            found.append(entry)
            bar.advance(1)
    return found


def of_trains(have: Known, trains: Iterable[int]) -> dict[str, Any]:
    """Of each training sample label, loss, mean influence, self-influence, and the test samples that it moves most."""
    found: dict[str, Any] = {}
    for train in trains:
        entry: dict[str, Any] = {"label": have.train["target"][train], "loss": have.train["loss"][train]}
        if "mean" in have.rankings:
            entry["mean"] = single(have.rankings["mean"][train])
        if have.self_influence is not None:
            entry["self"] = have.self_influence[train]
        for name, end, sign in (("helps", "helpful", -have.sign), ("harms", "harmful", have.sign)):
            ids = have.rankings.get(f"train_{end}_ids")
            if ids is not None:
                there = ids[train, :NAMED] >= 0
                values = have.rankings[f"train_{end}_values"][train, :NAMED]
                entry[name] = pairs(Ranking(ids[train, :NAMED][there], values[there]), sign)
        found[str(train)] = entry
    return found


def suspects(have: Known) -> dict[str, Any]:
    """The training samples that are most probably mislabelled: `by` what they are ordered, and their ids."""
    if have.self_influence is not None:
        return {"by": "self", "ids": descending(have.self_influence)[:SUSPECTS].tolist()}
    if "mean_harmful_ids" in have.rankings:
        first = Ranking(*(have.rankings[f"mean_harmful_{part}"][:SUSPECTS] for part in ("ids", "values")))
        return {"by": "mean", "ids": only(first, "harmful", have.sign).ids.tolist()}
    return {"by": "none", "ids": []}


def layers(have: Known) -> dict[str, Any] | None:
    """The layers of largest share: names, numbers of parameters, shares of the influences on all test samples."""
    if have.layers is None:
        return None
    order = drawn_layers(have.layers)
    return {
        "names": [have.layers.names[each] or MODEL for each in order],
        "parameters": have.layers.parameters[order].tolist(),
        "share": have.layers.share_of_all[order],
        "left_out": len(have.layers.names) - len(order),
    }


def drawn_layers(shares: LayerShares) -> Ids:
    """The `MOST_LAYERS` of largest absolute share, in the order of the model."""
    size = np.nan_to_num(np.abs(shares.share_of_all))
    return np.sort(np.argsort(-size, kind="stable")[:MOST_LAYERS]).astype(np.int64)


def pairs(ranking: Ranking, sign: int) -> list[list[float]]:
    """Ids and values one by one, those of that sign: a ranking that is longer than what helps goes on with what harms.

    >>> pairs(Ranking(np.array([7, 2, 5]), np.array([-0.5, 0.0, 0.25], np.float32)), -1)
    [[7, -0.5]]
    """
    both = zip(ranking.ids.tolist(), ranking.values, strict=True)
    return [[index, single(value)] for index, value in both if sign * value > 0]


def single(value: np.float32) -> float:
    """A float32 as the shortest decimal number that stands for it.

    >>> float(np.float32(0.1)), single(np.float32(0.1))
    (0.10000000149011612, 0.1)
    """
    return float(str(np.float32(value)))
