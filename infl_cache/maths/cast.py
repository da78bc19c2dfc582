"""A task in another floating type: its model, loss, measure and data together."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from infl_cache.maths.task import Task


def in_dtype(task: Task, dtype: torch.dtype) -> Task:
    """The task in `dtype`, with a copy of its model; itself if the model has that type."""
    return task if dtype_of(task.model) == dtype else with_model(task, copy.deepcopy(task.model).to(dtype))


def with_model(task: Task, model: nn.Module) -> Task:
    """The task with another model, and with loss, measure and float data in that model's type.

    Batches stay as the task's `collate` makes them: they are cast when outputs or targets are taken of them.
    """
    dtype = dtype_of(model)
    if dtype is None or dtype == dtype_of(task.model):
        return replace(task, model=model)

    def cast(data: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, data)

    def as_cast(function: Any) -> Any:
        return copy.deepcopy(function).to(dtype) if isinstance(function, nn.Module) else function

    forward, targets = task.forward, task.targets
    return replace(
        task,
        model=model,
        loss=as_cast(task.loss),
        measure=as_cast(task.measure),
        forward=lambda model, data: forward(model, cast(data)),
        targets=lambda data: targets(cast(data)),
    )


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The type of a model's first floating parameter."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
