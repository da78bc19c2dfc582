"""What samples look like, in a form that goes into a page: PNG pictures as text, texts, rows of a table."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from infl_cache.maths.task import Task
from infl_cache.progress import progress
from infl_cache.stages.page.png import png, shrunk
from infl_cache.stages.rendering import Shown, shown

# Samples that are looked at before it is decided how large pictures may be.
TRIED = 24

Place = tuple[str, int]


def entry(sample: Shown, side: int) -> dict[str, Any]:
    """A sample for the page: `png` with its `size` (its own, in pixels), `text`, or `cells`."""
    if isinstance(sample, str):
        return {"text": sample}
    if isinstance(sample, dict):
        return {"cells": [[name, value] for name, value in sample.items()]}
    # High values of a grey picture are ink.
    picture = shrunk(sample if sample.ndim == 3 else np.uint8(255) - sample, side)
    return {"png": base64.b64encode(png(picture)).decode("ascii"), "size": [sample.shape[1], sample.shape[0]]}


def size_of(each: dict[str, Any]) -> int:
    """Bytes that an entry takes in the page, about: what is not a letter of ASCII is written as six."""
    if "png" in each:
        return len(each["png"]) + 50
    text = each["text"] if "text" in each else "".join(name + value for name, value in each["cells"])
    return len(text) + 5 * sum(ord(letter) > 126 or letter in '<>&"\\' for letter in text) + 50


def typical(task: Task, places: Sequence[Place], side: int) -> float:
    """The mean size of some of the samples, bytes each."""
    some = [places[at] for at in sorted({i * len(places) // TRIED for i in range(min(TRIED, len(places)))})]
    return float(np.mean([size_of(entry(shown(task, *place), side)) for place in some])) if some else 0.0


def entries(
    task: Task, places: Sequence[Place], side: int, room: int, show: bool
) -> dict[str, dict[str, dict[str, Any]]] | None:
    """The samples by data set and index; None as soon as they take more than `room` bytes."""
    found: dict[str, dict[str, dict[str, Any]]] = {"train": {}, "test": {}}
    with progress("report: samples", len(places), show=show) as bar:
        for name, index in places:
            made = entry(shown(task, name, index), side)
            room -= size_of(made)
            if room < 0:
                return None
            found[name][str(index)] = made
            bar.advance(1)
    return found
