"""How gradients lie in `grad_z.zarr`: the arrays of the store, into them and out of them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.layout import ArrayLayout, Block, array_layout
from infl_cache.disk.reader import BlockReader
from infl_cache.disk.store import Array, Store
from infl_cache.maths.capture import Captured, Factors, Forms
from infl_cache.maths.narrow import NARROW, narrowed, widened

# numpy has no bfloat16: its bits are stored, and the array's attributes say so.
BITS = {"bfloat16": "uint16", "float16": "float16"}
EXPONENT = "_exponent"
PER_SAMPLE = (("loss", "float64"), ("target", "float64"), ("digest", "uint64"))


def gradient_arrays(forms: Forms, dtype: str) -> list[tuple[str, tuple[int, ...], str]]:
    """Path, row shape and stored type of every array that holds gradients; a shared input is there once."""
    arrays: list[tuple[str, tuple[int, ...], str]] = []
    for layer in forms.factored:
        if not layer.input_key:
            arrays.append((f"{layer.key}/input", layer.input_shape, "int32" if layer.indices else dtype))
        arrays.append((f"{layer.key}/output_grad", layer.grad_shape, dtype))
    if forms.n_dense:
        arrays.append(("dense", (forms.n_dense,), dtype))
    return arrays


def layouts(forms: Forms, n_train: int, dtype: str, block_rows: int, gradients: bool = True) -> list[ArrayLayout]:
    """The arrays of the store: the gradients (unless they are not kept), and what is kept for each sample."""
    found = []
    for path, shape, kind in gradient_arrays(forms, dtype) if gradients else []:
        found.append(array_layout(path, n_train, shape, BITS.get(kind, kind), block_rows, kind))
        if kind in NARROW:
            found.append(array_layout(path + EXPONENT, n_train, (), "int16", block_rows))
    return found + [array_layout(path, n_train, (), kind, block_rows) for path, kind in PER_SAMPLE]


def arrays_of(forms: Forms, captured: Captured, dtype: str) -> dict[str, Tensor]:
    """A batch's gradients under the names and in the types that they have in the store, still on their device."""
    found: dict[str, Tensor] = {}
    for layer in forms.factored:
        inputs, found[f"{layer.key}/output_grad"] = captured.factors[layer.key]
        if not layer.input_key:
            found[f"{layer.key}/input"] = inputs
    if forms.n_dense:
        found["dense"] = captured.dense
    if dtype in NARROW:
        for path in [path for path, _, kind in gradient_arrays(forms, dtype) if kind in NARROW]:
            found[path], found[path + EXPONENT] = narrowed(found[path], NARROW[dtype])
    return found


def as_factors(forms: Forms, arrays: dict[str, Tensor], size: int, like: Tensor) -> tuple[Factors, Tensor]:
    """The inverse of `arrays_of`, once the types are wide again."""
    factors = {
        layer.key: (arrays[f"{layer.input_from}/input"], arrays[f"{layer.key}/output_grad"]) for layer in forms.factored
    }
    return factors, arrays.get("dense", like.new_zeros(size, 0))


def rounded(forms: Forms, captured: Captured, dtype: str, wide: torch.dtype) -> tuple[Factors, Tensor]:
    """A batch's gradients as they come back from a store of that type."""
    arrays = arrays_of(forms, captured, dtype)
    kept = {path: _wide(arrays, path, tensor, wide) for path, tensor in arrays.items() if not path.endswith(EXPONENT)}
    return as_factors(forms, kept, len(captured.loss), captured.dense.to(wide))


def _wide(arrays: dict[str, Tensor], path: str, tensor: Tensor, wide: torch.dtype) -> Tensor:
    if path + EXPONENT in arrays:
        return widened(tensor, arrays[path + EXPONENT], wide)
    return tensor.to(wide) if tensor.is_floating_point() else tensor


def stored_gradients(
    store: Store, forms: Forms, block: Block, device: torch.device, wide: torch.dtype
) -> tuple[Factors, Tensor]:
    """Factors and plain columns of a block of the grads store, as tensors of type `wide` on the device."""
    return _as_wide(store, forms, store.read_block(block, gradient_paths(store)), block.rows, device, wide)


def gradient_paths(store: Store) -> list[str]:
    """The arrays of the grads store that hold gradients."""
    return [path for path in store.layouts if path not in dict(PER_SAMPLE)]


def gradient_pieces(
    reader: BlockReader, store: Store, forms: Forms, block: Block, device: torch.device, wide: torch.dtype
) -> Iterator[tuple[Factors, Tensor]]:
    """As `stored_gradients`, some rows of the block after the others: as many as lie in one piece without a copy.

    What was yielded may be overwritten when the next block is read.
    """
    read = reader.read(block, gradient_paths(store))
    lengths = [len(piece) for piece in max(read.values(), key=len)]
    whole = {path: pieces[0] if len(pieces) == 1 else None for path, pieces in read.items()}
    start = 0
    for index, rows in enumerate(lengths):
        data = {}
        for path, pieces in read.items():
            if (together := whole[path]) is not None:
                data[path] = together[start : start + rows]
            elif [len(piece) for piece in pieces] == lengths:
                data[path] = pieces[index]
            else:  # chunks of other lengths
                whole[path] = np.concatenate(pieces)
                data[path] = whole[path][start : start + rows]  # type: ignore[index]
        yield _as_wide(store, forms, data, rows, device, wide)
        start += rows


def _as_wide(
    store: Store, forms: Forms, data: Mapping[str, Array], rows: int, device: torch.device, wide: torch.dtype
) -> tuple[Factors, Tensor]:
    quick = device.type == "cuda"
    tensors = {
        path: _tensor(store.layouts[path], values).to(device, non_blocking=quick) for path, values in data.items()
    }
    arrays = {
        path: _wide(tensors, path, tensor, wide) for path, tensor in tensors.items() if not path.endswith(EXPONENT)
    }
    return as_factors(forms, arrays, rows, torch.empty(0, dtype=wide, device=device))


def _tensor(layout: ArrayLayout, values: Array) -> Tensor:
    """Stored numbers as a tensor of the type that they stand for."""
    whole = np.ascontiguousarray(values)
    if layout.stands_for == "bfloat16":
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole)
