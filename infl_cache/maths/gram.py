r"""Inner products of gradient rows that are never built: the Gram matrix of two sets of samples, in float64.

.. math:: (G_a G_b^T)_{ij} = \sum_{layers} \sum_{t, s} (a_{it} \cdot a_{js}) (\delta_{it} \cdot \delta_{js})

over the positions t and s of a linear layer: with one position `(A_a A_b^T) * (D_a D_b^T)`, which costs in + out
multiplications a pair where a product of rows costs in x out. In an embedding the first factor says whether the
indices are the same; a bias has the second factor alone. Layers with many positions, and those that share a parameter
(whose gradient is the sum over them), are multiplied out, as many samples at a time as `room` bytes hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from infl_cache.maths.capture.engine import multiplied_out
from infl_cache.maths.capture.forms import Forms, Layer
from infl_cache.maths.capture.rules.embedding import EmbeddingBag
from infl_cache.maths.curvature.jacobian import Jacobian

ROOM = 64 * 2**20
# What a rebuilt row takes besides itself: its pieces, their sum, the product's own.
COPIES = 4


def gram(forms: Forms, a: Jacobian, b: Jacobian, room: int = ROOM) -> Tensor:
    """`G_a G_b^T` in float64, (B_a C_a, B_b C_b), for rows in the given forms; rows of a sample lie together."""
    count = (a.dense.shape[:2].numel(), b.dense.shape[:2].numel())
    total = torch.zeros(count, dtype=torch.float64, device=a.dense.device)
    _add_columns(total, a.dense.flatten(0, 1), b.dense.flatten(0, 1), room)
    for group in sharing(forms.factored):
        (layer, *others) = group
        if not others and _pairs_are_cheaper(layer):
            _add_pairs(total, layer, a, b, room)
        else:
            _add_rebuilt(total, group, a, b, room)
    return total


def squared_norms(forms: Forms, rows: Jacobian, room: int = ROOM) -> Tensor:
    """The diagonal of `gram(forms, rows, rows)`, float64 (B C,), without the rest of it."""
    plain = rows.dense.flatten(0, 1)
    total = torch.zeros(len(plain), dtype=torch.float64, device=plain.device)
    step = max(1, room // (8 * max(1, plain.shape[1])))
    for start in range(0, len(plain), step):
        total[start : start + step] = plain[start : start + step].double().square().sum(1)
    for group in sharing(forms.factored):
        (layer, *others) = group
        if not others and _pairs_are_cheaper(layer):
            total += _squared_by_pairs(layer, rows)
            continue
        sizes = {name: 0 for each in group for name in each.names}
        step = max(1, room // (8 * COPIES * sum(each.gradient_size for each in group)))
        for at, built in _rebuilt(group, rows, step, tuple(sizes)):
            total[at] += built.square().sum(1)
    return total


def _squared_by_pairs(layer: Layer, rows: Jacobian) -> Tensor:
    """The layer's share as a product of two small matrices (positions x positions) of each sample."""
    seen, back = _by_position(layer, rows)
    alike = seen @ seen.mT if seen.is_floating_point() else (seen.unsqueeze(2) == seen.unsqueeze(1)).double()
    if "bias" in layer.parameters:
        alike = alike + 1
    return (alike * (back @ back.mT)).sum((1, 2))


