r"""Scores `s_test . grad_z` from factors and plain columns, without building a gradient where that is cheaper.

For a linear layer with S the (n_out, n_in) part of s_test that belongs to its weight,
:math:`s \cdot g = \sum_t \delta_t^T S a_t + \delta_t \cdot s_{bias}` with inputs `a_t` and output gradients
:math:`\delta_t`. The influence itself (its sign and its 1/n) is one function here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.capture.engine import Factors
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.params import unflatten
from infl_cache.maths.product import product


def influence(dots: Tensor, n_train: int) -> Tensor:
    r"""`influence[j, i] = -(1/n_train) s_test[j] . grad_z[i]` (Koh & Liang 2017, Eq. 2, over n).

    Negative is helpful: more weight on training sample i lowers the loss of test sample j.

    >>> influence(torch.tensor([[2.0]]), 4)
    tensor([[-0.5000]])
    """
    return dots.mul_(-1.0 / n_train)


@dataclass(frozen=True)
class Queries:
    """M rows of s_test, cut up as the gradients are stored: `dense` (M, n_dense), `values[name]` (M, *shape)."""

    count: int
    dense: Tensor
    values: dict[str, Tensor]


def queries(forms: Forms, s_test: Tensor) -> Queries:
    """Cut s_test rows (M, n_params) into what each stored form is multiplied with."""
    pieces = unflatten(forms.parameters, s_test)
    dense = [pieces[name].reshape(len(s_test), -1) for name in forms.dense]
    return Queries(
        len(s_test),
        torch.cat(dense, 1) if dense else s_test.new_zeros(len(s_test), 0),
        {name: pieces[name].contiguous() for layer in forms.factored for name in layer.names},
    )


def scores(forms: Forms, asked: Queries, factors: Factors, dense: Tensor, budget: int) -> Tensor:
    """The dot products `(M, B)` of M queries with B stored gradients, temporaries within about `budget` bytes."""
    total = product(asked.dense, dense.to(asked.dense.dtype)).to(dense.dtype)
    for layer in forms.factored:
        inputs, output_grad = factors[layer.key]
        weights = asked.values[layer.parameters["weight"]]
        total += _weight_scores(layer, weights, inputs, output_grad, budget)
        if "bias" in layer.parameters:
            bias = RULES[layer.rule].bias_gradient(layer.settings, output_grad)
            total += product(asked.values[layer.parameters["bias"]], bias.to(asked.dense.dtype))
    return total


def _weight_scores(layer: Layer, weights: Tensor, inputs: Tensor, output_grad: Tensor, budget: int) -> Tensor:
    """The weight's part, contracted directly or by rebuilding gradients tile by tile, whichever is fewer operations.

    For M queries the direct way costs `direct` each; rebuilding costs `build` once a sample, then one product of
    the gradient's size for each query.
    """
    rule, count, size = RULES[layer.rule], len(weights), weights[0].numel()
    build, direct = rule.operations(layer.input_shape, layer.grad_shape, size)
    contracted = direct is not None and (direct <= size or count * direct <= build + count * size)
    to_build, to_contract = rule.held(layer.input_shape, layer.grad_shape, size)
    held = count * to_contract if contracted else to_build
    step = max(1, budget // (held * output_grad.element_size()))
    pieces = []
    for start in range(0, len(inputs), step):
        a, g = inputs[start : start + step], output_grad[start : start + step]
        if contracted:
            pieces.append(rule.products(layer.settings, weights, a, g))
        else:
            built = rule.weight_gradient(layer.settings, a, g).flatten(1)
            pieces.append(product(weights.flatten(1), built.to(weights.dtype)))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
