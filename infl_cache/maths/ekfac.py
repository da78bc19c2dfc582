r"""EK-FAC: the Gauss-Newton matrix, layer by layer, as a diagonal in a Kronecker-factored eigenbasis.

For a linear layer with inputs a and pseudo-gradients :math:`\delta` of its outputs,

.. math:: A = \frac1n \sum a a^T = Q_A D_A Q_A^T, \quad B = \frac1n \sum \delta \delta^T = Q_B D_B Q_B^T, \quad
          \Lambda_{oi} = \frac1n \sum_{j, r} (Q_B^T\, \nabla W_{j,r}\, Q_A)_{oi}^2

and the layer's block is :math:`(Q_B \otimes Q_A)\,\mathrm{diag}(\Lambda)\,(Q_B \otimes Q_A)^T`: the best diagonal in
that basis (George et al. 2018, Fast approximate natural gradient descent in a Kronecker-factored eigenbasis; Grosse et
al. 2023 use it for influences). The pseudo-gradients are :math:`J_j^T S_j` with :math:`S_j S_j^T = H_j`, the Hessian of
the loss in the outputs: the sum over them is the Gauss-Newton matrix itself, nothing is sampled. A convolution's bases
come from the second moments of its gradients along their two sides, as in Shampoo (Gupta et al. 2018), with the same
diagonal. What has no two sides (norms, biases, shared or very wide weights) keeps its own diagonal.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from infl_cache.maths.capture.engine import multiplied_out
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.curvature.jacobian import Jacobian
from infl_cache.maths.curvature.operator import require_finite
from infl_cache.maths.curvature.rows import Rows
from infl_cache.maths.params import Parameters, flatten, unflatten

# A side of a weight beyond this would need an eigendecomposition of minutes to hours.
WIDEST = 8192
# Numbers of gradients that are multiplied out at a time.
AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Kronecker:
    """A weight's block: orthonormal `left` (out, out) and `right` (in, in), `values` (out, in) in their basis."""

    left: Tensor
    right: Tensor
    values: Tensor


@dataclass(frozen=True)
class EKFAC:
    """The fitted approximation: a `Kronecker` block for some parameters, a diagonal `(*shape)` for the others."""

    parameters: Parameters
    blocks: Mapping[str, Kronecker]
    diagonals: Mapping[str, Tensor]

    def solve(self, rows: Tensor, shift: float) -> Tensor:
        """`(C + shift I)^-1 v` for rows v (K, n_params), C being the approximation.

        What is zero but for rounding is raised to rounding: without damping, too, nothing is divided by zero.
        """

        def inverse(values: Tensor) -> Tensor:
            limits = torch.finfo(values.dtype)
            least = max(limits.tiny, limits.eps * float(values.max()))
            return (values + shift).clamp_min(least).reciprocal()

        return self._apply(rows, inverse)

    def times(self, rows: Tensor) -> Tensor:
        """`C v` for rows v (K, n_params)."""
        return self._apply(rows, lambda values: values)

    def _apply(self, rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
        found = {}
        for name, piece in unflatten(self.parameters, rows).items():
            if name in self.blocks:
                block = self.blocks[name]
                matrix = piece.reshape(len(rows), *block.values.shape)
                inner = (block.left.T @ matrix @ block.right) * of(block.values)
                found[name] = (block.left @ inner @ block.right.T).reshape(piece.shape)
            else:
                found[name] = piece * of(self.diagonals[name])
        return flatten(self.parameters, found, leading=1)

    def state(self) -> dict[str, Tensor]:
        """Plain named tensors."""
        parts = {f"diagonal:{name}": tensor for name, tensor in self.diagonals.items()}
        for name, block in self.blocks.items():
            parts |= {f"left:{name}": block.left, f"right:{name}": block.right, f"values:{name}": block.values}
        return parts

    @classmethod
    def of_state(cls, parameters: Parameters, state: Mapping[str, Tensor], like: Tensor) -> EKFAC:
        """The inverse of `state`, on the device of `like` and in its type."""
        blocks, diagonals = {}, {}
        for name in parameters.names:
            if f"diagonal:{name}" in state:
                diagonals[name] = state[f"diagonal:{name}"].to(like)
            else:
                blocks[name] = Kronecker(*(state[f"{part}:{name}"].to(like) for part in ("left", "right", "values")))
        return cls(parameters, blocks, diagonals)


def fit(rows: Rows, n: int) -> EKFAC:
    """Two passes over the Jacobian rows of `n` samples: the bases, then the values in them."""
    forms = rows.forms
    sides = sides_with_bases(forms)
    moments: dict[str, list[Tensor]] = {}
    for jacobian in rows.passes():
        for name, left, right in _moments(forms, pseudo(jacobian), sides):
            if name in moments:
                moments[name] = [moments[name][0].add_(left), moments[name][1].add_(right)]
            else:
                moments[name] = [left.double(), right.double()]
    require_finite(all(bool(torch.isfinite(each).all()) for pair in moments.values() for each in pair))
    bases = {name: [torch.linalg.eigh(each / n)[1] for each in pair] for name, pair in moments.items()}
    values: dict[str, Tensor] = {}
    for jacobian in rows.passes():
        for name, squares in _squares(forms, pseudo(jacobian), bases, sides):
            values[name] = values[name].add_(squares) if name in values else squares.double()
    like = next(iter(values.values())).new_zeros(0, dtype=_dtype(rows))
    # Laid out as they are read back from a disk: products then have the same bits.
    blocks = {name: Kronecker(*(each.to(like).contiguous() for each in (left, right, values[name] / n)))
              for name, (left, right) in bases.items()}  # fmt: skip
    diagonals = {name: (each / n).to(like) for name, each in values.items() if name not in blocks}
    return EKFAC(forms.parameters, blocks, diagonals)


def pseudo(jacobian: Jacobian) -> Jacobian:
    """Rows whose plain sum of squares is the curvature: `J^T S` with `S S^T` the loss's Hessian."""
    if jacobian.hessian is None:
        return jacobian
    values, vectors = torch.linalg.eigh(jacobian.hessian.double())
    root = (vectors * values.clamp_min(0).sqrt().unsqueeze(1)).to(jacobian.dense)  # (B, C, R)
    factors = {
        key: (inputs, torch.einsum("bcno,bcr->brno", grads, root)) for key, (inputs, grads) in jacobian.factors.items()
    }
    return Jacobian(factors, root.transpose(1, 2) @ jacobian.dense)


def _dtype(rows: Rows) -> torch.dtype:
    return next(iter(rows.passes())).dense.dtype


def sides_with_bases(forms: Forms) -> dict[str, tuple[int, int]]:
    """The weights that get Kronecker bases, as (out, in): one layer's own, of two axes or more, not too wide."""
    users = Counter(name for layer in forms.layers for name in layer.names)
    found = {}
    for layer in forms.layers:
        name = layer.parameters.get("weight")
        if name is None or users[name] > 1 or layer.indices:
            continue
        shape = forms.parameters.shape_of(name)
        sides = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, 1)
        if len(shape) > 1 and max(sides) <= WIDEST:
            found[name] = sides
    return found


