"""The slow twins: per-sample loops and dense matrices by plain torch.autograd, sharing no code with the package."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from infl_cache import Task


def names_of(task: Task) -> list[str]:
    """All parameters, in the order of a flat vector; shared ones once."""
    return [name for name, _ in task.model.named_parameters()]


def gradient_rows(
    task: Task, indices: Iterable[int], names: Sequence[str] | None = None, data: str = "train", measure: bool = False
) -> Tensor:
    """`d loss(z_i) / d theta` for each index, one backward pass a sample, (len(indices), n_params)."""
    model = copy.deepcopy(task.model).eval()
    named = dict(model.named_parameters())
    chosen = [named[name] for name in (names_of(task) if names is None else names)]
    for parameter in named.values():
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    function = task.measure if measure and task.measure is not None else task.loss
    rows = []
    for index in indices:
        batch = task.collate([getattr(task, data)[index]])
        (value,) = function(task.forward(model, batch), task.targets(batch))
        gradients = (
            torch.autograd.grad(value, chosen, allow_unused=True) if value.requires_grad else [None] * len(chosen)
        )
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(chosen, gradients, strict=True)]
            )
        )
    return torch.stack(rows)


def layer_gradients(layer: nn.Module, inputs: Tensor, weighting: Tensor) -> dict[str, Tensor]:
    """Per-sample gradients of `(layer(inputs) * weighting).sum()` for weight and bias, sample by sample."""
    named = {name: each for name, each in layer.named_parameters() if name in ("weight", "bias")}
    found = [
        torch.autograd.grad((layer(inputs[i : i + 1]) * weighting[i : i + 1]).sum(), list(named.values()))
        for i in range(len(inputs))
    ]
    return {name: torch.stack(each) for name, each in zip(named, zip(*found, strict=True), strict=True)}


class _Bound(nn.Module):
    """The task's forward as a module whose parameters can be swapped."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = copy.deepcopy(task.model).eval()
        self.function = task.forward

    def forward(self, batch: Any) -> Any:
        return self.function(self.model, batch)


class Flat:
    """A task as a function of one flat float64 (or float32) vector of the chosen parameters."""

    def __init__(self, task: Task, names: Sequence[str] | None = None) -> None:
        self.task = task
        self.bound = _Bound(task)
        named = dict(self.bound.model.named_parameters())
        for parameter in named.values():
            parameter.requires_grad_(False)
        self.names = names_of(task) if names is None else list(names)
        self.shapes = [named[name].shape for name in self.names]
        self.theta = torch.cat([named[name].flatten() for name in self.names])

    def outputs(self, theta: Tensor, batch: Any) -> Any:
        pieces = torch.split(theta, [shape.numel() for shape in self.shapes])
        values = {
            f"model.{name}": piece.view(shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }
        return torch.func.functional_call(self.bound, values, (batch,))

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return self.task.loss(outputs, self.task.targets(batch))


def dense_hessian(task: Task, names: Sequence[str] | None = None) -> Tensor:
    """The Hessian of the mean training loss, (n_params, n_params)."""
    flat = Flat(task, names)
    batch = task.collate([task.train[i] for i in range(len(task.train))])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(
            lambda theta: flat.losses(flat.outputs(theta, batch), batch).mean(), flat.theta
        )


def dense_ggn(task: Task, names: Sequence[str] | None = None) -> Tensor:
    """`1/n sum_i J_i^T H_i J_i` with every Jacobian and every Hessian of the loss in the outputs written out."""
    flat = Flat(task, names)
    total = torch.zeros(len(flat.theta), len(flat.theta), dtype=flat.theta.dtype)
    for index in range(len(task.train)):
        batch = task.collate([task.train[index]])
        outputs = flat.outputs(flat.theta, batch)
        leaves = float_leaves(outputs)

        def floats(theta: Tensor, batch: Any = batch) -> Tensor:
            return torch.cat([leaf.flatten() for leaf in float_leaves(flat.outputs(theta, batch))])

        def loss(values: Tensor, batch: Any = batch, outputs: Any = outputs, leaves: list[Tensor] = leaves) -> Tensor:
            pieces = iter(torch.split(values, [leaf.numel() for leaf in leaves]))
            return flat.losses(with_float_leaves(outputs, pieces), batch).sum()

        jacobian = torch.autograd.functional.jacobian(floats, flat.theta)
        at = torch.cat([leaf.flatten() for leaf in leaves])
        total += jacobian.T @ torch.autograd.functional.hessian(loss, at) @ jacobian
    return total / len(task.train)


def float_leaves(value: Any) -> list[Tensor]:
    """The float tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in float_leaves(each)]
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in float_leaves(each)]
    return []


def with_float_leaves(value: Any, pieces: Any) -> Any:
    """The same structure with its float tensors taken from an iterator of flat ones."""
    if isinstance(value, Tensor):
        return next(pieces).view(value.shape) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: with_float_leaves(each, pieces) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_float_leaves(each, pieces) for each in value])
    return value


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest row's distance over that row's norm."""
    distance = torch.linalg.vector_norm((found - expected).double(), dim=-1)
    size = torch.linalg.vector_norm(expected.double(), dim=-1)
    return float((distance / size.clamp_min(1e-300)).max())
