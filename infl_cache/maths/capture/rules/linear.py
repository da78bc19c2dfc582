r"""`nn.Linear`: :math:`\nabla W = \sum_t \delta_t a_t^T`, with inputs `a_t` and output gradients :math:`\delta_t`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from infl_cache.maths.capture.rules.rule import Rule, Settings, plain
from infl_cache.maths.capture.tape import Call
from infl_cache.maths.product import add_product, product

# Rows and numbers of a tile of outputs: large enough for a fast product, small enough for the cache.
SAMPLES, TILE = 512, 2**20


class Linear(Rule):
    """A matrix product over the last axis, at any number of positions."""

    name = "linear"
    stored = True

    def follows(self, module: nn.Module) -> bool:
        return plain(module, nn.Linear)

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        return 1, 1

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        # One position is an outer product, for which a batched matrix product is slow.
        return output_grad.transpose(1, 2) * inputs if inputs.shape[1] == 1 else output_grad.transpose(1, 2) @ inputs

    def products(self, settings: Settings, weights: Tensor, inputs: Tensor, output_grad: Tensor) -> Tensor:
        """`sum_t,o output_grad[b,t,o] (weights[m] @ input[b,t])[o]`: one matrix product, then a weighted sum.

        A tile at a time: what comes out of the first is still in the cache when the second takes it in.
        """
        count, n_out, n_in = weights.shape
        size, positions, _ = inputs.shape
        together = max(1, SAMPLES // positions)
        asked = max(1, TILE // (together * positions * n_out))
        total = output_grad.new_empty(count, size)
        for start in range(0, size, together):
            at = slice(start, start + together)
            rows = inputs[at].to(weights.dtype).reshape(-1, n_in)  # (b T, n_in)
            back = output_grad[at].reshape(len(rows), n_out, 1)
            for first in range(0, count, asked):
                some = weights[first : first + asked]
                seen = product(rows, some.reshape(-1, n_in)).view(len(rows), len(some), n_out)
                sums = torch.bmm(seen, back).view(-1, positions, len(some)).sum(1)
                total[first : first + asked, at] = sums.T
        return total

    def seen(self, settings: Settings, weights: Tensor, inputs: Tensor) -> Tensor:
        count, n_out, n_in = weights.shape
        size, positions, _ = inputs.shape
        found = product(inputs.reshape(-1, n_in), weights.reshape(-1, n_in))
        return found.view(size, positions, count, n_out).transpose(1, 2)

    def add_combined(self, settings: Settings, inputs: Tensor, output_grad: Tensor, total: Tensor) -> None:
        count, n_out, n_in = total.shape
        by_weight = output_grad.transpose(1, 2).reshape(-1, count * n_out)  # (B n, M out)
        add_product(total.view(-1, n_in), by_weight.T, inputs.reshape(-1, n_in).T)

    def held(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int]:
        return 2 * size, 1  # `products` keeps its tiles small by itself

    def operations(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int | None]:
        return inputs[0] * size, inputs[0] * size
