r"""What comes out: a dict per test sample, and the training samples by their average over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.pipeline import Run
from infl_cache.ptif.saving import Results, loaded_json
from infl_cache.stages import rank
from infl_cache.stages.columns import stored_column
from infl_cache.stages.export.text import entry_of
from infl_cache.stages.tiles import sign_of

KEYS = {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful", "helpful"}
Outcome = tuple[Results, list[int], list[int]]


def results_of(run: Run, tests: Sequence[int]) -> Outcome:
    """The influences of a finished run on these test samples, and the ids of all training samples by their average."""
    matrix = run.scores()
    folder = run.folder
    sign, labels, seconds = sign_of(folder), stored_column(folder, "stest", "target"), _seconds(folder)
    found = {str(j): entry_of(j, np.array(matrix[j]), labels[j], float(seconds[j]), None, sign) for j in sorted(tests)}
    return (found, *overall(found, sign))


def _seconds(folder: RunFolder) -> NDArray[np.float64]:
    """Of each test sample, its share of the time of stages 2 and 3."""
    samples, every = folder.samples("stest"), folder.stage_blocks("stest")
    shared = sum(record.seconds for record in folder.records("influence").values()) / max(1, len(samples))
    found = np.full(int(samples.max(initial=-1)) + 1, shared)
    for index, record in folder.records("stest").items():
        block = every[index]
        ids = samples[block.start : block.stop]
        found[ids[ids >= 0]] += record.seconds / max(1, len(ids))
    return found


def overall(results: Results, sign: int = 1) -> tuple[list[int], list[int]]:
    """Training ids by their influence averaged over the test samples: `harmful` and `helpful`, the strongest first.

    Test samples without a finite influence are left out of the average.
    """
    total: Any = None
    for key in sorted(results, key=int):
        row = np.array(results[key]["influence"], np.float64)
        if not np.isnan(row).all():
            total = row if total is None else total + row
    if total is None:
        return [], []
    harmful, helpful = (rank.ENDS[end](total, len(total), sign).ids.tolist() for end in ("harmful", "helpful"))
    return harmful, helpful


def combine(*parts: Mapping[str, Any] | str | Path) -> Outcome:
    """What one call would have returned, of parts that several calls (or machines) computed.

    Args:
        parts: dicts of influences, or the JSON files that hold them.

    Returns influences, harmful and helpful, as `calc_img_wise`.
    Raises `BadInput` for parts that are no results, of different training sets, or that differ on a test sample.

    Example:
        >>> entry = {"label": 1, "time_calc_influence_s": 0.1}
        >>> one = {"0": {**entry, "num_in_dataset": 0, "influence": [0.5, -2.0], "harmful": [0, 1], "helpful": [1, 0]}}
        >>> two = {"3": {**entry, "num_in_dataset": 3, "influence": [0.5, 1.0], "harmful": [1, 0], "helpful": [0, 1]}}
        >>> influences, harmful, helpful = combine(one, two)
        >>> list(influences), harmful, helpful
        (['0', '3'], [0, 1], [1, 0])
    """
    together: Results = {}
    for place, part in enumerate(parts):
        for key, entry in _checked(part, f"part {place}").items():
            other = together.setdefault(key, entry)
            if other["influence"] != entry["influence"]:
                raise BadInput(
                    f"part {place}: expected the influences on test sample {key} of another part, found others"
                )
    if not together:
        raise BadInput("parts: expected results of at least one test sample, found none")
    if len({len(entry["influence"]) for entry in together.values()}) > 1:
        raise BadInput("parts: expected results of one training set, found influences of different lengths")
    ordered = {key: together[key] for key in sorted(together, key=int)}
    return (ordered, *overall(ordered, _sign(ordered)))


def _checked(part: Mapping[str, Any] | str | Path, name: str) -> Mapping[str, Any]:
    found = loaded_json(Path(part)) if isinstance(part, (str, Path)) else part
    good = isinstance(found, Mapping) and all(
        str(key).isdigit() and isinstance(entry, Mapping) and set(entry) >= KEYS for key, entry in found.items()
    )
    if not good:
        raise BadInput(f"{name}: expected influences by test id, found {type(found).__name__} of something else")
    return {str(key): entry for key, entry in found.items()}


def _sign(results: Results) -> int:
    """1 where the most negative are the helpful ones, -1 for measures that are better when higher."""
    for entry in results.values():
        if entry["helpful"]:
            first, last = (entry["influence"][entry[end][0]] for end in ("helpful", "harmful"))
            if first != last:
                return 1 if first < last else -1
    return 1
