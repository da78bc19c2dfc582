"""Parameters that each sample may be given a copy of its own, and where the copies' batch axis goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from infl_cache.maths.capture.forms import Spread
from infl_cache.maths.capture.tape import Call, recording
from infl_cache.maths.params import Parameters
from infl_cache.maths.probe import probe_batch
from infl_cache.maths.samples import Batch, spread
from infl_cache.maths.task import Task, losses_of, reference_gradient

FEW = 3
MOST_ONES = 3
NEAR = 0.05


class _Copies(Tensor):
    """Copies while they are tried: `table[:T]` would take samples for places, which a small batch does not show."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        if func is Tensor.__getitem__ and isinstance(args[0], cls):
            first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if first is not Ellipsis and not (isinstance(first, slice) and first == slice(None)):
                raise TypeError("copies are not to be indexed along the batch")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def copied(
    task: Task, rest: dict[str, list[tuple[str, str]]], owners: dict[str, list[tuple[str, str]]],
    calls: dict[str, list[Call]], batch: Batch,
) -> list[Spread]:  # fmt: skip
    """Parameters that may be given once a sample; a few samples' gradients tell, all are proved later."""
    named = dict(task.model.named_parameters())
    found: list[Spread] = []
    device = next(task.model.parameters()).device
    few = [batch.indices[i] for i in spread(len(batch.indices), FEW)]
    together = probe_batch(task, few, device)
    only = Parameters(tuple(rest), tuple(tuple(named[name].shape) for name in rest))
    expected = [reference_gradient(task, only, probe_batch(task, [index], device)) for index in few] if rest else []
    for name, places in rest.items():
        if len(owners[name]) != 1:
            continue
        path, attribute = places[0]
        parameter, theirs = named[name], [each[name] for each in expected]
        if all(each is None for each in theirs):  # these samples do not use it, so they cannot tell
            continue
        for ones in _likely_ones(parameter, calls.get(path, [])):
            candidate = Spread(name, path, attribute, ones)
            try:
                with recording(task.model, [], device, [candidate], len(few)) as tape, torch.enable_grad():
                    owner = task.model.get_submodule(path)
                    owner._parameters[attribute] = tape.copies[name].as_subclass(_Copies)  # type: ignore[assignment]
                    ours = tape.backward(losses_of(task, together)[1].sum())[name]
            except Exception:  # shapes that do not broadcast, and whatever else a model makes of them
                continue
            if not any(_far(mine.reshape(parameter.shape), g) for mine, g in zip(ours, theirs, strict=True)):
                found.append(candidate)
                break
    return found


def _far(found: Tensor, expected: Tensor | None) -> bool:
    """Whether two gradients differ by more than a ReLU's kink may explain; what is not finite says nothing."""
    if expected is None:
        return bool(found.any())
    return float((found - expected).norm()) > NEAR * float(expected.norm()) + 1e-6


def _likely_ones(parameter: Tensor, calls: list[Call]) -> list[int]:
    """How many axes of length 1 to try after the batch axis, the likeliest first."""
    every = [*([-1] if parameter.dim() and parameter.shape[0] == 1 else []), *range(MOST_ONES + 1)]
    inputs = [leaf for call in calls[:1] for leaf in tree_leaves(call.args) if isinstance(leaf, Tensor)]
    guess = inputs[0].dim() - 1 - parameter.dim() if inputs else 0
    return sorted(every, key=lambda ones: ones not in (guess, -1))
