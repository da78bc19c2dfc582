"""A sample and its label as people see them: what a picture, a number or a class is shown as."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def label_text(value: float, classes: Any = None) -> str:
    """A label or prediction for people.

    >>> label_text(3.0), label_text(0.2512), label_text(1.0, ["cat", "dog"])
    ('3', '0.251', 'dog')
    """
    if math.isnan(value):
        return "-"
    if value == int(value):
        if classes is not None and 0 <= value < len(classes):
            return str(classes[int(value)])
        return str(int(value))
    return f"{value:.3g}"


def picture_of(sample: Any) -> NDArray[Any] | None:
    """A sample's input as (H, W) or (H, W, 3), if it looks like a picture; flat squares of 64 and more count.

    >>> picture_of((np.zeros(64), 3)).shape, picture_of((np.zeros((3, 8, 9)), 3)).shape
    ((8, 8), (8, 9, 3))
    >>> picture_of((np.zeros(5), 3)) is None
    True
    """
    first = sample[0] if isinstance(sample, (tuple, list)) and sample else sample
    try:
        picture = np.asarray(first, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if picture.ndim == 3 and picture.shape[0] in (1, 3):
        picture = picture.transpose(1, 2, 0)
    if picture.ndim == 3 and picture.shape[2] == 1:
        picture = picture[..., 0]
    if picture.ndim == 1 and picture.size >= 64 and math.isqrt(picture.size) ** 2 == picture.size:
        picture = picture.reshape(math.isqrt(picture.size), -1)
    if picture.ndim not in (2, 3) or min(picture.shape[:2]) < 4 or (picture.ndim == 3 and picture.shape[2] != 3):
        return None
    low, high = picture.min(), picture.max()
    scaled: NDArray[Any] = (picture - low) / (high - low if high > low else 1)
    return scaled
