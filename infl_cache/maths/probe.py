"""What is tried before any work: the data stay the same, samples do not see each other, gradients arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from infl_cache.errors import BadInput
from infl_cache.maths.digest import sample_digest
from infl_cache.maths.frozen import Frozen
from infl_cache.maths.params import Parameters
from infl_cache.maths.samples import Batch, batches, fetch
from infl_cache.maths.task import Task, losses_of, reference_gradient, requiring_grad


def probe_batch(task: Task, indices: Sequence[int], device: torch.device, name: str = "train") -> Batch:
    """Samples `indices` of the training (or test) set as one batch."""
    return next(batches(getattr(task, name), name, task.collate, [indices], device))


def check_data(dataset: Any, name: str, indices: Sequence[int]) -> list[int]:
    """Digests of samples `indices`; `BadInput` if one differs when it is fetched a second time."""
    first = [sample_digest(fetch(dataset, index, name)) for index in indices]
    for index, digest in zip(indices, first, strict=True):
        if sample_digest(fetch(dataset, index, name)) != digest:
            held = isinstance(dataset, Frozen)
            remedy = (
                "it draws from generators of its own, which cannot be frozen: switch that off"
                if held
                else ("switch off augmentation and shuffling, or hold each sample's draw by --freeze-augmentation")
            )
            raise BadInput(
                f"{name}[{index}]: expected the same sample each time it is fetched, found two different ones; {remedy}"
            )
    return first


def check_independence(task: Task, name: str, indices: Sequence[int], device: torch.device) -> None:
    """`BadInput` if a sample's outputs or loss depend on the other samples of its batch, or on chance."""
    together = probe_batch(task, indices, device, name)
    with torch.no_grad():
        outputs, losses = losses_of(task, together)
        _, again = losses_of(task, together)
        for row, index in enumerate(indices):
            if _differ(losses[row], again[row]):
                raise BadInput(
                    f"{name}[{index}]: expected the same loss each time, found {losses[row].item():.6g} and"
                    f" {again[row].item():.6g}; is there dropout or sampling that eval mode does not switch off?"
                )
        for row, index in enumerate(indices):
            alone, loss = losses_of(task, probe_batch(task, [index], device, name))
            if _differ(losses[row], loss[0]) or any(
                _differ(a[row], b[0]) for a, b in _matching_leaves(outputs, alone, len(indices))
            ):
                raise BadInput(
                    f"{name}[{index}]: expected outputs that do not depend on the other samples of the batch, found"
                    f" loss {losses[row].item():.6g} in a batch of {len(indices)} and {loss[0].item():.6g} alone;"
                    " is there a norm over the batch, or a loss that mixes samples?"
                )


def _matching_leaves(outputs: Any, alone: Any, size: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors that hold one entry a sample in the batch and the same entry alone."""
    pairs = zip(tree_leaves(outputs), tree_leaves(alone), strict=False)
    return [
        (a, b)
        for a, b in pairs
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point()
        and a.dim() == b.dim() > 0 and a.shape[0] == size and b.shape[0] == 1 and a.shape[1:] == b.shape[1:]
    ]  # fmt: skip


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two results of the same arithmetic in another order differ by more than rounding explains."""
    if not a.numel():
        return False
    tolerance = 2e-4 if a.dtype != torch.float64 else 1e-9
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-3)
    return float((a - b).abs().max()) > tolerance * scale


def check_gradients_arrive(task: Task, parameters: Parameters, indices: Sequence[int], device: torch.device) -> None:
    """`BadInput` that names the chosen parameters to which no sample's loss sends a gradient."""
    missing = set(parameters.names)
    for index in indices:
        found = reference_gradient(task, parameters, probe_batch(task, [index], device))
        missing -= {name for name, gradient in found.items() if gradient is not None}
    if missing:
        named = [name for name in parameters.names if name in missing]
        raise BadInput(
            f"parameters: expected every selected one to receive a gradient, found none at {', '.join(named[:6])}"
            f"{', ...' if len(named) > 6 else ''}; leave them out with parameters="
        )


def activation_bytes(task: Task, parameters: Parameters, batch: Batch) -> int:
    """Bytes that one sample's forward pass keeps for its backward pass, measured on `batch`."""
    kept: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in task.model.parameters()}

    def remember(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = max(kept.get(tensor.data_ptr(), 0), tensor.nbytes)
        return tensor

    named = dict(task.model.named_parameters())
    with (
        requiring_grad([named[name] for name in parameters.names]),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
    ):
        losses_of(task, batch)
    return sum(kept.values()) // len(batch.indices) + 1
