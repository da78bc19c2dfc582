"""Per-sample gradients of any model: `torch.func` vmap of the whole model, or a loop where vmap cannot go."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from infl_cache.maths.params import Parameters, flatten
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, outputs_at, per_sample, reference_gradient, values_of


@contextmanager
def vmapping() -> Iterator[None]:
    """For our own calls of vmap: no fused attention kernels, which it cannot follow, and no word of slow operations."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


def mapped_gradients(task: Task, parameters: Parameters, batch: Batch, measure: bool) -> dict[str, Tensor]:
    """Gradients `(B, *shape)` of the given parameters, one vmap over the samples of the batch."""
    leaves, structure = tree_flatten(batch.data)
    split = per_sample_leaves(task, batch)

    def loss_of_one(values: dict[str, Tensor], *own: Tensor) -> Tensor:
        one = list(leaves)
        for index, leaf in zip(split, own, strict=True):
            one[index] = leaf.unsqueeze(0)
        data: Any = tree_unflatten(one, structure)
        return per_sample(task, outputs_at(task, values, data), data, 1, measure)[0]

    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *[0] * len(split)))
    with vmapping():
        found: dict[str, Tensor] = gradient(values_of(task.model, parameters), *[leaves[index] for index in split])
    return found


def per_sample_leaves(task: Task, batch: Batch) -> list[int]:
    """Which leaves of the batch hold one entry a sample along their first axis; the others are shared.

    A shared tensor may happen to be as long as the batch, so the first sample is collated once and twice:
    what is its own grows from one entry to two.
    """
    once, twice = (dict(tree_flatten_with_path(task.collate([batch.first] * count))[0]) for count in (1, 2))

    def grows(path: Any) -> bool:
        a, b = once.get(path), twice.get(path)
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape[:1] == (1,) and b.shape[:1] == (2,)

    return [index for index, (path, _) in enumerate(tree_flatten_with_path(batch.data)[0]) if grows(path)]


def looped_gradients(task: Task, parameters: Parameters, batch: Batch, measure: bool) -> Tensor:
    """The same as rows `(1, n)` for a batch of one sample, by plain autograd."""
    if len(batch.indices) != 1:
        raise ValueError(f"the loop takes batches of one sample, found {len(batch.indices)}")
    found = reference_gradient(task, parameters, batch, measure)
    values = values_of(task.model, parameters)
    full = {n: torch.zeros_like(values[n]) if (g := found[n]) is None else g for n in parameters.names}
    return flatten(parameters, full).unsqueeze(0)
