"""How gradients lie in `grad_z.zarr`: the arrays of the store, into them and out of them again."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infl_cache.disk.layout import ArrayLayout, Block, array_layout
from infl_cache.disk.pieces import Piece
from infl_cache.disk.reader import BlockReader, Columns
from infl_cache.disk.store import Array, Store
from infl_cache.maths.capture import Captured, Factors, Forms, Layer
from infl_cache.maths.narrow import NARROW, narrowed, widened
from infl_cache.maths.parts import Part

# numpy has no bfloat16: its bits are stored, and the array's attributes say so.
BITS = {"bfloat16": "uint16", "float16": "float16"}
EXPONENT = "_exponent"
# What the axes of the arrays are called in their metadata.
ROWS, COLUMNS = "train", "dense_parameter"
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
        columns = COLUMNS if path == "dense" else ""
        found.append(
            array_layout(path, n_train, shape, BITS.get(kind, kind), block_rows, kind, rows=ROWS, columns=columns)
        )
        if kind in NARROW:
            found.append(array_layout(path + EXPONENT, n_train, (), "int16", block_rows, rows=ROWS))
    return found + [array_layout(path, n_train, (), kind, block_rows, rows=ROWS) for path, kind in PER_SAMPLE]


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
    return factors_of(forms.factored, arrays), arrays.get("dense", like.new_zeros(size, 0))


def factors_of(layers: Iterable[Layer], arrays: Mapping[str, Tensor]) -> Factors:
    """Input and output gradient of each layer."""
    return {layer.key: (arrays[f"{layer.input_from}/input"], arrays[f"{layer.key}/output_grad"]) for layer in layers}


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
    arrays = _wide_arrays(store, store.read_block(block, gradient_paths(store)), device, wide)
    return as_factors(forms, arrays, block.rows, torch.empty(0, dtype=wide, device=device))


def gradient_paths(store: Store) -> list[str]:
    """The arrays of the grads store that hold gradients."""
    return [path for path in store.layouts if path not in dict(PER_SAMPLE)]


@dataclass(frozen=True)
class GradientPiece:
    """Of some rows of a block either factors or plain columns, those of a part from its column `start` on.

    In place of plain columns it may have what they give to the scores, (M, rows).
    """

    rows: slice
    factors: Factors | None = None
    plain: Tensor | None = None
    start: int = 0
    dots: Tensor | None = None


# Of plain columns (rows, some), the part's from the given one on, what they give to the scores: (M, rows).
Score = Callable[[Tensor, int], Tensor]


def wanted_arrays(stored: Container[str], part: Part) -> tuple[list[str], Columns]:
    """The arrays of the grads store that `part` is made from, and which columns of those with plain rows."""
    paths = [path for layer in part.layers for path in (f"{layer.input_from}/input", f"{layer.key}/output_grad")]
    paths += ["dense"] if part.stop > part.start else []
    paths = [each for path in dict.fromkeys(paths) for each in (path, path + EXPONENT) if each in stored]
    return paths, {"dense": slice(part.start, part.stop)} if part.stop > part.start else {}


def gradient_pieces(
    reader: BlockReader, store: Store, part: Part, block: Block, device: torch.device, wide: torch.dtype,
    score: Score | None = None,
) -> Iterator[GradientPiece]:  # fmt: skip
    """What `part` of a block's gradients is, in pieces as they lie in memory without a copy, in type `wide`.

    With `score` plain columns are scored by the threads that decode them. What was yielded may be overwritten when the
    next block is read.
    """
    paths, columns = wanted_arrays(store.layouts, part)
    at_once = [path for path in paths if path != "dense" or score is None]
    read = reader.read(block, at_once, {path: at for path, at in columns.items() if path in at_once})
    plain, scales = read.pop("dense", []), read.pop("dense" + EXPONENT, None)
    exponents = _joined(store.layouts["dense" + EXPONENT], scales, block) if scales else None

    def widened_piece(piece: Piece) -> GradientPiece:
        data = {"dense": piece.values}
        if exponents is not None:
            data["dense" + EXPONENT] = exponents[piece.rows]
        values, start = _wide_arrays(store, data, device, wide)["dense"], piece.columns.start - part.start
        if score is None:
            return GradientPiece(piece.rows, plain=values, start=start)
        return GradientPiece(piece.rows, dots=score(values, start))

    yield from map(widened_piece, plain)
    if score is not None and "dense" in columns:
        yield from reader.each(block, "dense", columns["dense"], widened_piece)
    for rows, data in _together(store, read, block):
        arrays = _wide_arrays(store, data, device, wide)
        yield GradientPiece(rows, factors_of(part.layers, arrays))


def _together(store: Store, read: Mapping[str, list[Piece]], block: Block) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Arrays in pieces of the same rows: as they were read where all are cut alike, else joined."""
    cuts = {path: [piece.rows for piece in pieces] for path, pieces in read.items()}
    by_rows = [cut for cut in cuts.values() if len({rows.start for rows in cut}) == len(cut)]
    alike = max(by_rows, key=len, default=[slice(0, block.rows)]) if cuts else []
    whole = {path: _joined(store.layouts[path], read[path], block) for path, cut in cuts.items() if cut != alike}
    for index, rows in enumerate(alike):
        yield rows, {path: whole[path][rows] if path in whole else read[path][index].values for path in read}


def _joined(layout: ArrayLayout, pieces: list[Piece], block: Block) -> Array:
    if len(pieces) == 1:
        return pieces[0].values
    joined = np.empty((block.rows, *layout.row_shape), layout.dtype)
    for piece in pieces:
        joined[(piece.rows, piece.columns)[: joined.ndim]] = piece.values
    return joined


def _wide_arrays(store: Store, data: Mapping[str, Array], device: torch.device, wide: torch.dtype) -> dict[str, Tensor]:
    quick = device.type == "cuda"
    tensors = {
        path: _tensor(store.layouts[path], values).to(device, non_blocking=quick) for path, values in data.items()
    }
    return {path: _wide(tensors, path, tensor, wide) for path, tensor in tensors.items() if not path.endswith(EXPONENT)}


def _tensor(layout: ArrayLayout, values: Array) -> Tensor:
    """Stored numbers as a tensor of the type that they stand for."""
    whole = np.ascontiguousarray(values)
    if layout.stands_for == "bfloat16":
        return torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(whole)
