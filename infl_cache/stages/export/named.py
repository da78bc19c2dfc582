"""The finished matrix with names on its axes, the only door to xarray: what a run knows of each sample beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.stages.columns import classes_of, stored_column
from infl_cache.stages.export.facts import facts_of
from infl_cache.stages.layers import MODEL, has_layers, stored_shares
from infl_cache.stages.standings import NO_CLASS
from infl_cache.stages.suspects import column

if TYPE_CHECKING:
    from xarray import Dataset as Dataset

TEST_COLUMNS = ("loss", "measure", "prediction", "residual", "iterations", "converged")


def require_xarray() -> Any:
    """The module `xarray`; `BadInput` that names the extra where it is not installed."""
    try:
        import xarray
    except ImportError as error:
        raise BadInput("to_xarray: expected xarray, found none; pip install 'infl_cache[xarray]'") from error
    return xarray


def named_arrays(folder: RunFolder, scores: NDArray[np.float32]) -> Dataset:
    """A Dataset of the matrix `scores`, which is not read, and one number of each sample from the stores."""
    xarray = require_xarray()
    n_test, n_train = scores.shape
    of_tests = {f"test_{name}": ("test", stored_column(folder, "stest", name)) for name in TEST_COLUMNS}
    found: dict[str, Any] = {
        "influence": (("test", "train"), scores), **of_tests,
        "train_loss": ("train", stored_column(folder, "grads", "loss")),
    }  # fmt: skip
    coordinates: dict[str, Any] = {
        "test": np.arange(n_test), "train": np.arange(n_train),
        "test_label": ("test", _labels(stored_column(folder, "stest", "target"))),
        "train_label": ("train", _labels(stored_column(folder, "grads", "target"))),
    }  # fmt: skip
    if "self_influence" in folder.manifest.stages and _finished(folder, "self_influence"):
        found["self_influence"] = ("train", column(folder, "self_influence"))
    if has_layers(folder):
        shares = stored_shares(folder)
        found["layer_share"] = (("layer", "test"), shares.share)
        coordinates["layer"] = [name or MODEL for name in shares.names]
        coordinates["layer_parameters"] = ("layer", shares.parameters)
    made: Dataset = xarray.Dataset(found, coordinates, attrs=facts_of(folder))
    return made


def _labels(targets: NDArray[np.float64]) -> NDArray[Any]:
    """As integers where every one is; NaN of a sample that the run was not asked about needs floats."""
    classes = classes_of(targets)
    return targets if classes is None or (classes == NO_CLASS).any() else classes


def _finished(folder: RunFolder, stage: str) -> bool:
    return len(folder.records(stage)) == len(folder.stage_blocks(stage))
