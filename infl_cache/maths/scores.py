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
from infl_cache.maths.parts import Part, whole
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
    """M rows of s_test, what belongs to `part` of them, cut up as the gradients are stored.

    `dense` (M, plain columns of the part), `values[name]` (M, *shape).
    """

    part: Part
    dense: Tensor
    values: dict[str, Tensor]


def queries(forms: Forms, s_test: Tensor, part: Part | None = None) -> Queries:
    """Cut rows of s_test (M, n_params), or their columns of `part` alone, into what each stored form is scored by."""
    part = whole(forms) if part is None else part
    pieces = torch.split(s_test, [at.stop - at.start for _, at in part.spans], dim=1)
    names = [name for name, _ in part.spans]
    plain = [piece for name, piece in zip(names, pieces, strict=True) if name not in part.names]
    dense = torch.cat(plain, 1) if plain and part.names else s_test if plain else s_test.new_zeros(len(s_test), 0)
    shape_of = forms.parameters.shape_of
    return Queries(
        part,
        dense,
        {name: piece.reshape(len(s_test), *shape_of(name)).contiguous()
         for name, piece in zip(names, pieces, strict=True) if name in part.names},
    )  # fmt: skip


def scores(forms: Forms, asked: Queries, factors: Factors, dense: Tensor, budget: int) -> Tensor:
    """The dot products `(M, B)` of M whole queries with B stored gradients, temporaries within about `budget` bytes."""
    total = plain_scores(asked, dense, 0)
    add_factored_scores(asked, factors, budget, total)
    return total


def plain_scores(asked: Queries, dense: Tensor, start: int) -> Tensor:
    """What plain columns `dense` (B, some), the part's from `start` on, give to the scores: (M, B)."""
    columns = asked.dense[:, start : start + dense.shape[1]]
    return product(columns, dense.to(columns.dtype)).to(dense.dtype)


def add_factored_scores(asked: Queries, factors: Factors, budget: int, total: Tensor) -> None:
    """Add to `total` (M, B) what the factors of B samples give, temporaries within about `budget` bytes."""
    for layer in asked.part.layers:
        inputs, output_grad = factors[layer.key]
        if (weight := layer.parameters["weight"]) in asked.values:
            total += _weight_scores(layer, asked.values[weight], inputs, output_grad, budget)
        if (bias := layer.parameters.get("bias")) in asked.values:
            gradient = RULES[layer.rule].bias_gradient(layer.settings, output_grad)
            total += product(asked.values[bias], gradient.to(asked.dense.dtype))


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
