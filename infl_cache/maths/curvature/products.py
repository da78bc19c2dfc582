r"""Products with the curvature of one batch by differentiating twice, K vectors at once.

Both are products of reverse-mode derivatives, so every operation that can be differentiated twice will do: `J v` is
the derivative of `u -> J^T u` (which is linear), `H v` that of the gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from infl_cache.errors import BadInput
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, blaming, out_of_memory, outputs_at, per_sample, values_of

Vectors = dict[str, Tensor]


def batch_product(
    task: Task, parameters: Parameters, kind: str, batch: Batch, vectors: Tensor, note: Callable[[str], None],
    plain: bool = False,
) -> Tensor:  # fmt: skip
    """The sum over one batch of `C_i v` for each row v of `vectors` (K, n_params), in their dtype.

    `note` hears of a slower way that had to be taken; a `plain` loop over the vectors is asked for.
    """
    data, theta, dtype = batch.data, values_of(task.model, parameters), vectors.dtype
    fixed: Vectors = {}
    own = next(iter(theta.values())).dtype
    if dtype != own:
        task, data, theta, fixed = _cast(task, data, theta, dtype)
    pieces, size = unflatten(parameters, vectors), len(batch.indices)
    # The fused attention kernels cannot be differentiated twice; the plain one can.
    with sdpa_kernel(SDPBackend.MATH):
        if plain or _one_at_a_time(task.model):
            with _blaming(own, dtype):
                return flatten(parameters, _looped(kind, task, theta, fixed, data, size, pieces), leading=1)
        try:
            single = (_ggn if kind == "ggn" else _hessian)(task, theta, fixed, data, size)
            found = vmap(single)(pieces)
        except BadInput:
            raise
        except Exception as error:  # custom operations that torch.func or vmap has no rule for
            if out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:160]
            note(f"torch.func cannot follow this model, products go one vector at a time ({reason})")
            with _blaming(own, dtype):
                found = _looped(kind, task, theta, fixed, data, size, pieces)
    return flatten(parameters, found, leading=1)


def _one_at_a_time(model: nn.Module) -> bool:
    """Whether a loop over the vectors is the faster way: on a CPU that is so where the model convolves."""
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return on_cpu and any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def _looped(kind: str, task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int, pieces: Vectors) -> Vectors:
    """One vector after the other through one graph."""
    single = by_plain_autograd(kind, task, theta, fixed, data, size)
    count = len(next(iter(pieces.values())))
    each = [single({name: piece[k] for name, piece in pieces.items()}) for k in range(count)]
    return {name: torch.stack([one[name] for one in each]) for name in pieces}


@contextmanager
def _blaming(own: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """Say whose failure it is, and what would help where the arithmetic is not the model's own."""
    try:
        with blaming("second derivative of the model or loss"):
            yield
    except BadInput as error:
        if dtype == own:
            raise
        hint = f"--solve-dtype {str(own).removeprefix('torch.')}"
        raise BadInput(f"the model or loss cannot be computed in {dtype}; use {hint}\n{error}") from error


def _cast(task: Task, data: Any, theta: Vectors, dtype: torch.dtype) -> tuple[Task, Any, Vectors, Vectors]:
    """The task with its loss, the batch, the parameters and everything else of the model in `dtype`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    model, loss = task.model, task.loss
    if isinstance(loss, nn.Module):
        loss = copy.deepcopy(loss).to(dtype)
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rest = {name: cast(value.detach()) for name, value in every.items() if name not in theta}
    cast_theta = {name: cast(value) for name, value in theta.items()}
    return replace(task, loss=loss), tree_map_only(Tensor, cast, data), cast_theta, rest


def _hessian(task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int) -> Callable[[Vectors], Vectors]:
    """`v -> H v`, summed over the batch."""

    def total(values: Vectors) -> Tensor:
        return per_sample(task, outputs_at(task, {**fixed, **values}, data), data, size).sum()

    return _pullback(grad(total), theta)


def _ggn(task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int) -> Callable[[Vectors], Vectors]:
    """`v -> J^T (d2 loss / d outputs2) J v`, summed over the batch."""
    split = _Outputs(task, fixed, data, size)
    outputs = split.floats(theta)
    transposed = _pullback(split.floats, theta)
    forward = _pullback(transposed, tuple(torch.zeros_like(each) for each in outputs))
    of_loss = _pullback(grad(split.loss), outputs)
    return lambda v: transposed(of_loss(forward(v)))


class _Outputs:
    """The model's outputs as a tuple of their float tensors, and the loss as a function of that tuple."""

    def __init__(self, task: Task, fixed: Vectors, data: Any, size: int) -> None:
        self._task, self._fixed, self._data, self._size = task, fixed, data, size
        self._structure: Any = None
        self._others: dict[int, Any] = {}

    def floats(self, values: Vectors) -> tuple[Tensor, ...]:
        outputs = outputs_at(self._task, {**self._fixed, **values}, self._data)
        leaves, self._structure = tree_flatten(outputs)
        self._others = {i: leaf for i, leaf in enumerate(leaves) if not _differentiable(leaf)}
        if len(self._others) == len(leaves):
            raise BadInput(
                f"outputs: expected a float tensor, or tuples, lists or dicts of them, found {type(outputs).__name__};"
                " use --curvature hessian, or a forward= that returns tensors"
            )
        return tuple(leaf for leaf in leaves if _differentiable(leaf))

    def loss(self, floats: tuple[Tensor, ...]) -> Tensor:
        own, others = iter(floats), self._others
        count = len(floats) + len(others)
        leaves = [others[i] if i in others else next(own) for i in range(count)]
        return per_sample(self._task, tree_unflatten(leaves, self._structure), self._data, self._size).sum()


