"""Per-sample gradients of one module without a rule: vmap of it alone, from inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from infl_cache.maths.capture.forms import Alone
from infl_cache.maths.capture.mapped import vmapping
from infl_cache.maths.capture.tape import Call
from infl_cache.maths.model import called_at


def alone_gradients(model: nn.Module, unit: Alone, calls: Sequence[Call]) -> dict[str, Tensor]:
    """Gradients `(B, *shape)` of the unit's parameters, by their names in the model, summed over its calls."""
    module = model.get_submodule(unit.module)
    named = dict(model.named_parameters())
    values = {inner: named[name].detach() for inner, name in unit.parameters.items()}
    total: dict[str, Tensor] = {}
    for call in calls:
        for inner, gradient in _of_one_call(module, unit, call, values).items():
            name = unit.parameters[inner]
            total[name] = total[name] + gradient if name in total else gradient
    return total


def _of_one_call(module: nn.Module, unit: Alone, call: Call, values: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves, structure = tree_flatten((call.args, dict(call.named)))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    like = next(iter(values.values()))
    grads = [
        like.new_zeros(shape) if grad is None else grad for grad, shape in zip(call.grads, call.shapes, strict=True)
    ]
    n_inputs = len(places)

    def of_one_sample(*tensors: Tensor) -> Any:
        own = list(leaves)
        for place, axis, tensor in zip(places, unit.inputs, tensors[:n_inputs], strict=True):
            own[place] = tensor if axis is None else tensor.unsqueeze(axis)
        args, named = tree_unflatten(own, structure)

        def outputs(at: dict[str, Tensor]) -> list[Tensor]:
            found = tree_leaves(called_at(module, at, args, named))
            return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]

        back = [
            g if axis is None else g.unsqueeze(axis) for axis, g in zip(unit.outputs, tensors[n_inputs:], strict=True)
        ]
        return torch.func.vjp(outputs, values)[1](back)[0]

    tensors, axes = [*(leaves[i] for i in places), *grads], (*unit.inputs, *unit.outputs)
    with torch.enable_grad(), vmapping():
        if unit.engine == "vmap":
            found: dict[str, Tensor] = torch.func.vmap(of_one_sample, in_dims=axes)(*tensors)
        else:
            found = _looped(of_one_sample, tensors, axes)
    return {name: gradient.detach() for name, gradient in found.items()}


def _looped(
    function: Callable[..., dict[str, Tensor]], tensors: Sequence[Tensor], axes: Sequence[int | None]
) -> dict[str, Tensor]:
    """What vmap would give, one sample after the other."""
    size = next(tensor.shape[axis] for tensor, axis in zip(tensors, axes, strict=True) if axis is not None)
    rows = [
        function(*[t if axis is None else t.select(axis, row) for t, axis in zip(tensors, axes, strict=True)])
        for row in range(size)
    ]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
