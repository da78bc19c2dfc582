"""Operations of a sample, counted and not timed: on a model of any size, on the `meta` device too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.curvature.jacobian import forms_for_products
from infl_cache.maths.curvature.rows import MOST_OUTPUTS
from infl_cache.maths.params import Parameters
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task, requiring_grad

# Differentiating twice: a pass forwards with its tangent, and one backwards, for each vector.
PASSES_A_PRODUCT = 2


@dataclass(frozen=True)
class Counts:
    """Floating-point operations (a multiplication and an addition are two) of one sample.

    `forward` and `backward` of the network; `build` for the plain rows of what is stored so; `rebuild` once and
    `score` for each test sample in stage 3; `rows` to capture the Jacobian's rows of `outputs` outputs, of
    `row_numbers` numbers, and `vector` for a product of them with one vector; both 0 where a product must
    differentiate twice, which costs `twice`. `pair` is an inner product of two gradients, for the Fisher matrix.
    """

    forward: float
    backward: float
    build: float
    rebuild: float
    score: float
    outputs: int
    rows: float
    row_numbers: int
    vector: float
    twice: float
    pair: float


def count(task: Task, parameters: Parameters, forms: Forms, batch: Batch) -> Counts:
    """Count one batch's forward and backward pass (`torch.utils.flop_counter`) and the rest from the layers' shapes."""
    size = len(batch.indices)
    named = dict(task.model.named_parameters())
    chosen = [named[name] for name in parameters.names]
    with requiring_grad(chosen), torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            outputs = task.forward(task.model, batch.data)
            losses = task.loss(outputs, task.targets(batch.data))
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(losses.sum(), chosen, allow_unused=True)
    ahead, back = forward.get_total_flops() / size, backward.get_total_flops() / size
    build = 2.0 * sum(_operations(layer)[0] for layer in forms.expanded)
    rebuild, score, pair = 0.0, 2.0 * forms.n_dense, 2.0 * forms.n_dense
    for layer in forms.factored:
        whole, direct = _operations(layer)
        contracted = direct is not None and direct <= layer.gradient_size
        rebuild += 0.0 if contracted else 2.0 * whole
        score += 2.0 * (direct if contracted and direct is not None else layer.gradient_size)
        pair += 2.0 * min(layer.gradient_size, layer.factor_size * max(1, layer.grad_shape[0]))
    able = isinstance(outputs, Tensor) and outputs.shape[:1] == (size,) and not forms.mapped
    numbers = outputs.numel() // size if isinstance(outputs, Tensor) else 0
    rows, row_numbers, vector = (
        _rows(forms, numbers, ahead, back) if able and 0 < numbers <= MOST_OUTPUTS else (0, 0, 0)
    )
    twice = PASSES_A_PRODUCT * (ahead + back)
    return Counts(ahead, back, build, rebuild, score, numbers, rows, row_numbers, vector, twice, pair)


def _operations(layer: Layer) -> tuple[int, int | None]:
    return RULES[layer.rule].operations(layer.input_shape, layer.grad_shape, layer.gradient_size)


def _rows(forms: Forms, outputs: int, forward: float, backward: float) -> tuple[float, int, float]:
    """Of the outputs' Jacobian: operations to capture a sample's rows, their numbers, operations of a product."""
    made = forms_for_products(forms, outputs)
    build = sum(_operations(layer)[0] for layer in made.expanded)
    numbers, operations = outputs * made.n_dense, 2.0 * outputs * made.n_dense
    for layer in made.factored:
        grads = outputs * (layer.factor_size if layer.input_key else 0)
        if not layer.input_key:
            own = 1
            for length in layer.input_shape:
                own *= length
            grads = own + outputs * (layer.factor_size - own)
        numbers += grads
        operations += 2.0 * ((_operations(layer)[1] or 0) + grads)
    # There and back again: J v, then J^T of what became of it.
    return forward + outputs * (backward + 2.0 * build), numbers, 2 * operations
