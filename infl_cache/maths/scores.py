r"""Scores `s_test . grad_z` from factors and plain columns, without building a gradient where that is cheaper.

For a linear layer with S the (n_out, n_in) part of s_test that belongs to its weight,
:math:`s \cdot g = \sum_t \delta_t^T S a_t + \delta_t \cdot s_{bias}` with inputs `a_t` and output gradients
:math:`\delta_t`. The influence itself (its sign and its 1/n) is one function here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.linear import multiplied_out
from infl_cache.maths.params import unflatten


def influence(dots: Tensor, n_train: int) -> Tensor:
    r"""`influence[j, i] = -(1/n_train) s_test[j] . grad_z[i]` (Koh & Liang 2017, Eq. 2, over n).

    Negative is helpful: more weight on training sample i lowers the loss of test sample j.

    >>> influence(torch.tensor([[2.0]]), 4)
    tensor([[-0.5000]])
    """
    return dots.mul_(-1.0 / n_train)


@dataclass(frozen=True)
class Queries:
    """M rows of s_test, cut up as the gradients are stored.

    `dense` (M, n_dense); `weights[key]` (M, n_out, n_in) and `biases[key]` (M, n_out) of each factored layer.
    """

    count: int
    dense: Tensor
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]


def queries(forms: Forms, s_test: Tensor) -> Queries:
    """Cut s_test rows (M, n_params) into what each stored form is multiplied with."""
    pieces = unflatten(forms.parameters, s_test)
    dense = [pieces[name].reshape(len(s_test), -1) for name in forms.dense]
    return Queries(
        len(s_test),
        torch.cat(dense, 1) if dense else s_test.new_zeros(len(s_test), 0),
        {layer.key: pieces[layer.weight].contiguous() for layer in forms.factored if layer.weight},
        {layer.key: pieces[layer.bias] for layer in forms.factored if layer.bias},
    )


def scores(
    forms: Forms, asked: Queries, factors: dict[str, tuple[Tensor, Tensor]], dense: Tensor, budget: int
) -> Tensor:
    """The dot products `(M, B)` of M queries with B stored gradients, temporaries within about `budget` bytes."""
    total = asked.dense @ dense.T
    for layer in forms.factored:
        inputs, output_grad = factors[layer.key]
        total += _weight_scores(layer, asked.weights[layer.key], inputs, output_grad, budget)
        if layer.bias:
            total += asked.biases[layer.key] @ output_grad.sum(1).T
    return total


def _weight_scores(layer: Layer, weights: Tensor, inputs: Tensor, output_grad: Tensor, budget: int) -> Tensor:
    """The weight's part, contracted directly or by rebuilding gradients tile by tile, whichever is fewer operations.

    Per query and sample the direct way costs T n_in n_out; rebuilding costs T n_in n_out once a sample, then
    n_in n_out per query. With T = 1 that is a tie in operations, and the direct way writes less to memory.
    """
    count = len(weights)
    direct = layer.positions == 1 or count * layer.positions <= layer.positions + count
    temporary = count * layer.positions * layer.n_out if direct else layer.n_in * layer.n_out
    step = max(1, budget // (temporary * inputs.element_size()))
    pieces = []
    for start in range(0, len(inputs), step):
        a, g = inputs[start : start + step], output_grad[start : start + step]
        pieces.append(_direct(weights, a, g) if direct else weights.flatten(1) @ multiplied_out(a, g)[0].flatten(1).T)
    return torch.cat(pieces, 1)


def _direct(weights: Tensor, inputs: Tensor, output_grad: Tensor) -> Tensor:
    """`sum_t,o output_grad[b,t,o] (weights[m] @ input[b,t])[o]` as one matrix product, then a weighted sum."""
    count, n_out, n_in = weights.shape
    size, positions, _ = inputs.shape
    seen = inputs.reshape(-1, n_in) @ weights.reshape(-1, n_in).T  # (B T, M n_out)
    seen = seen.view(size, positions, count, n_out)
    return torch.einsum("btmo,bto->mb", seen, output_grad)
