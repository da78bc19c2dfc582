r"""Gauss-Newton products from the Jacobian of the outputs, captured once a batch and multiplied with K vectors.

.. math:: G v = \frac1n \sum_i J_i^T H_i (J_i v), \qquad J_i = \partial f(x_i) / \partial\theta, \quad
          H_i = \partial^2 L_i / \partial f^2

A forward pass and one backward pass for each of the C outputs give `J_i` of a whole batch, as stored gradients are
had: the two factors of a linear layer's, plain rows of the others. Both products are then matrix products, a few
times less work for each vector than differentiating through the network again; and where the Jacobian of the whole
training set fits into memory, it is captured only once. With C = 1 and stored gradients for J it is the empirical
Fisher matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from infl_cache.maths.capture.cost import choose_factored
from infl_cache.maths.capture.engine import Factors, capture_outputs, multiplied_out
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.curvature.products import loss_hessian
from infl_cache.maths.params import Parameters, flatten, unflatten
from infl_cache.maths.product import add_product
from infl_cache.maths.product import product as multiplied
from infl_cache.maths.samples import Batch
from infl_cache.maths.task import Task


@dataclass(frozen=True)
class Jacobian:
    """C rows of B samples: `factors[key]` is (input (B, n, *in), gradients (B, C, n, *out)), `dense` (B, C, n_dense).

    `hessian` (B, C, C) is that of the loss in the outputs; None for rows that stand for themselves.
    """

    factors: Factors
    dense: Tensor
    hessian: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.dense)

    @property
    def n_bytes(self) -> int:
        """Memory held."""
        parts = [self.dense, *(tensor for pair in self.factors.values() for tensor in pair)]
        unique = {part.data_ptr(): part.nbytes for part in parts}
        return sum(unique.values()) + (0 if self.hessian is None else self.hessian.nbytes)


@dataclass
class Cut:
    """K vectors of n_params, cut up as the rows of a Jacobian are: `dense` (K, n_dense), `values[name]` (K, *shape)."""

    dense: Tensor
    values: dict[str, Tensor]

    @classmethod
    def of(cls, forms: Forms, vectors: Tensor) -> Cut:
        """The parts of vectors (K, n_params)."""
        pieces = unflatten(forms.parameters, vectors)
        dense = [pieces[name].reshape(len(vectors), -1) for name in forms.dense]
        names = {name for layer in forms.factored for name in layer.names}
        return cls(
            torch.cat(dense, 1) if dense else vectors.new_zeros(len(vectors), 0),
            {name: pieces[name].contiguous() for name in names},
        )

    @classmethod
    def zeros(cls, forms: Forms, like: Tensor) -> Cut:
        """The parts of zeros of the shape of `like` (K, n_params)."""
        names = {name for layer in forms.factored for name in layer.names}
        shapes = {name: forms.parameters.shape_of(name) for name in names}
        values = {name: like.new_zeros(len(like), *shape) for name, shape in shapes.items()}
        return cls(like.new_zeros(len(like), forms.n_dense), values)

    def scale_and_add(self, keep: float, other: Cut) -> None:
        """`keep` times this, plus the other, in place."""
        for name, value in self.values.items():
            torch.add(other.values[name], value, alpha=keep, out=value)
        torch.add(other.dense, self.dense, alpha=keep, out=self.dense)

    def joined(self, forms: Forms) -> Tensor:
        """The inverse of `of`: (K, n_params)."""
        sizes = dict(zip(forms.parameters.names, forms.parameters.sizes, strict=True))
        parts = torch.split(self.dense, [sizes[name] for name in forms.dense], dim=1) if forms.dense else ()
        dense = {
            name: part.reshape(len(part), *forms.parameters.shape_of(name))
            for name, part in zip(forms.dense, parts, strict=True)
        }
        return flatten(forms.parameters, {**dense, **self.values}, leading=1)


def forms_for_products(forms: Forms, rows: int, layers: Sequence[Layer] | None = None) -> Forms:
    """The same layers, factored where a product of one vector with `rows` rows a sample is cheaper that way.

    Only `layers` may be factored, by default all that have a rule.
    """
    elsewhere = {name for unit in forms.alone for name in unit.parameters.values()}
    able, asked = {}, {}
    for layer in forms.layers:
        _, direct = RULES[layer.rule].operations(layer.input_shape, layer.grad_shape, layer.gradient_size)
        able[layer.module] = (
            direct is not None
            and (layers is None or layer in layers)
            and "weight" in layer.parameters
            and 0 not in layer.lengths
            and not elsewhere.intersection(layer.names)
        )
        fewer = direct is not None and direct <= rows * layer.gradient_size
        asked[layer.module] = "factored" if fewer else "dense"
    factored = choose_factored(forms.layers, able, asked)
    kept = {layer.module for layer in factored}
    expanded = tuple(replace(layer, input_key="") for layer in forms.layers if layer.module not in kept)
    return replace(forms, factored=factored, expanded=expanded)


def capture_jacobian(task: Task, forms: Forms, batch: Batch) -> Jacobian:
    """The Jacobian of a batch's outputs `(B, ...)`, flattened to C a sample, and the loss's Hessian in them."""
    outputs, rows = capture_outputs(task, forms, batch)
    factors = {
        layer.key: (rows[0][0][layer.key][0], torch.stack([found[layer.key][1] for found, _ in rows], 1))
        for layer in forms.factored
    }
    hessian = loss_hessian(task, outputs, batch.data, len(batch.indices))
    return Jacobian(factors, torch.stack([dense for _, dense in rows], 1), hessian)


def taken(jacobian: Jacobian, at: Tensor) -> Jacobian:
    """The rows of some samples."""
    factors = {key: (a[at], g[at]) for key, (a, g) in jacobian.factors.items()}
    return Jacobian(factors, jacobian.dense[at], None if jacobian.hessian is None else jacobian.hessian[at])


def together(parts: Sequence[Jacobian]) -> Jacobian:
    """The samples of several Jacobians in the same forms, one after the other."""
    factors = {
        key: (torch.cat([part.factors[key][0] for part in parts]), torch.cat([part.factors[key][1] for part in parts]))
        for key in parts[0].factors
    }
    hessians = [part.hessian for part in parts if part.hessian is not None]
    return Jacobian(factors, torch.cat([part.dense for part in parts]), torch.cat(hessians) if hessians else None)


def of_gradients(stored: Forms, forms: Forms, factors: Factors, dense: Tensor) -> Jacobian:
    """Gradients in the forms of the store as single rows in `forms`, which `forms_for_products` made of them."""
    kept = {layer.key for layer in forms.factored}
    columns = Parameters(stored.dense, tuple(stored.parameters.shape_of(name) for name in stored.dense))
    pieces = unflatten(columns, dense) if stored.dense else {}
    for layer in stored.factored:
        if layer.key in kept:
            continue
        for name, piece in multiplied_out(layer, *factors[layer.key]).items():
            pieces[name] = pieces[name] + piece if name in pieces else piece
    wide = Parameters(forms.dense, tuple(forms.parameters.shape_of(name) for name in forms.dense))
    rows = flatten(wide, pieces, leading=1) if forms.dense else dense.new_zeros(len(dense), 0)
    return Jacobian({key: (factors[key][0], factors[key][1].unsqueeze(1)) for key in kept}, rows.unsqueeze(1))


def times(forms: Forms, jacobian: Jacobian, vectors: Cut) -> Tensor:
    """`J_i v`: (B, K, C)."""
    size, rows, _ = jacobian.dense.shape
    total = multiplied(jacobian.dense.flatten(0, 1), vectors.dense).view(size, rows, -1).transpose(1, 2)
    for layer in forms.factored:
        inputs, grads = jacobian.factors[layer.key]
        seen = RULES[layer.rule].seen(layer.settings, vectors.values[layer.parameters["weight"]], inputs)
        if "bias" in layer.parameters:
            seen = seen + vectors.values[layer.parameters["bias"]].unsqueeze(1)
        total = total + seen.flatten(2) @ grads.flatten(2).transpose(1, 2)
    return total


def add_transposed(forms: Forms, jacobian: Jacobian, coefficients: Tensor, total: Cut) -> None:
    """Add `sum_i J_i^T u_i` to `total`, for u (B, K, C)."""
    size, count, rows = coefficients.shape
    across = coefficients.transpose(0, 1).reshape(count, size * rows)
    add_product(total.dense, across, jacobian.dense.flatten(0, 1).T)
    for layer in forms.factored:
        inputs, grads = jacobian.factors[layer.key]
        back = (coefficients @ grads.flatten(2)).view(size, count, *grads.shape[2:])
        rule, weight = RULES[layer.rule], layer.parameters["weight"]
        rule.add_combined(layer.settings, inputs, back, total.values[weight])
        if "bias" in layer.parameters:
            total.values[layer.parameters["bias"]] += back.sum((0, 2))


def product(forms: Forms, jacobians: Iterable[Jacobian], vectors: Tensor) -> Tensor:
    """`sum_i J_i^T H_i J_i v` for each row v of `vectors` (K, n_params)."""
    cut, total = Cut.of(forms, vectors), Cut.zeros(forms, vectors)
    for jacobian in jacobians:
        add_transposed(forms, jacobian, curved(forms, jacobian, cut), total)
    return total.joined(forms)


def curved(forms: Forms, jacobian: Jacobian, vectors: Cut) -> Tensor:
    """`H_i J_i v`: (B, K, C)."""
    coefficients = times(forms, jacobian, vectors)
    return coefficients if jacobian.hessian is None else coefficients @ jacobian.hessian


def steps(
    forms: Forms, jacobians: Iterable[Jacobian], vectors: Tensor, rhs: Tensor, keep: float, part: float
) -> Tensor:
    """`h <- v + keep h - part G h` for each of some batches in turn, G the mean of `J_i^T H_i J_i` over the batch.

    `vectors` and `rhs` are h and v, (K, n_params). Everything is added to h where it lies: memory costs more than sums.
    """
    h, v = Cut.of(forms, vectors.clone()), Cut.of(forms, rhs)
    for jacobian in jacobians:
        coefficients = curved(forms, jacobian, h).mul_(-part / jacobian.size)
        h.scale_and_add(keep, v)
        add_transposed(forms, jacobian, coefficients, h)
    return h.joined(forms)
