"""What people look at: a short table for the terminal, and one picture of test samples with their neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import require_folder
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.run import RunFolder
from infl_cache.maths.task import Task
from infl_cache.stages.blocks import some
from infl_cache.stages.columns import stored_column
from infl_cache.stages.figures.canvas import picture
from infl_cache.stages.figures.neighbours import are_pictures, draw_pictures
from infl_cache.stages.layers import has_layers, stored_shares
from infl_cache.stages.opening import as_stored
from infl_cache.stages.rank import Ranking, only
from infl_cache.stages.rankings import has_matrix, stored_rankings
from infl_cache.stages.rendering import in_a_line, label_in_a_line, shown
from infl_cache.stages.same import check_same_task
from infl_cache.stages.tiles import require_sound_matrix, sign_of
from infl_cache.stages.worst import NEIGHBOURS, Asked, worst_test_samples

SHOWN = 3
MOST_CLASSES = 10
PICTURE = "report/influence.png"


def report(folder: RunFolder, task: Task | None = None) -> str:
    """The table as text; with a task whose samples are pictures, also `report/influence.png`."""
    if task is not None:
        require_folder((folder.path / PICTURE).parent)
        refuse_links((folder.path / PICTURE).parent)
    if has_matrix(folder):
        require_sound_matrix(folder)
    if task is not None:
        check_same_task(folder, task)
        task = as_stored(folder, task)
    asked = worst_test_samples(folder, SHOWN)
    labels = stored_column(folder, "grads", "target")
    names = task.classes if task is not None else None
    texts = {each.index: in_a_line(shown(task, "test", each.index)) for each in asked} if task is not None else {}
    text = table(asked, labels, names, sign_of(folder), folder.plan("stest").get("measure", "loss"), texts)
    if line := most_harmful_line(folder, names):
        text += f"\n\n{line}"
    if has_layers(folder):
        text += f"\n\n{stored_shares(folder)}"
    if task is not None:
        drawn = task
        path = picture(
            folder.path / PICTURE, lambda: draw_pictures(drawn, asked, labels) if are_pictures(drawn, asked) else None
        )
        text += f"\n{path}" if path else ""
    return text


def most_harmful_line(folder: RunFolder, classes: Any = None) -> str:
    """The most harmful on average over the test samples, and the one of each of a few classes; empty without any."""
    if 0 not in folder.records("rankings"):
        return ""
    kept = stored_rankings(folder)
    sign = sign_of(folder)
    first = only(Ranking(*(kept[f"mean_harmful_{part}"][:NEIGHBOURS] for part in ("ids", "values"))), "harmful", sign)
    text = f"Most harmful on average: {some(first.ids.tolist()) if len(first.ids) else 'none'}"
    labels = kept.get("class_labels", np.empty(0))
    if 0 < len(labels) <= MOST_CLASSES:
        worst = (kept[f"class_harmful_{part}"][:, 0].tolist() for part in ("ids", "values"))
        named = [(label, i) for label, i, value in zip(labels.tolist(), *worst, strict=True) if sign * value > 0]
        if named:
            text += f"; to class {', '.join(f'{label_in_a_line(label, classes)}: {i}' for label, i in named)}"
    return f"{text}."


def table(
    asked: list[Asked], labels: NDArray[np.float64], classes: Any = None, sign: int = 1, measure: str = "loss",
    texts: Mapping[int, str] | None = None,
) -> str:  # fmt: skip
    """The strongest training samples of each test sample: id, label, influence; and what the test sample says."""
    words = "negative = helpful, positive = harmful" if sign > 0 else "positive = helpful, negative = harmful"
    what = "the test samples" if measure == "loss" else f"the measure ({measure}) of the test samples"
    lines = [f"Influence on {what} of largest loss; {words}.", ""]
    for each in asked:
        lines.append(
            f"test sample {each.index}: label {label_in_a_line(each.label, classes)},"
            f" predicted {label_in_a_line(each.prediction, classes)}, loss {each.loss:.3g}"
        )
        if texts and texts.get(each.index):
            lines.append(f"    {texts[each.index]}")
        lines.append(
            f"    {'helpful':>8} {'label':>8} {'influence':>11}    {'harmful':>8} {'label':>8} {'influence':>11}"
        )
        for k in range(max(len(each.helpful.ids), len(each.harmful.ids))):
            sides = [
                f"{side.ids[k]:>8} {label_in_a_line(labels[side.ids[k]], classes):>8} {side.values[k]:>+11.3e}"
                if k < len(side.ids) else " " * 29
                for side in (each.helpful, each.harmful)
            ]  # fmt: skip
            lines.append("    " + "    ".join(sides))
        lines.append("")
    return "\n".join(lines).rstrip()
