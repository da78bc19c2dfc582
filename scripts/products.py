"""Products of vectors with the curvature of a workload, by infl_cache and by plain PyTorch, one vector after the other.

A way takes (the workload, how many of its training samples, how many of them in a batch) and gives a function of
vectors (K, n_params): the products with the mean over those samples, without damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from measuring import say
from torch import Tensor
from workloads import Workload

from infl_cache.maths.capture import decide_forms
from infl_cache.maths.curvature import Curvature, Rows, captured, output_rows, remembered
from infl_cache.maths.curvature.jacobian import Jacobian
from infl_cache.maths.params import select, unflatten
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, batches, groups_of
from infl_cache.stages.opening import memory_budget

TOGETHER = 32
CPU = torch.device("cpu")

Products = Callable[[Tensor], Tensor]
# Products of one batch with each row of vectors that are cut into the shapes of the parameters, not yet divided.
Single = Callable[[Workload, Tensor, Tensor, Sequence[Sequence[Tensor]]], Iterator[Sequence[Tensor]]]


class TooLarge(Exception):
    """There is no room for what would have to be kept."""


@dataclass(frozen=True)
class Way:
    """One way to a product: its key, what the table calls it, which matrix, how many vectors it is given at once."""

    key: str
    title: str
    kind: str
    together: int
    products: Callable[[Workload, int, int], Products]


def own(workload: Workload, n: int, size: int, kept: bool) -> Products:
    """The operator of stage 2: rows of the outputs' Jacobian, captured anew each time or kept in memory."""
    task = workload.task(n)
    parameters = select(task.model, task.parameters)
    forms, _ = decide_forms(task, parameters, probe_batch(task, range(min(8, n)), CPU), "dense")
    found = output_rows(task, forms, probe_batch(task, range(min(4, n)), CPU), torch.float32, say)
    if found is None:
        raise TooLarge("its outputs cannot be differentiated one by one")
    task, forms, row_bytes, _ = found
    budget = memory_budget(None, CPU) // 3
    if kept and n * row_bytes > budget:
        raise TooLarge(
            f"rows of {n:,} samples take {n * row_bytes / 1e9:.1f} GB, stage 2 would keep {budget / 1e9:.1f}"
        )

    def load() -> Iterator[Batch]:
        return batches(task.train, "train", task.collate, groups_of(0, n, size), CPU)

    samples = remembered(load, budget)
    passes = captured(task, forms, samples)
    if kept:
        passes = remembered(passes, budget, Jacobian.n_bytes.__get__)
    return Curvature(
        task=task,
        parameters=parameters,
        kind="ggn",
        batches=samples,
        pick=lambda indices: batches(task.train, "train", task.collate, [list(indices)], CPU),
        n_train=n,
        damping=0.0,
        dtype=torch.float32,
        rows=Rows(forms, passes, row_bytes),
    )


def looped(workload: Workload, n: int, size: int, single: Single) -> Products:
    """Plain PyTorch: one batch after the other, and for each of them one vector after the other."""
    parameters = select(workload.model, None)
    x, y = (tensor[:n] for tensor in workload.train.tensors)

    def products(vectors: Tensor) -> Tensor:
        pieces = unflatten(parameters, vectors)
        cut = [[pieces[name][k] for name in parameters.names] for k in range(len(vectors))]
        total = torch.zeros_like(vectors)
        for inputs, targets in zip(x.split(size), y.split(size), strict=True):
            for k, found in enumerate(single(workload, inputs, targets, cut)):
                total[k] += torch.cat([each.reshape(-1) for each in found])
        return total.div_(n)

    return products


def fresh_ggn(
    workload: Workload, x: Tensor, y: Tensor, vectors: Sequence[Sequence[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """`J^T H J v`, the graph made anew for each vector."""
    for vector in vectors:
        yield from kept_ggn(workload, x, y, [vector])


def kept_ggn(
    workload: Workload, x: Tensor, y: Tensor, vectors: Sequence[Sequence[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """`J^T H J v` for all vectors through one graph; `J v` is the derivative of `u -> J^T u`, which is linear."""
    parameters = list(workload.model.parameters())
    outputs = workload.model(x)
    zeros = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, parameters, zeros, create_graph=True)
    at = outputs.detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(workload.loss(at, y).sum(), at, create_graph=True)
    for number, vector in enumerate(vectors, 1):
        again = number < len(vectors)
        (forward,) = torch.autograd.grad(transposed, zeros, vector, retain_graph=again)
        (curved,) = torch.autograd.grad(slope, at, forward, retain_graph=again)
        yield torch.autograd.grad(outputs, parameters, curved, retain_graph=again)


def fresh_hessian(
    workload: Workload, x: Tensor, y: Tensor, vectors: Sequence[Sequence[Tensor]]
) -> Iterator[Sequence[Tensor]]:
    """The derivative of the gradient along each vector, the graph made anew for each."""
    parameters = list(workload.model.parameters())
    for vector in vectors:
        loss = workload.loss(workload.model(x), y).sum()
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        yield torch.autograd.grad(gradient, parameters, vector)


WAYS = (
    Way("loop", "double backward, GGN, a graph a vector", "ggn", 1, partial(looped, single=fresh_ggn)),
    Way("hessian", "double backward, Hessian, a graph a vector", "hessian", 1, partial(looped, single=fresh_hessian)),
    Way("graph", "double backward, GGN, one graph kept", "ggn", TOGETHER, partial(looped, single=kept_ggn)),
    Way("anew", "infl_cache, rows captured anew", "ggn", TOGETHER, partial(own, kept=False)),
    Way("kept", "infl_cache, rows kept in memory", "ggn", TOGETHER, partial(own, kept=True)),
)
