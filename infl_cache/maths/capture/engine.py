"""Run a plan of forms over one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from infl_cache.errors import BadInput
from infl_cache.maths.capture.alone import alone_gradients
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.mapped import looped_gradients, mapped_gradients
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.capture.tape import Call, Tape, once_a_sample, recording
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, blaming, losses_of, predictions_of, targets_as_numbers

Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Captured:
    """Per-sample gradients of a batch of B samples.

    `factors[key]` is (input (B, n, *in), output_grad (B, n, *out)); `dense` is (B, n_dense);
    `loss` (B,), `target` and `prediction` (B,) as float64, NaN where they are not numbers.
    """

    factors: Factors
    dense: Tensor
    loss: Tensor
    target: Tensor
    prediction: Tensor


def capture(task: Task, forms: Forms, batch: Batch, measure: bool = False) -> Captured:
    """Gradients of every sample's loss (or measure), in the given forms.

    Equals a loop of `torch.autograd.grad` over single samples. Raises `BadInput` if a layer that is stored as
    factors meets other shapes than the plan has room for.
    """
    size = len(batch.indices)
    copies: dict[str, Tensor] = {}
    with _watching(task, forms, size) as tape, torch.enable_grad():
        outputs, losses = losses_of(task, batch, measure)
        if (forms.layers or forms.alone or forms.spread) and losses.requires_grad:
            with blaming("backward of the loss"):
                copies = tape.backward(losses.sum())
    factors, pieces = _gathered(task, forms, tape, batch, copies)
    if forms.mapped:
        _add(pieces, _by_engine(task, forms, batch, measure))
    return Captured(
        factors,
        _side_by_side(forms, pieces, losses),
        losses.detach(),
        targets_as_numbers(task, batch.data, size),
        predictions_of(outputs, size),
    )


def capture_outputs(task: Task, forms: Forms, batch: Batch) -> tuple[Tensor, list[tuple[Factors, Tensor]]]:
    """The outputs of a batch, and the gradients of each of them in turn, from one forward pass.

    The outputs must be a float tensor `(B, ...)`, the forms without `mapped` parameters. Pair c is what `capture`
    would give as `factors` and `dense` for the loss `outputs.flatten(1)[:, c]`.
    """
    size = len(batch.indices)
    with _watching(task, forms, size) as tape, torch.enable_grad():
        with blaming("model"):
            outputs = task.forward(task.model, batch.data)
        flat = outputs.reshape(size, -1)
        found = []
        for c in range(flat.shape[1]):
            with blaming("backward of the outputs"):
                copies = tape.backward(flat[:, c].sum(), again=c + 1 < flat.shape[1])
            factors, pieces = _gathered(task, forms, tape, batch, copies)
            found.append((factors, _side_by_side(forms, pieces, flat)))
    return outputs.detach(), found


@contextmanager
def _watching(task: Task, forms: Forms, size: int) -> Iterator[Tape]:
    """Record, inside, what the forms need of a forward and a backward pass."""
    watched = [layer.module for layer in forms.layers if not layer.within] + [unit.module for unit in forms.alone]
    attention = tuple({layer.within for layer in forms.layers if layer.within})
    common = {layer.module: len(layer.grad_shape) - 1 for layer in forms.layers if layer.axes[1] < 0}
    device = next(task.model.parameters()).device
    with recording(task.model, list(dict.fromkeys(watched)), device, forms.spread, size, common, attention) as tape:
        yield tape


def _gathered(
    task: Task, forms: Forms, tape: Tape, batch: Batch, copies: Mapping[str, Tensor]
) -> tuple[Factors, dict[str, Tensor]]:
    """After a backward pass: stored factors, and plain gradients `(B, *shape)` of all but the mapped parameters."""
    size = len(batch.indices)
    pieces = {name: grad.reshape(size, *forms.parameters.shape_of(name)) for name, grad in copies.items()}
    with torch.no_grad():
        factors = _stored_factors(task, forms, tape, batch)
        for layer in forms.expanded:
            _add(pieces, _expanded_calls(task, layer, tape.calls.get(layer.module, []), size))
    for unit in forms.alone:
        _add(pieces, alone_gradients(task.model, unit, tape.calls.get(unit.module, [])))
    for name, piece in pieces.items():
        if len(piece) != size:
            raise BadInput(
                f"gradient of {name}: expected {size} samples, found {len(piece)}; does a layer see some only?"
            )
    return factors, pieces


def rows_of(forms: Forms, factors: Factors, dense: Tensor) -> Tensor:
    """Plain gradient rows `(B, n_params)`, rebuilt from factors and dense columns."""
    return flatten(forms.parameters, gradients_of(forms, factors, dense), leading=1)


def gradients_of(forms: Forms, factors: Factors, dense: Tensor) -> dict[str, Tensor]:
    """Gradients `(B, *shape)` of every parameter, rebuilt from factors and dense columns."""
    columns = Parameters(forms.dense, tuple(forms.parameters.shape_of(name) for name in forms.dense))
    pieces = unflatten(columns, dense) if forms.dense else {}
    for layer in forms.factored:
        _add(pieces, multiplied_out(layer, *factors[layer.key]))
    return pieces


def multiplied_out(layer: Layer, inputs: Tensor, output_grad: Tensor) -> dict[str, Tensor]:
    """The gradients `(B, *shape)` of a layer's chosen parameters, by their names in the model."""
    rule, found = RULES[layer.rule], {}
    if "weight" in layer.parameters:
        found[layer.parameters["weight"]] = rule.weight_gradient(layer.settings, inputs, output_grad)
    if "bias" in layer.parameters:
        found[layer.parameters["bias"]] = rule.bias_gradient(layer.settings, output_grad)
    return found


