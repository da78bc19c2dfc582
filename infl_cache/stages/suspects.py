"""The training samples of largest self-influence: `self_influence.npz`, a short table, and a picture."""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.durable import write_atomically
from infl_cache.disk.layout import Block
from infl_cache.disk.run import RunFolder
from infl_cache.maths.task import Task
from infl_cache.stages.columns import stored_column
from infl_cache.stages.figures.canvas import picture
from infl_cache.stages.figures.suspects import draw_suspects
from infl_cache.stages.opening import Opened, as_stored
from infl_cache.stages.rendering import label_in_a_line

FILE, PICTURE = "self_influence.npz", "report/self_influence.png"
# Arrays of the store beside the values, and their types.
CERTIFICATE = {"residual": "float64", "iterations": "int64", "converged": "bool"}
SHOWN = 10


def column(folder: RunFolder, name: str) -> NDArray[Any]:
    """An array of the finished store `self_influence.zarr`; `IncompleteStore` if it is not finished."""
    records, store = folder.require_complete("self_influence"), folder.store("self_influence")
    parts = []
    for block in folder.stage_blocks("self_influence"):
        folder.check_block(records[block.index])
        parts.append(store.read_block(block, [name])[name])
    return np.concatenate(parts)


def descending(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ids of all values that are finite, the largest first, ties by lower id.

    >>> descending(np.array([1.0, np.nan, 3.0, 1.0])).tolist()
    [2, 0, 3]
    """
    ids = np.flatnonzero(np.isfinite(values))
    return ids[np.argsort(-values[ids], kind="stable")].astype(np.int64)


def write_ranking(run: Opened, anew: bool) -> None:
    """`self_influence.npz`: `values` (n_train,) of all samples, `ids` of the finite ones, the largest first."""
    folder, stage = run.folder, "self_ranking"
    identity = {"self_influence": folder.fingerprint("self_influence")}
    entry, records = folder.manifest.stages.get(stage), folder.records(stage)
    there = 0 in records and (folder.path / FILE).is_file() and folder.record_file(FILE) in records[0].files
    if not anew and there and entry is not None and entry["identity"] == identity:
        return
    folder.begin(stage, run.task_identity, identity, {"n_rows": 1, "block_rows": 1})
    started, values, buffer = time.perf_counter(), column(folder, "self_influence"), io.BytesIO()
    np.savez(buffer, values=values, ids=descending(values))
    write_atomically(folder.path / FILE, buffer.getvalue())
    folder.commit(stage, Block(0, 0, 1), [folder.record_file(FILE)], time.perf_counter() - started)


def suspects_report(folder: RunFolder, task: Task | None) -> str:
    """The table of the largest self-influences as text, and the path of the picture if there is one."""
    task = as_stored(folder, task) if task is not None else None
    values, classes = column(folder, "self_influence"), task.classes if task is not None else None
    ids = descending(values)
    labels, losses = (stored_column(folder, "grads", name) for name in ("target", "loss"))
    lines = ["Largest self-influence: probably mislabelled, or unlike all others.", ""]
    lines.append(f"{'train':>8} {'label':>8} {'self-influence':>15} {'loss':>10}")
    for index in ids[:SHOWN].tolist():
        label = label_in_a_line(labels[index], classes)
        lines.append(f"{index:>8} {label:>8} {values[index]:>15.3e} {losses[index]:>10.3g}")
    path = None
    if task is not None:
        path = picture(folder.path / PICTURE, lambda: draw_suspects(task, values, ids, labels))
    return "\n".join(lines) + (f"\n\n{path}" if path else "")
