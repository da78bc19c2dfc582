"""A validation that was written down: `RUN/validate/<kind>.json` read back, if it speaks of the run's matrix."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.config import short
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import VALIDATION
from infl_cache.errors import BadInput, DamagedStore, IncompleteStore
from infl_cache.stages.removals import complements
from infl_cache.stages.tiles import FINAL
from infl_cache.stages.validation import WAY, WHAT, Figures, Validation

KINDS = tuple(WHAT)


def stored_validation(folder: RunFolder, kind: str) -> Validation:
    """The validation of that kind as it was found; `retrained` is 0, for nothing was now.

    Raises `IncompleteStore` where there is none of this matrix, `DamagedStore` for a file that cannot be understood.
    """
    if kind not in KINDS:
        raise BadInput(f"kind: expected one of {', '.join(KINDS)}, found {short(kind)}")
    path, remedy = folder.path / VALIDATION / f"{kind}.json", f"run infl-cache validate --kind {kind}"
    refuse_links(folder.path, (VALIDATION,))
    if not path.is_file():
        raise IncompleteStore(f"{path}: expected a validation, found none; {remedy}")
    try:
        content = json.loads(path.read_bytes())
        if content["influence"] != folder.fingerprint("influence"):
            raise IncompleteStore(f"{path}: expected a validation of this matrix, found one of another; {remedy}")
        return _from_json(folder, content, kind)
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise DamagedStore(
            f"{path}: expected figures of a validation, found what cannot be read ({str(error)[:80]}); {remedy}"
        ) from error


def _from_json(folder: RunFolder, content: Any, kind: str) -> Validation:
    way, tests = content["retrained_by"], content["tests"]
    if content["kind"] != kind or way not in WAY or not tests:
        raise ValueError("another kind")
    predicted, actual = (np.array([each[name] for each in tests], np.float64) for name in ("predicted", "actual"))
    removed = _removed(folder, content, int(tests[0]["test"]))
    if not predicted.shape == actual.shape == (len(tests), len(removed)):
        raise ValueError("other numbers of changes than of removals")
    return Validation(
        kind, way, str(content["measure"]), tuple(int(each["test"]) for each in tests),
        tuple(_number(each["loss"]) for each in tests), removed, int(content["n_train"]), predicted, actual,
        _figures(content), tuple(map(_figures, tests)), _number(content["error"]), tuple(map(str, content["notes"])),
    )  # fmt: skip


def _removed(folder: RunFolder, content: Any, test: int) -> tuple[NDArray[np.int64], ...]:
    """What was removed; the subsets of `lds` are not written down, for their seed and fraction tell them."""
    if content["removed"] is not None:
        return tuple(np.array(each, np.int64) for each in content["removed"])
    with closing(MatrixFile(folder.path / FINAL)) as matrix:
        usable = np.flatnonzero(np.isfinite(matrix.read(test, test + 1)[0]))
    asked = content["options"]
    return tuple(complements(usable, int(asked["subsets"]), float(asked["fraction"]), int(asked["seed"])))


def _figures(content: Any) -> Figures:
    return Figures(*(_number(content[name]) for name in ("pearson", "spearman", "slope")))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
