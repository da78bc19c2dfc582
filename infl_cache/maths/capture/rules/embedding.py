"""`nn.Embedding` and `nn.EmbeddingBag`: output gradients added up in the rows that were looked up; indices are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infl_cache.maths.capture.rules.rule import Rule, Settings, plain
from infl_cache.maths.capture.tape import Call


class Embedding(Rule):
    """Rows of a table, one an index; `padding_idx` sends no gradient."""

    name = "embedding"
    stored = True

    def follows(self, module: nn.Module) -> bool:
        # max_norm changes the weights in passing; scaling by frequency looks at the whole batch.
        return plain(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        return 0, 1

    def settings(self, module: nn.Module) -> dict[str, Any]:
        return {"rows": int(module.num_embeddings), "padding_idx": module.padding_idx}  # type: ignore[arg-type]

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        size, _, width = output_grad.shape
        found = output_grad.new_zeros(size * settings["rows"], width)
        places = inputs.long() + torch.arange(size, device=inputs.device).unsqueeze(1) * settings["rows"]
        found.index_add_(0, places.flatten(), output_grad.reshape(-1, width))
        table = found.view(size, settings["rows"], width)
        if settings["padding_idx"] is not None:
            table[:, settings["padding_idx"]] = 0
        return table

    def products(self, settings: Settings, weights: Tensor, inputs: Tensor, output_grad: Tensor) -> Tensor:
        """`sum_t output_grad[b,t] . weights[m, input[b,t]]`."""
        if settings["padding_idx"] is not None:
            output_grad = output_grad * (inputs != settings["padding_idx"]).unsqueeze(-1)
        return torch.einsum("mbtd,btd->mb", weights[:, inputs.long()].to(output_grad.dtype), output_grad)

    def seen(self, settings: Settings, weights: Tensor, inputs: Tensor) -> Tensor:
        found: Tensor = weights[:, inputs.long()].transpose(0, 1)  # (B, M, n, width)
        return found if settings["padding_idx"] is None else found * self._counted(settings, inputs, found)

    def add_combined(self, settings: Settings, inputs: Tensor, output_grad: Tensor, total: Tensor) -> None:
        if settings["padding_idx"] is not None:
            output_grad = output_grad * self._counted(settings, inputs, output_grad)
        by_weight = output_grad.transpose(0, 1).reshape(len(total), -1, total.shape[2])
        total.index_add_(1, inputs.long().flatten(), by_weight)

    def _counted(self, settings: Settings, inputs: Tensor, like: Tensor) -> Tensor:
        """One for each looked-up row that counts, zero for padding: (B, 1, n, 1)."""
        counted: Tensor = inputs != settings["padding_idx"]
        return counted.to(like.dtype).unsqueeze(1).unsqueeze(-1)

    def operations(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int | None]:
        return output_grad[0] * output_grad[1], output_grad[0] * output_grad[1]


class EmbeddingBag(Rule):
    """Sums or means of rows of a table, over bags of one length."""

    name = "embedding_bag"
    stored = True

    def follows(self, module: nn.Module) -> bool:
        fixed = plain(module, nn.EmbeddingBag) and module.max_norm is None and not module.scale_grad_by_freq
        return fixed and module.mode in ("sum", "mean")

    def accepts(self, module: nn.Module, call: Call) -> bool:
        return super().accepts(module, call) and call.input.dim() == 2

    def events(self, module: nn.Module, call: Call) -> tuple[int, int]:
        return 1, 1

    def settings(self, module: nn.Module) -> dict[str, Any]:
        rows: Any = module.num_embeddings
        return {"rows": int(rows), "padding_idx": module.padding_idx, "mean": module.mode == "mean"}

    def weight_gradient(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        return Embedding().weight_gradient(settings, inputs.flatten(1), self.by_index(settings, inputs, output_grad))

    def products(self, settings: Settings, weights: Tensor, inputs: Tensor, output_grad: Tensor) -> Tensor:
        return Embedding().products(settings, weights, inputs.flatten(1), self.by_index(settings, inputs, output_grad))

    def seen(self, settings: Settings, weights: Tensor, inputs: Tensor) -> Tensor:
        counted = self._counted(settings, inputs, weights)
        looked_up = weights[:, inputs.long()]  # (M, B, n, length, width)
        found: Tensor = (looked_up * counted.unsqueeze(-1)).sum(3)
        return found.transpose(0, 1)

    def add_combined(self, settings: Settings, inputs: Tensor, output_grad: Tensor, total: Tensor) -> None:
        size, count, _, width = output_grad.shape
        counted = self._counted(settings, inputs, output_grad)
        each = counted[:, None, :, :, None] * output_grad.unsqueeze(3)  # (B, M, n, length, width)
        plain = {**settings, "padding_idx": None}
        Embedding().add_combined(plain, inputs.flatten(1), each.reshape(size, count, -1, width), total)

    def operations(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int | None]:
        return inputs[0] * inputs[1] * output_grad[1], inputs[0] * inputs[1] * output_grad[1]

    def held(self, inputs: tuple[int, ...], output_grad: tuple[int, ...], size: int) -> tuple[int, int]:
        looked_up = inputs[0] * inputs[1] * output_grad[1]
        return 2 * size + looked_up, looked_up

    def by_index(self, settings: Settings, inputs: Tensor, output_grad: Tensor) -> Tensor:
        """The gradient of each looked-up row, (B, n * length, width)."""
        return (self._counted(settings, inputs, output_grad).unsqueeze(-1) * output_grad.unsqueeze(2)).flatten(1, 2)

    def _counted(self, settings: Settings, inputs: Tensor, like: Tensor) -> Tensor:
        """The weight of each looked-up row in its bag's sum or mean, (B, n, length)."""
        padding = settings["padding_idx"]
        counted = torch.ones_like(inputs, dtype=like.dtype)
        if padding is not None:
            counted = (inputs != padding).to(like.dtype)
        return counted / counted.sum(-1, keepdim=True).clamp_min(1) if settings["mean"] else counted
