"""What a page says of the run as a whole: its stages, the system that was solved, what could not be shown and why."""

from __future__ import annotations

from typing import Any

import numpy as np

from infl_cache.disk.run import RunFolder
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.columns import classes_of
from infl_cache.stages.page import totals
from infl_cache.stages.page.content import Known
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.status import TILED, StageStatus, status

# Test samples over the tolerance that are named.
MOST_OVER = 100


def sign_in_words(sign: int, measure: str) -> str:
    """The sign convention in a sentence.

    >>> sign_in_words(1, "loss").split(":")[0]
    'Negative = helpful'
    """
    if sign < 0:
        return (
            f"Positive = helpful: more weight on the training sample raises the {measure} of the test sample; removing"
            " it changes that by about minus the influence."
        )
    what = "loss" if measure == "loss" else f"measure ({measure})"
    return (
        f"Negative = helpful: more weight on the training sample lowers the {what} of the test sample; removing it"
        " changes that by about minus the influence."
    )


def overview(folder: RunFolder, have: Known, show: bool) -> dict[str, Any]:
    """Sizes, stages, certificate, sizes of influences and means between classes; `notes` say what is not known."""
    measure, notes = str(folder.plan("stest").get("measure") or "loss"), []
    state, over = status(folder), [test for test in sorted(have.residual) if have.over(test)]
    found: dict[str, Any] = {
        "run": folder.path.resolve().name,
        "measure": measure,
        "sign": sign_in_words(have.sign, measure),
        "lower_helps": have.sign > 0,
        "facts": _facts(folder, have, measure, state.stages),
        "stages": [_stage(each) for each in state.stages],
        "over": over[:MOST_OVER],
        "n_over": len(over),
    }
    if has_matrix(folder):
        found["totals"] = totals.totals(folder, have.tests, have.train["target"], have.test["target"], show)
        if (rows := found["totals"]["rows"]) < len(have.tests):
            notes.append(
                f"Histogram and class means are of {rows:,} of {len(have.tests):,} test samples, spread evenly: the"
                f" matrix is larger than {human_bytes(totals.MOST_BYTES)}."
            )
        if found["totals"]["between"] is None:
            notes.append("No means between classes: the labels are no integers.")
    else:
        notes.append(
            "This run keeps rankings and no matrix (--no-matrix): the histogram of all influences and the means between"
            " classes cannot be known."
        )
    return {**found, "notes": [*notes, *_not_run(have)]}


def _not_run(have: Known) -> list[str]:
    found = []
    if have.self_influence is None:
        found.append(
            "Suspects are the training samples that are most harmful on average; infl-cache self-influence finds"
            " wrong labels without test samples."
        )
    if have.layers is None:
        found.append("What each layer gives to the influences is shown once infl-cache influence --by-layer was run.")
    return found


def _facts(folder: RunFolder, have: Known, measure: str, stages: tuple[StageStatus, ...]) -> list[list[str]]:
    n_test, n_params = count_of_tests(folder), int((folder.manifest.task or {}).get("n_params", 0))
    facts = {
        "training samples": f"{len(have.train['loss']):,}",
        "test samples": f"{len(have.tests):,}" + (f" of {n_test:,}" if len(have.tests) < n_test else ""),
        "parameters": f"{n_params:,}",
        "mean training loss": f"{_mean(have.train['loss']):.4g}",
        "mean test loss": f"{_mean(have.test['loss'][have.tests]):.4g}",
    }
    labels, said = have.test["target"][have.tests], have.test["prediction"][have.tests]
    if classes_of(labels) is not None and classes_of(said) is not None:
        facts["right predictions"] = f"{np.mean(labels == said):.1%}"
    if measure != "loss":
        facts["what is explained"] = measure
    facts["on disk"] = human_bytes(sum(each.n_bytes for each in stages))
    facts["time of all stages"] = human_seconds(sum(each.seconds for each in stages))
    return [list(each) for each in facts.items()]


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _stage(state: StageStatus) -> dict[str, Any]:
    unit = "tiles" if state.stage in TILED else "rows"
    return {
        "name": state.stage.replace("_", "-"),
        "done": f"{state.rows_done:,} of {state.rows:,} {unit}" if state.blocks else "not begun",
        "disk": human_bytes(state.n_bytes),
        "time": human_seconds(state.seconds),
        "details": [[str(name), str(value)] for name, value in state.details.items()],
    }
