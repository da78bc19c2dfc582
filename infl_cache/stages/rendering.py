"""A sample and its label as people see them: a picture, a text, or a row of a table; and what a label is called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infl_cache.errors import BadInput
from infl_cache.maths.samples import fetch
from infl_cache.maths.task import Task, blaming

# A picture as bytes (H, W) or (H, W, 3), a text, or a row of a table. Of a grey picture (H, W) high values are ink.
Shown = NDArray[np.uint8] | str | dict[str, str]

# Names of the parts of a sample that say what it is, in the order in which they are looked for.
PICTURES = ("pixel_values", "image", "img", "picture")
TEXTS = ("text", "sentence", "content", "prompt", "question")
TOKENS = ("input_ids", "tokens", "ids")
# What is shown of a long text, a long list of tokens, a wide row.
MOST_LETTERS, MOST_TOKENS, MOST_CELLS = 2000, 256, 64
# A picture of floats may leave 0 to 1 by so much, as one does that was normalised and back; no byte shows it.
ROUNDING = 1e-3
EXPECTED = "expected a picture (H, W) or (H, W, 3), a str, or a mapping of names to values"


def label_text(value: float, classes: Any = None) -> str:
    """A label or prediction for people.

    >>> label_text(3.0), label_text(0.2512), label_text(1.0, ["cat", "dog"])
    ('3', '0.251', 'dog')
    """
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 2**53:
        if classes is not None and 0 <= value < len(classes):
            return str(classes[int(value)])
        return str(int(value))
    return f"{value:.3g}"


def label_in_a_line(value: float, classes: Any = None) -> str:
    """A label for a terminal: nothing in it moves the cursor, and not too much of it."""
    return in_a_line(label_text(value, classes), 40)


def shown(task: Task, name: str, index: int) -> Shown:
    """Sample `index` of the task's data set `name` ("train" or "test") as its `render` has it, or as it looks.

    Raises `BadInput` naming the sample if `render` raises, or returns anything else than it may.
    """
    sample, where = fetch(getattr(task, name), index, name), f"render, on {name}[{index}]"
    if task.render is None:
        return as_it_looks(sample)
    with blaming(f"{where},"):
        given = task.render(sample)
    return _as_rendered(given, where)


def picture_at(task: Task, name: str, index: int) -> NDArray[Any] | None:
    """A sample's picture, (H, W) or (H, W, 3) from 0 to 1; None if it is shown as something else."""
    found = shown(task, name, index)
    if not isinstance(found, np.ndarray):
        return None
    exact = picture_of(fetch(getattr(task, name), index, name)) if task.render is None else None
    return found / np.float64(255) if exact is None else exact


def as_it_looks(sample: Any) -> Shown:
    """What a sample is shown as by its type and shape alone; of a pair (x, y) it is x.

    >>> as_it_looks((torch.tensor([101, 7, 102]), 1)), as_it_looks({"text": "so so", "input_ids": [1, 2]})
    ('101 7 102', 'so so')
    >>> as_it_looks((torch.tensor([0.25, 3.0]), 1)), as_it_looks({"age": 31, "city": "Ulm"})
    ({'0': '0.25', '1': '3'}, {'age': '31', 'city': 'Ulm'})
    >>> as_it_looks((np.zeros((2, 1, 2, 2, 2)), 1))
    'float64 of shape 2 x 1 x 2 x 2 x 2'
    """
    first = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    if isinstance(first, str):
        return shortened(first)
    if isinstance(first, Mapping):
        return _of_mapping(first)
    if _are_words(first):
        return _tokens(first)
    array = as_array(first)
    if array is None:
        return type(first).__name__
    if array.ndim == 1 and array.dtype.kind in "iu" and array.dtype.itemsize > 1:
        return _tokens(array.tolist())
    picture = picture_of(array)
    if picture is not None:
        return _bytes_of(picture)
    if array.ndim == 0:
        return _cell(array[()])
    if array.ndim == 1 and array.size:
        return _row(dict(enumerate(array)))
    return f"{array.dtype} of shape {' x '.join(map(str, array.shape))}"


def _of_mapping(sample: Mapping[Any, Any]) -> Shown:
    """A sample of named parts, as of Hugging Face's data sets: its picture, its text, its tokens, or its numbers."""
    for names in (PICTURES, TEXTS, TOKENS):
        for each in (sample[name] for name in names if name in sample):
            if names is TOKENS:
                array = as_array(each)
                if array is not None and array.ndim == 1 and array.dtype.kind in "iu":
                    return _tokens(array.tolist())
                if _are_words(each):
                    return _tokens(each)
            elif each is not None and isinstance(each, str) == (names is TEXTS):
                return as_it_looks([each])
    cells = {name: value for name, value in sample.items() if _is_single(value)}
    if cells:
        return _row(cells)
    return "; ".join(f"{name}: {as_it_looks([value])}" for name, value in list(sample.items())[:8])