def by_position(tensor: Tensor, size: int, axis: int, event: int, length: int = 0) -> Tensor:
    """A layer's input or output as `(B, n, *event)`: the batch axis first, all others before the event in n.

    Raises `ValueError` if the batch axis cannot be told apart into samples of `length` (0 is any) entries.
    """
    if tensor.shape[axis] % size or length not in (0, tensor.shape[axis] // size):
        raise ValueError(f"expected {length or 'some'} entries for each of {size} samples along axis {axis}")
    moved = tensor.movedim(axis, 0)
    return moved.reshape(size, -1, *moved.shape[moved.dim() - event :])


def _add(pieces: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """A parameter that several layers use has the sum of their gradients."""
    for name, each in more.items():
        pieces[name] = pieces[name] + each if name in pieces else each


def _factors_of_call(task: Task, layer: Layer, call: Call, size: int) -> tuple[Tensor, Tensor]:
    rule, module = RULES[layer.rule], task.model.get_submodule(layer.within or layer.module)
    into, out = rule.events(module, call)
    raw = call.grad(next(task.model.parameters()))
    inputs = rule.prepare(module, call.input) if "weight" in layer.parameters else call.input
    if layer.axes[0] < 0:
        inputs = once_a_sample(inputs, size, into)
    try:
        return (
            by_position(inputs, size, max(0, layer.axes[0]), into, layer.lengths[0]),
            by_position(raw, size, max(0, layer.axes[1]), out, layer.lengths[1]),
        )
    except ValueError as error:
        raise BadInput(
            f"layer {layer.module!r}: {error} as in the first samples, found inputs {tuple(inputs.shape)} and outputs"
            f" {tuple(raw.shape)}; does it see some samples only, or padding taken out? pad to one length in collate="
        ) from error


def _expanded_calls(task: Task, layer: Layer, calls: list[Call], size: int) -> dict[str, Tensor]:
    pieces: dict[str, Tensor] = {}
    for call in calls:
        _add(pieces, multiplied_out(layer, *_factors_of_call(task, layer, call, size)))
    return pieces


def _stored_factors(task: Task, forms: Forms, tape: Tape, batch: Batch) -> Factors:
    """What the store has room for: each factored layer's input and output gradient, over all its calls."""
    size, like = len(batch.indices), next(task.model.parameters())
    factors: Factors = {}
    for layer in forms.factored:
        calls = tape.calls.get(layer.module, [])
        if calls:
            try:
                pairs = [_factors_of_call(task, layer, call, size) for call in calls]
                inputs, grads = (torch.cat(each, 1) if len(pairs) > 1 else each[0] for each in zip(*pairs, strict=True))
            except RuntimeError:  # shapes that cannot be brought together
                inputs = grads = like.new_zeros(0, 0)
        else:  # this batch went another way through the model
            inputs, grads = like.new_zeros(size, *layer.input_shape), like.new_zeros(size, *layer.grad_shape)
        factors[layer.key] = (
            _filled(layer, layer.input_shape, inputs, batch),
            _filled(layer, layer.grad_shape, grads, batch),
        )
    _refuse_other_inputs(forms, factors, batch)
    return factors


def _filled(layer: Layer, shape: tuple[int, ...], found: Tensor, batch: Batch) -> Tensor:
    """Exactly the positions that the store has room for; zeros in the missing ones add nothing to a gradient."""
    missing = shape[0] - found.shape[1] if found.shape[2:] == shape[1:] else -1
    if missing < 0:
        raise BadInput(
            f"layer {layer.module!r}: expected inputs or outputs of shape"
            f" ({', '.join(map(str, (len(batch.indices), f'at most {shape[0]}', *shape[1:])))}),"
            f" found {tuple(found.shape)} at samples {batch.indices[0]} to"
            f" {batch.indices[-1]}; pad to one length in collate=, or use --form dense"
        )
    return F.pad(found, (0, 0) * (found.dim() - 2) + (0, missing)) if missing else found


def _refuse_other_inputs(forms: Forms, factors: Factors, batch: Batch) -> None:
    """A layer that shares another one's stored input must still see the very same."""
    for layer in forms.factored:
        if layer.input_key:
            ours, theirs = factors[layer.key][0], factors[layer.input_key][0]
            same = ours.data_ptr() == theirs.data_ptr() or torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
            if not same:
                raise BadInput(
                    f"layer {layer.module!r}: expected the input of layer {layer.input_key!r} as in the first samples,"
                    f" found another at samples {batch.indices[0]} to {batch.indices[-1]}; use --form dense"
                )


def _side_by_side(forms: Forms, pieces: dict[str, Tensor], losses: Tensor) -> Tensor:
    """The plain columns `(B, n_dense)`; zeros for a parameter that this batch did not use."""
    size = len(losses)
    if not forms.dense:
        return losses.new_zeros(size, 0).detach()
    dense = Parameters(forms.dense, tuple(forms.parameters.shape_of(name) for name in forms.dense))
    like = next((piece for piece in pieces.values()), losses)
    full = {
        name: pieces[name] if name in pieces else like.new_zeros(size, *shape)
        for name, shape in zip(dense.names, dense.shapes, strict=True)
    }
    return flatten(dense, full, leading=1).detach()


def _by_engine(task: Task, forms: Forms, batch: Batch, measure: bool) -> dict[str, Tensor]:
    rest = Parameters(forms.mapped, tuple(forms.parameters.shape_of(name) for name in forms.mapped))
    if forms.engine == "vmap":
        return mapped_gradients(task, rest, batch, measure)
    return unflatten(rest, looped_gradients(task, rest, batch, measure))
