"""What people look at: a short table for the terminal, and one picture of test samples with their neighbours."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import require_folder, write_atomically
from infl_cache.disk.run import RunFolder
from infl_cache.maths.task import Task
from infl_cache.stages import rank
from infl_cache.stages.blocks import some
from infl_cache.stages.columns import stored_column
from infl_cache.stages.layers import has_layers, stored_shares
from infl_cache.stages.opening import as_stored, log
from infl_cache.stages.rankings import has_matrix, stored_length, stored_rankings, strongest
from infl_cache.stages.rendering import in_a_line, label_text, picture_at, shown
from infl_cache.stages.same import check_same_task
from infl_cache.stages.tiles import matrix_tests, require_sound_matrix, sign_of

SHOWN = 3
NEIGHBOURS = 5
MOST_CLASSES = 10
PICTURE = "report/influence.png"


@dataclass(frozen=True)
class Asked:
    """A test sample with what the stores know of it, and its strongest training samples."""

    index: int
    label: float
    prediction: float
    loss: float
    helpful: rank.Ranking
    harmful: rank.Ranking


def report(folder: RunFolder, task: Task | None = None) -> str:
    """The table as text; with a task whose samples are pictures, also `report/influence.png`."""
    if task is not None:
        require_folder((folder.path / PICTURE).parent)
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
        picture = draw(folder.path / PICTURE, task, asked, labels)
        text += f"\n{picture}" if picture else ""
    return text


def worst_test_samples(folder: RunFolder, count: int) -> list[Asked]:
    """Of the test samples asked about, those of largest loss: the predictions people ask about first."""
    losses, tests = stored_column(folder, "stest", "loss"), matrix_tests(folder)
    labels, predictions = stored_column(folder, "stest", "target"), stored_column(folder, "stest", "prediction")
    k, found = stored_length(folder, None, NEIGHBOURS), []
    with strongest(folder) as ranking:
        for index in tests[np.argsort(-np.nan_to_num(losses[tests]), kind="stable")[:count]].tolist():
            found.append(
                Asked(index, labels[index], predictions[index], losses[index],
                      ranking("helpful", index, k), ranking("harmful", index, k))
            )  # fmt: skip
    return found


def most_harmful_line(folder: RunFolder, classes: Any = None) -> str:
    """The most harmful on average over the test samples, and the one of each of a few classes; empty without any."""
    if 0 not in folder.records("rankings"):
        return ""
    kept = stored_rankings(folder)
    text = f"Most harmful on average: {some(kept['mean_harmful_ids'][:NEIGHBOURS].tolist())}"
    labels = kept.get("class_labels", np.empty(0))
    if 0 < len(labels) <= MOST_CLASSES:
        worst = zip(labels.tolist(), kept["class_harmful_ids"][:, 0].tolist(), strict=True)
        text += f"; to class {', '.join(f'{label_text(label, classes)}: {i}' for label, i in worst if i >= 0)}"
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
            f"test sample {each.index}: label {label_text(each.label, classes)},"
            f" predicted {label_text(each.prediction, classes)}, loss {each.loss:.3g}"
        )
        if texts and texts.get(each.index):
            lines.append(f"    {texts[each.index]}")
        lines.append(
            f"    {'helpful':>8} {'label':>8} {'influence':>11}    {'harmful':>8} {'label':>8} {'influence':>11}"
        )
        for k in range(max(len(each.helpful.ids), len(each.harmful.ids))):
            sides = [
                f"{side.ids[k]:>8} {label_text(labels[side.ids[k]], classes):>8} {side.values[k]:>+11.3e}"
                if k < len(side.ids) else " " * 29
                for side in (each.helpful, each.harmful)
            ]  # fmt: skip
            lines.append("    " + "    ".join(sides))
        lines.append("")
    return "\n".join(lines).rstrip()


def draw(path: Path, task: Task, asked: list[Asked], labels: NDArray[np.float64]) -> Path | None:
    """One PNG: each test sample, its most helpful and its most harmful training samples, values over them.

    None where the samples are not pictures or matplotlib is not installed.
    """
    pictures = {each.index: picture_at(task, "test", each.index) for each in asked}
    if any(picture is None for picture in pictures.values()):
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("no picture: matplotlib is not installed; pip install 'infl_cache[figures]'")
        return None
    width = 1 + 2 * NEIGHBOURS
    figure = Figure(figsize=(1.25 * width, 1.7 * len(asked) + 0.4), layout="constrained")
    axes = figure.subplots(len(asked), width, squeeze=False)
    for row, each in zip(axes, asked, strict=True):
        said = label_text(each.prediction, task.classes)
        title = f"test {each.index}\n{label_text(each.label, task.classes)}, said {said}"
        show(row[0], pictures[each.index], title, "black")
        for offset, side, colour in ((1, each.helpful, "tab:green"), (1 + NEIGHBOURS, each.harmful, "tab:red")):
            for k in range(NEIGHBOURS):
                if k >= len(side.ids):
                    row[offset + k].axis("off")
                    continue
                index = int(side.ids[k])
                title = f"train {index}\n{label_text(labels[index], task.classes)}: {side.values[k]:+.1e}"
                show(row[offset + k], picture_at(task, "train", index), title, colour)
    figure.suptitle("Test sample | most helpful (green) | most harmful (red): label and influence")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(temporary := path.with_suffix(".tmp.png"), dpi=110)
    write_atomically(path, temporary.read_bytes())
    temporary.unlink()
    return path


def show(axis: Any, picture: Any, title: str, colour: str) -> None:
    """A picture with a title and a frame of that colour."""
    axis.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None)
    axis.set_title("\n".join(textwrap.shorten(line, 24) for line in title.split("\n")), fontsize=8, color=colour)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color(colour)