def sharing(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in groups that have no parameter in common with another group."""
    groups: list[list[Layer]] = []
    for layer in layers:
        ours = [group for group in groups if any(set(layer.names) & set(each.names) for each in group)]
        groups = [group for group in groups if group not in ours]
        groups.append([each for group in ours for each in group] + [layer])
    return groups


def positions(layer: Layer) -> int:
    """Positions of a sample whose gradients add up: of a bag of embeddings, each index is one."""
    return layer.grad_shape[0] * (layer.input_shape[1] if layer.rule == "embedding_bag" else 1)


def _pairs_are_cheaper(layer: Layer) -> bool:
    """Whether inner products at all pairs of positions take less work than one of rebuilt rows."""
    inputs = layer.input_shape[-1] if layer.rule == "linear" else 1
    able = layer.rule in ("linear", "embedding", "embedding_bag")
    return able and positions(layer) ** 2 * (inputs + layer.grad_shape[-1]) <= layer.gradient_size


def _add_columns(total: Tensor, a: Tensor, b: Tensor, room: int) -> None:
    """Products of plain rows, a piece of the columns at a time where these must be made float64 first."""
    wide = a.dtype == b.dtype == torch.float64
    step = max(1, a.shape[1] if wide else room // (8 * (len(a) + len(b)) or 1))
    for start in range(0, a.shape[1], step):
        at = slice(start, start + step)
        total.addmm_(a[:, at].double(), b[:, at].double().T)


def _add_pairs(total: Tensor, layer: Layer, a: Jacobian, b: Jacobian, room: int) -> None:
    """The layer's share as a product of two small matrices for each pair of samples."""
    (seen_a, back_a), (seen_b, back_b) = _by_position(layer, a), _by_position(layer, b)
    at_a, at_b = back_a.shape[1], back_b.shape[1]
    step = max(1, room // (8 * at_a * 3 * len(back_b) * at_b))
    for start in range(0, len(back_a), step):
        part = slice(start, start + step)
        back = back_a[part].flatten(0, 1) @ back_b.flatten(0, 1).T
        if seen_a.is_floating_point():
            alike = seen_a[part].flatten(0, 1) @ seen_b.flatten(0, 1).T
        else:
            alike = (seen_a[part].reshape(-1, 1) == seen_b.reshape(1, -1)).double()
        if "bias" in layer.parameters:
            alike += 1
        products = back.mul_(alike)
        if at_a > 1 or at_b > 1:
            products = products.view(-1, at_a, len(back_b), at_b).sum((1, 3))
        total[part] += products


def _by_position(layer: Layer, jacobian: Jacobian) -> tuple[Tensor, Tensor]:
    """A row's inputs, float64 `(B C, n, in)` or indices `(B C, n)`, and output gradients `(B C, n, out)`."""
    inputs, grads = jacobian.factors[layer.key]
    rows = grads.shape[1]
    back = grads.flatten(0, 1).double()
    if layer.rule == "embedding_bag":
        each = inputs.repeat_interleave(rows, 0) if rows > 1 else inputs
        return each.flatten(1).long(), EmbeddingBag().by_index(layer.settings, each, back)
    if layer.rule == "embedding":
        padding = layer.settings["padding_idx"]
        each = inputs.repeat_interleave(rows, 0) if rows > 1 else inputs
        if padding is not None:
            back = back * (each != padding).unsqueeze(-1)
        return each.long(), back
    each = inputs.double()
    return each.repeat_interleave(rows, 0) if rows > 1 else each, back


def _add_rebuilt(total: Tensor, layers: Sequence[Layer], a: Jacobian, b: Jacobian, room: int) -> None:
    """The share of layers that are multiplied out, both sides a few samples at a time."""
    sizes = {name: 0 for layer in layers for name in layer.names}
    width = sum(layer.gradient_size for layer in layers)
    step = max(1, room // (8 * COPIES * 2 * max(1, width)))
    for here, rows_a in _rebuilt(layers, a, step, tuple(sizes)):
        for there, rows_b in _rebuilt(layers, b, step, tuple(sizes)):
            total[here, there].addmm_(rows_a, rows_b.T)


def _rebuilt(
    layers: Sequence[Layer], jacobian: Jacobian, step: int, names: tuple[str, ...]
) -> Iterator[tuple[slice, Tensor]]:
    """Float64 gradients of the layers' parameters side by side, with the rows that they are."""
    count = jacobian.dense.shape[1]
    for start in range(0, jacobian.size, step):
        pieces: dict[str, Tensor] = {}
        for layer in layers:
            inputs, grads = (each[start : start + step] for each in jacobian.factors[layer.key])
            wide = inputs.double() if inputs.is_floating_point() else inputs
            found = multiplied_out(layer, wide.repeat_interleave(count, 0), grads.flatten(0, 1).double())
            for name, piece in found.items():
                pieces[name] = pieces[name] + piece if name in pieces else piece
        rows = torch.cat([pieces[name].flatten(1) for name in names], 1)
        yield slice(start * count, start * count + len(rows)), rows
