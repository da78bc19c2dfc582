"""Per-sample gradients of any model: `torch.func` vmap of the whole model, or a loop where vmap cannot go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from infl_cache.maths.params import Parameters, flatten
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, outputs_at, per_sample, reference_gradient, values_of


def mapped_gradients(task: Task, parameters: Parameters, batch: Batch, measure: bool) -> dict[str, Tensor]:
    """Gradients `(B, *shape)` of the given parameters, one vmap over the samples of the batch.

    Every tensor of the batch whose first axis is B is taken apart by sample; the rest is shared.
    """
    size = len(batch.indices)
    leaves, structure = tree_flatten(batch.data)
    split = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.shape[:1] == (size,)]

    def loss_of_one(values: dict[str, Tensor], *own: Tensor) -> Tensor:
        one = list(leaves)
        for index, leaf in zip(split, own, strict=True):
            one[index] = leaf.unsqueeze(0)
        data: Any = tree_unflatten(one, structure)
        return per_sample(task, outputs_at(task, values, data), data, 1, measure)[0]

    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *[0] * len(split)))
    found: dict[str, Tensor] = gradient(values_of(task.model, parameters), *[leaves[index] for index in split])
    return found


def looped_gradients(task: Task, parameters: Parameters, batch: Batch, measure: bool) -> Tensor:
    """The same as rows `(1, n)` for a batch of one sample, by plain autograd."""
    if len(batch.indices) != 1:
        raise ValueError(f"the loop takes batches of one sample, found {len(batch.indices)}")
    found = reference_gradient(task, parameters, batch, measure)
    values = values_of(task.model, parameters)
    full = {n: torch.zeros_like(values[n]) if (g := found[n]) is None else g for n in parameters.names}
    return flatten(parameters, full).unsqueeze(0)