def by_plain_autograd(
    kind: str, task: Task, theta: Vectors, fixed: Vectors, data: Any, size: int
) -> Callable[[Vectors], Vectors]:
    """The same products one vector at a time by double backward, for operations that `torch.func` does not know."""
    theta = {name: value.detach().clone().requires_grad_(True) for name, value in theta.items()}
    at = tuple(theta.values())
    split = _Outputs(task, fixed, data, size)

    def derivative(
        of: Sequence[Tensor], by: Sequence[Tensor], along: Sequence[Tensor], again: bool = False
    ) -> list[Tensor]:
        found = torch.autograd.grad(of, by, along, create_graph=again, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(b) if f is None else f for f, b in zip(found, by, strict=True)]

    with torch.enable_grad():
        if kind == "hessian":
            loss = per_sample(task, outputs_at(task, {**fixed, **theta}, data), data, size).sum()
            gradient = derivative([loss], at, [torch.ones_like(loss)], again=True)
            attached = [g if g.requires_grad else g + 0 * a for g, a in zip(gradient, at, strict=True)]
            return lambda v: dict(zip(theta, derivative(attached, at, [v[name] for name in theta]), strict=True))
        # An output that does not depend on the parameters is attached to them by a zero.
        outputs = tuple(o if o.requires_grad else o + 0 * at[0].sum() for o in split.floats(theta))
        leaves = tuple(each.detach().requires_grad_(True) for each in outputs)
        loss = split.loss(leaves)
        of_loss = derivative([loss], leaves, [torch.ones_like(loss)], again=True)
        of_loss = [g if g.requires_grad else g + 0 * leaf for g, leaf in zip(of_loss, leaves, strict=True)]
        zeros = [torch.zeros_like(each, requires_grad=True) for each in outputs]
        transposed = derivative(outputs, at, zeros, again=True)
        attached = [t if t.requires_grad else t + 0 * a for t, a in zip(transposed, at, strict=True)]

    def product(v: Vectors) -> Vectors:
        forward = derivative(attached, zeros, [v[name] for name in theta])
        return dict(zip(theta, derivative(outputs, at, derivative(of_loss, leaves, forward)), strict=True))

    return product


def _pullback(function: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    """`u -> J^T u` of a function of one argument, with J at `at`; its transpose again if the function is linear."""
    transposed = vjp(function, at)[1]
    return lambda u: transposed(u)[0]


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def loss_hessian(task: Task, outputs: Tensor, data: Any, size: int) -> Tensor:
    """The Hessian (B, C, C) of each sample's loss in its outputs `(B, ...)`, C numbers a sample."""
    shape, flat = outputs.shape, outputs.detach().reshape(size, -1)

    def total(at: Tensor) -> Tensor:
        return per_sample(task, at.reshape(shape), data, size).sum()

    count = flat.shape[1]
    basis = torch.eye(count, dtype=flat.dtype, device=flat.device).unsqueeze(1).expand(count, size, count)
    with blaming("second derivative of the loss"), torch.enable_grad():
        at = flat.clone().requires_grad_(True)
        # What does not depend on the outputs, or only linearly, is attached to them by a zero.
        (first,) = torch.autograd.grad(total(at) + 0 * at.sum(), at, create_graph=True)
        first = first if first.requires_grad else first + 0 * at
        # One after the other: C passes through the loss are little beside the C through the model.
        parts = [torch.autograd.grad(first, at, each, retain_graph=True, allow_unused=True)[0] for each in basis]
    columns = torch.stack([torch.zeros_like(flat) if part is None else part for part in parts])
    return columns.transpose(0, 1).contiguous()