def _moments(
    forms: Forms, rows: Jacobian, sides: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Second moments (out, out) and (in, in) of each weight with bases, summed over a batch."""
    factored = {layer.parameters["weight"]: layer for layer in forms.factored}
    for name in sides:
        if name in factored:
            inputs, grads = (part.flatten(0, -2) for part in rows.factors[factored[name].key])
            yield name, grads.T @ grads, inputs.T @ inputs
    for name, gradients in _plain(forms, rows):
        if name in sides:
            matrices = gradients.reshape(-1, *sides[name])
            flat = matrices.transpose(1, 2).reshape(-1, sides[name][0])
            along = matrices.reshape(-1, sides[name][1])
            yield name, flat.T @ flat, along.T @ along


def _squares(
    forms: Forms, rows: Jacobian, bases: Mapping[str, list[Tensor]], sides: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, Tensor]]:
    """Squares of the gradients in their bases, or of their plain entries, summed over a batch."""
    tied = Counter(name for layer in forms.factored for name in layer.names)
    shared: dict[str, Tensor] = {}
    for layer in forms.factored:
        inputs, grads = rows.factors[layer.key]
        name = layer.parameters["weight"]
        if name in bases:
            yield name, _squares_of_products(inputs, grads, *(each.to(grads) for each in bases[name]))
        for other, gradients in _built(layer, inputs, grads, skip=name if name in bases else ""):
            if tied[other] > 1:  # the gradient is the sum over the layers
                shared[other] = shared[other] + gradients if other in shared else gradients
            else:
                yield other, gradients.square().sum(0)
    yield from ((name, gradients.square().sum(0)) for name, gradients in shared.items())
    for name, gradients in _plain(forms, rows):
        if name in bases:
            left, right = (each.to(gradients) for each in bases[name])
            yield name, (left.T @ gradients.reshape(-1, *sides[name]) @ right).square().sum(0)
        else:
            yield name, gradients.square().sum(0)


def _plain(forms: Forms, rows: Jacobian) -> Iterator[tuple[str, Tensor]]:
    """The gradients (B R, *shape) that are kept as plain columns."""
    if forms.dense:
        columns = Parameters(forms.dense, tuple(forms.parameters.shape_of(name) for name in forms.dense))
        yield from unflatten(columns, rows.dense.flatten(0, 1)).items()


def _built(layer: Layer, inputs: Tensor, grads: Tensor, skip: str) -> Iterator[tuple[str, Tensor]]:
    """A factored layer's gradients (B R, *shape) but for the parameter `skip`."""
    chosen = {kind: name for kind, name in layer.parameters.items() if name != skip}
    if chosen:
        of_each = inputs.repeat_interleave(grads.shape[1], 0)
        only = Layer(**{**layer.__dict__, "parameters": chosen})
        yield from multiplied_out(only, of_each, grads.flatten(0, 1)).items()


def _squares_of_products(inputs: Tensor, grads: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`sum (left^T (sum_n grad_n input_n^T) right)^2` over samples and rows, (out, in)."""
    a, d = inputs @ right, grads @ left  # (B, n, in), (B, R, n, out)
    if a.shape[1] == 1:
        return d.square().sum(1).flatten(0, 1).T @ a.square().flatten(0, 1)
    total = torch.zeros(d.shape[3], a.shape[2], dtype=d.dtype, device=d.device)
    step = max(1, AT_ONCE // (d.shape[1] * d.shape[3] * a.shape[2]))
    for start in range(0, len(a), step):
        at = slice(start, start + step)
        total += torch.einsum("brno,bni->broi", d[at], a[at]).square().sum((0, 1))
    return total
