"""Drive the maths column on a task as the stages do: parameters selected first, then everything in `evaluating`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from infl_cache import Task
from infl_cache.maths.capture import Forms, capture, decide_forms, rows_of
from infl_cache.maths.curvature import Curvature
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of
from infl_cache.maths.task import evaluating

CPU = torch.device("cpu")


def one_batch(task: Task, data: str = "train") -> Batch:
    """All samples as one batch."""
    return probe_batch(task, range(len(getattr(task, data))), CPU, data)


def decided(task: Task, form: Literal["auto", "dense"] = "auto", count: int | None = None) -> tuple[Forms, list[str]]:
    """Forms and notes, decided on the first `count` training samples."""
    parameters = select(task.model, task.parameters)
    with evaluating(task.model, CPU):
        return decide_forms(task, parameters, probe_batch(task, range(count or len(task.train)), CPU), form)


def captured_rows(
    task: Task, forms: Forms, size: int | None = None, measure: bool = False, data: str = "train"
) -> Tensor:
    """Plain gradient rows of a whole data set in micro-batches of `size`; the loop engine takes single samples."""
    count = len(getattr(task, data))
    if forms.engine == "loop" and forms.mapped:
        size = 1
    rows = []
    with evaluating(task.model, CPU):
        for batch in batches(getattr(task, data), data, task.collate, groups_of(0, count, size or count), CPU):
            captured = capture(task, forms, batch, measure)
            rows.append(rows_of(forms, captured.factors, captured.dense))
    return torch.cat(rows)


@contextmanager
def operator_of(
    task: Task, kind: Literal["ggn", "hessian"] = "ggn", damping: float = 0.0, size: int = 64, **changes: Any
) -> Iterator[Curvature]:
    """The curvature of a task's training loss, in micro-batches of `size`."""
    parameters = select(task.model, task.parameters)
    n_train = len(task.train)

    def pick(indices: Sequence[int]) -> Iterator[Batch]:
        groups = [indices[i : i + size] for i in range(0, len(indices), size)]
        return batches(task.train, "train", task.collate, groups, CPU)

    with evaluating(task.model, CPU):
        loaded = list(pick(range(n_train)))
        own = next(task.model.parameters()).dtype
        made = {"batches": lambda: loaded, "pick": pick, "dtype": own, **changes}
        yield Curvature(task=task, parameters=parameters, kind=kind, n_train=n_train, damping=damping, **made)