def picture_of(sample: Any) -> NDArray[Any] | None:
    """A sample's input as (H, W) or (H, W, 3), if it looks like a picture; flat squares of 64 and more count.

    >>> picture_of((np.zeros(64), 3)).shape, picture_of((np.zeros((3, 8, 9)), 3)).shape
    ((8, 8), (8, 9, 3))
    >>> picture_of((np.zeros(5), 3)) is None
    True
    """
    first = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    array = as_array(first)
    if array is None:
        return None
    picture = _in_order(array.astype(np.float64))
    if picture.ndim == 1 and picture.size >= 64 and math.isqrt(picture.size) ** 2 == picture.size:
        picture = picture.reshape(math.isqrt(picture.size), -1)
    if picture.ndim not in (2, 3) or min(picture.shape[:2]) < 4 or (picture.ndim == 3 and picture.shape[2] != 3):
        return None
    picture = np.nan_to_num(picture, posinf=0.0, neginf=0.0)
    low, high = picture.min(), picture.max()
    scaled: NDArray[Any] = (picture - low) / (high - low if high > low else 1)
    return scaled


def as_array(value: Any) -> NDArray[Any] | None:
    """Numbers as an array: of a tensor, an array, a PIL image, a list; None if these are no numbers."""
    try:
        array = np.asarray(_plain(value))
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _plain(value: Any) -> Any:
    """A tensor of any device and type, or a PIL image of any mode, as something that NumPy reads."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        try:
            return (value.float() if value.dtype == torch.bfloat16 else value).resolve_conj().resolve_neg().numpy()
        except (TypeError, RuntimeError):  # sparse, or of numbers that NumPy does not know
            return value
    if hasattr(value, "convert") and hasattr(value, "mode"):
        return np.asarray(value if value.mode == "L" else value.convert("RGB"))
    return value


def _in_order(picture: NDArray[Any]) -> NDArray[Any]:
    """Colours last, and none of a grey picture."""
    if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.shape[2] not in (1, 3):
        picture = picture.transpose(1, 2, 0)
    return picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture


def _as_rendered(given: Any, where: str) -> Shown:
    """What a task's `render` has returned, checked. Its grey pictures are shown as they are, 0 black."""
    if isinstance(given, str):
        return shortened(given)
    if isinstance(given, Mapping):
        return _row(given)
    array = as_array(given)
    if array is None:
        raise BadInput(f"{where}: {EXPECTED}, found {type(given).__name__}")
    picture = _in_order(array)
    if picture.ndim not in (2, 3) or 0 in picture.shape or (picture.ndim == 3 and picture.shape[2] != 3):
        raise BadInput(f"{where}: {EXPECTED}, found numbers of shape {array.shape}")
    if picture.dtype != np.uint8:
        picture = picture.astype(np.float64)
        if not np.isfinite(picture).all():
            raise BadInput(f"{where}: expected a picture of finite numbers, found NaN or Inf")
        room, most = (0, 255) if array.dtype.kind in "iu" else (ROUNDING, 1)
        if picture.min() < -room or picture.max() > most + room:
            allowed = f"0 to {most}"
            raise BadInput(
                f"{where}: expected a picture of {array.dtype} from {allowed}, found {picture.min():.4g} to"
                f" {picture.max():.4g}"
            )
        picture = _bytes_of(picture / 255 if array.dtype.kind in "iu" else picture)
    return picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2)


def _bytes_of(picture: NDArray[Any]) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = np.round(picture * 255).astype(np.uint8)
    return found


def _are_words(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(each, str) for each in value)


def _tokens(tokens: Sequence[Any]) -> str:
    more = f" ... ({len(tokens):,} tokens)" if len(tokens) > MOST_TOKENS else ""
    return shortened(" ".join(str(each) for each in tokens[:MOST_TOKENS])) + more


def _is_single(value: Any) -> bool:
    """Whether a value fits into a cell: it is no list, and no array of several numbers."""
    return not isinstance(value, (tuple, list)) and getattr(_plain(value), "ndim", 0) == 0


def _row(values: Mapping[Any, Any]) -> dict[str, str]:
    found = {str(name): _cell(value) for name, value in list(values.items())[:MOST_CELLS]}
    return found | ({"...": f"{len(values):,} values"} if len(values) > MOST_CELLS else {})


def _cell(value: Any) -> str:
    plain = _plain(value)
    if getattr(plain, "ndim", 0) == 0 and isinstance(plain, (float, np.floating, np.ndarray)):
        plain = np.asarray(plain)[()]
        return f"{plain:.4g}" if isinstance(plain, (float, np.floating)) else str(plain)
    return shortened(str(plain), 200)


def shortened(text: str, most: int = MOST_LETTERS) -> str:
    """The beginning of a long text, which says how long it is.

    >>> shortened("abcdef", 3), shortened("abc", 3)
    ('abc ... (6 letters)', 'abc')
    """
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} letters)"


def in_a_line(sample: Shown, most: int = 100) -> str:
    """A text or a row for a terminal: one line, nothing in it that moves the cursor; empty for a picture.

    >>> in_a_line({"age": "31", "city": "Ulm"}), in_a_line("so\\x1b[2J so")
    ('age 31, city Ulm', 'so [2J so')
    """
    if isinstance(sample, np.ndarray):
        return ""
    text = ", ".join(f"{name} {value}" for name, value in sample.items()) if isinstance(sample, dict) else sample
    text = " ".join("".join(each if each.isprintable() else " " for each in text[: 4 * most]).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."
