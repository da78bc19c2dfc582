"""Memory of one block: filled batch by batch, from whatever device, then handed to the writer as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infl_cache.disk.layout import ArrayLayout
from infl_cache.disk.store import Array


class BlockBuffer:
    """Room for `rows` rows of every array of a store; pinned, and copied to by a stream of its own, for a GPU."""

    def __init__(self, layouts: Sequence[ArrayLayout], rows: int, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._cuda else None  # type: ignore[no-untyped-call]
        self.digests = np.empty(rows, np.uint64)
        self._sums = torch.empty(rows, dtype=torch.float32, pin_memory=self._cuda)
        self._tensors = {
            layout.path: torch.empty((rows, *layout.row_shape), dtype=_kind(layout), pin_memory=self._cuda)
            for layout in layouts
            if layout.path != "digest"
        }

    def fill(self, at: slice, arrays: Mapping[str, Tensor], digests: NDArray[np.uint64]) -> None:
        """Copy a batch's arrays to rows `at`; on a GPU the copy runs on while the next batch is computed."""
        self.digests[at] = digests
        sums = _row_sums(arrays)
        if self._stream is None:
            self._copy(at, arrays, sums)
            return
        self._stream.wait_stream(torch.cuda.current_stream(sums.device))
        with torch.cuda.stream(self._stream):
            self._copy(at, arrays, sums)
        for tensor in (*arrays.values(), sums):
            if tensor.is_cuda:
                tensor.record_stream(self._stream)

    def _copy(self, at: slice, arrays: Mapping[str, Tensor], sums: Tensor) -> None:
        for path, tensor in self._tensors.items():
            tensor[at].copy_(arrays[path], non_blocking=self._cuda)
        self._sums[at].copy_(sums, non_blocking=self._cuda)

    def wait(self) -> None:
        """Return once all copies have arrived: the only synchronisation of a block."""
        if self._stream is not None:
            self._stream.synchronize()

    def arrays(self, rows: int) -> dict[str, Array]:
        """The first `rows` rows as numpy arrays of the stored types, without a copy."""
        found: dict[str, Array] = {"digest": self.digests[:rows]}
        for path, tensor in self._tensors.items():
            part = tensor[:rows]
            found[path] = (
                part.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else part.numpy()
            )
        return found

    def nonfinite(self, rows: int) -> tuple[list[int], int]:
        """Which of the first `rows` rows hold a value that is not finite, and how many such values there are."""
        # A sum is finite unless a value is not, or it overflows, which looking at the values then tells apart.
        suspects = torch.nonzero(~torch.isfinite(self._sums[:rows])).flatten()
        bad, count = [], 0
        for row in suspects.tolist():
            values = [t[row] for path, t in self._tensors.items() if path != "target" and t.is_floating_point()]
            wrong = sum(int((~torch.isfinite(value)).sum()) for value in values)
            # Gradients that were looked at but have no room here are not finite by their sum.
            wrong = wrong or int(set(self._tensors) <= {"loss", "target"})
            if wrong:
                bad.append(row)
                count += wrong
        return bad, count


def _kind(layout: ArrayLayout) -> torch.dtype:
    found: torch.dtype = getattr(torch, layout.stands_for or layout.dtype)
    return found


def _row_sums(arrays: Mapping[str, Tensor]) -> Tensor:
    """One number a row that is not finite if any value of the row is not."""
    parts = [
        tensor.reshape(len(tensor), -1).sum(1, dtype=torch.float32)
        for path, tensor in arrays.items()
        if path != "target" and tensor.is_floating_point()
    ]
    return torch.stack(parts).sum(0)
