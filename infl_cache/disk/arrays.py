"""The arrays of an `.npz` file that may come from anybody: plain numbers, never unpickled, never unpacked to more."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.errors import DamagedStore


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array by its name; `DamagedStore` for what is no such file, holds objects, or is packed."""
    try:
        with zipfile.ZipFile(path) as packed:
            if any(each.compress_type != zipfile.ZIP_STORED for each in packed.infolist()):
                raise ValueError("packed arrays")
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except Exception as error:  # zipfile and NumPy fail in many ways on what they cannot understand
        raise DamagedStore(
            f"{path}: expected arrays of numbers, found what cannot be read ({' '.join(str(error).split())[:120]});"
            " infl-cache influence makes rankings again"
        ) from error
