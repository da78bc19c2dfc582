"""Run a plan of forms over one batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.errors import BadInput
from infl_cache.maths.capture import linear
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.mapped import looped_gradients, mapped_gradients
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, blaming, losses_of, predictions_of, targets_as_numbers


@dataclass(frozen=True)
class Captured:
    """Per-sample gradients of a batch of B samples.

    `factors[key]` is (input (B, T, n_in), output_grad (B, T, n_out)); `dense` is (B, n_dense);
    `loss` (B,), `target` and `prediction` (B,) as float64, NaN where they are not numbers.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    dense: Tensor
    loss: Tensor
    target: Tensor
    prediction: Tensor


def capture(task: Task, forms: Forms, batch: Batch, measure: bool = False) -> Captured:
    """Gradients of every sample's loss (or measure), in the given forms.

    Equals a loop of `torch.autograd.grad` over single samples. Raises `BadInput` if a layer meets
    more positions than the plan has room for.
    """
    size = len(batch.indices)
    like = next(task.model.parameters())
    with (
        linear.recording(task.model, [layer.module for layer in forms.layers], like.device) as tape,
        torch.enable_grad(),
    ):
        outputs, losses = losses_of(task, batch, measure)
        if forms.layers and losses.requires_grad:
            tape.running = False
            with blaming("backward of the loss"):
                torch.autograd.grad(losses.sum(), tape.anchor)
    found = {layer.key: _factors(tape, layer, batch, layer in forms.factored, like) for layer in forms.layers}
    pieces: dict[str, Tensor] = {}
    for layer in forms.expanded:
        pieces.update(_expanded(layer, *found.pop(layer.key)))
    if forms.mapped:
        pieces.update(_by_engine(task, forms, batch, measure))
    dense = Parameters(forms.dense, tuple(forms.parameters.shape_of(name) for name in forms.dense))
    return Captured(
        found,
        flatten(dense, pieces, leading=1) if forms.dense else losses.new_zeros(size, 0).detach(),
        losses.detach(),
        targets_as_numbers(task, batch.data, size),
        predictions_of(outputs, size),
    )


def rows_of(forms: Forms, captured_factors: dict[str, tuple[Tensor, Tensor]], dense: Tensor) -> Tensor:
    """Plain gradient rows `(B, n_params)`, rebuilt from factors and dense columns."""
    sizes = [forms.parameters.sizes[forms.parameters.names.index(name)] for name in forms.dense]
    pieces = dict(zip(forms.dense, torch.split(dense, sizes, 1) if sizes else (), strict=True))
    for layer in forms.factored:
        pieces.update({name: each.flatten(1) for name, each in _expanded(layer, *captured_factors[layer.key]).items()})
    return torch.cat([pieces[name] for name in forms.parameters.names], dim=1)


def _factors(tape: linear.Tape, layer: Layer, batch: Batch, stored: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's factors, with exactly the positions that the store has room for if they are to be stored."""
    calls = tape.calls.get(layer.module, [])
    if not calls:  # this batch went another way through the model
        shape = (len(batch.indices), layer.positions)
        return like.new_zeros(*shape, layer.n_in), like.new_zeros(*shape, layer.n_out)
    found = linear.factors(calls, len(batch.indices), layer.positions if stored else None)
    if found is None:
        shapes = [tuple(call.input.shape) for call in calls]
        raise BadInput(
            f"layer {layer.module!r}: expected inputs of shape ({len(batch.indices)}, at most {layer.positions},"
            f" {layer.n_in}), found {shapes} at samples {batch.indices[0]} to {batch.indices[-1]};"
            " pad to one length in collate=, or use --form dense"
        )
    return found


def _expanded(layer: Layer, inputs: Tensor, output_grad: Tensor) -> dict[str, Tensor]:
    weight, bias = linear.multiplied_out(inputs, output_grad)
    return {name: each for name, each in ((layer.weight, weight), (layer.bias, bias)) if name is not None}


def _by_engine(task: Task, forms: Forms, batch: Batch, measure: bool) -> dict[str, Tensor]:
    rest = Parameters(forms.mapped, tuple(forms.parameters.shape_of(name) for name in forms.mapped))
    if forms.engine == "vmap":
        return mapped_gradients(task, rest, batch, measure)
    return unflatten(rest, looped_gradients(task, rest, batch, measure))
