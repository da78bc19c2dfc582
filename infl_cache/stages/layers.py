"""What is kept by layer, read: `influence_by_layer.npy`, and the part that each layer has in the effect.

A layer is a module with parameters of its own. What it gives to an influence is the sum over its own parameters p,
:math:`I_l[j, i] = -(1/n) \\sum_{p \\in l} s_{test}[j, p]\\, grad_z[i, p]`; over all layers these sum to I. Its share
in the influences on test sample j is their projection on the whole ones,
:math:`\\sum_i I_l[j, i] I[j, i] / \\sum_i I[j, i]^2`: the shares of all layers sum to 1, and one that works against the
others has a negative share.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.arrays import read_arrays
from infl_cache.disk.layout import blocks
from infl_cache.disk.ledger import BlockRecord
from infl_cache.disk.matrix import MatrixFile
from infl_cache.disk.run import RunFolder
from infl_cache.disk.store import check_file, record_of_file
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import IncompleteStore
from infl_cache.stages.selection import count_of_tests
from infl_cache.stages.tiles import FINAL, Tile, check_tiles, matrix_tests, planned_tiles

STAGE, SHARES = "by_layer", "layer_shares"
BY_LAYER, BY_LAYER_PARTIAL = OUTPUTS[STAGE][:2]
SHARES_FILE = OUTPUTS[SHARES][0]
# What the model itself is called in a table: its name is empty.
MODEL = "(model)"
SHOWN = 20
REMEDY = "run infl-cache influence --by-layer"

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class LayerShares:
    """The layers' names, how many numbers each has, and its share in the effect.

    `share` (n_layers, n_test) is that in the influences on each test sample (NaN where they were not asked for, are
    not finite or all zero), `share_of_all` (n_layers,) that in the influences on all of them together.
    """

    names: tuple[str, ...]
    parameters: NDArray[np.int64]
    share: Doubles
    share_of_all: Doubles

    def __str__(self) -> str:
        order = np.argsort(-self.share_of_all, kind="stable")
        called = [name or MODEL for name in self.names]
        width = max(len("layer"), *(len(called[layer]) for layer in order[:SHOWN]))
        lines = [
            "Which layers carry the effect: their shares of all influences, lowest and highest of a test sample.",
            "",
        ]
        lines.append(f"{'layer':{width}} {'parameters':>12} {'share':>9} {'lowest':>9} {'highest':>9}")
        for layer in order[:SHOWN]:
            each = self.share[layer][np.isfinite(self.share[layer])]
            ends = (each.min(), each.max()) if len(each) else (np.nan, np.nan)
            shares = " ".join(f"{_percent(value):>9}" for value in (self.share_of_all[layer], *ends))
            lines.append(f"{called[layer]:{width}} {self.parameters[layer]:>12,} {shares}")
        if len(order) > SHOWN:
            lines.append(f"... and {len(order) - SHOWN} more")
        return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share:.1%}" if np.isfinite(share) else "-"


def layer_names(folder: RunFolder) -> list[str]:
    """The layers of a stage that was begun, in the order of the file."""
    return [str(name) for name in folder.plan(STAGE)["layers"]]


def covered_tiles(folder: RunFolder) -> list[Tile]:
    """The tiles of the matrix that are planned by layer: those of test samples that came later may not be."""
    return planned_tiles(folder)[: folder.plan(STAGE)["n_rows"] // len(layer_names(folder))]


def checked_layers(folder: RunFolder) -> dict[int, BlockRecord]:
    """The committed blocks, each compared with its checksum; `DamagedStore` names layer, rows and columns."""
    if STAGE not in folder.manifest.stages:
        return {}
    remedy = f"remove that file and {REMEDY}"
    called = [name or MODEL for name in layer_names(folder)]
    return check_tiles(folder, STAGE, covered_tiles(folder), remedy, called)


def has_layers(folder: RunFolder) -> bool:
    """Whether the influences on all test samples that were asked about are there by layer, and the shares."""
    return (
        {STAGE, SHARES} <= set(folder.manifest.stages)
        and 0 in folder.records(SHARES)
        and len(covered_tiles(folder)) == len(planned_tiles(folder))
    )


def require_layers(folder: RunFolder) -> None:
    """`IncompleteStore` unless `has_layers`."""
    if not has_layers(folder):
        found = "none" if STAGE not in folder.manifest.stages else "some that are missing or not finished"
        raise IncompleteStore(f"{folder.path}: expected influences by layer, found {found}; {REMEDY}")


def require_sound_layers(folder: RunFolder) -> None:
    """Raise unless `influence_by_layer.npy` is finished and, byte for byte, what was committed."""
    require_layers(folder)
    checked_layers(folder)


def stored_shares(folder: RunFolder) -> LayerShares:
    """What is in `by_layer.npz`; `DamagedStore` if the file is not what was committed."""
    for file in folder.records(SHARES)[0].files:
        check_file(folder.path, file, record_of_file)
    found = read_arrays(folder.path / SHARES_FILE)
    return LayerShares(tuple(found["names"].tolist()), found["parameters"], found["share"], found["share_of_all"])


def shares_of(folder: RunFolder, names: Sequence[str], parameters: Sequence[int], budget: int) -> LayerShares:
    """The shares from the two finished files, rows of both a few at a time within `budget` bytes.

    What is NaN in the matrix, a sample that was skipped, is left out of the sums.
    """
    n_test = count_of_tests(folder)
    along, whole = np.zeros((len(names), n_test)), np.zeros(n_test)
    with (
        closing(MatrixFile(folder.path / FINAL)) as matrix,
        closing(MatrixFile(folder.path / BY_LAYER, leading=(len(names),))) as layers,
    ):
        tests = matrix_tests(folder)
        for block in blocks(len(tests), max(1, budget // (32 * matrix.shape[1]))):
            rows = tests[block.start : block.stop]
            total = matrix.read_rows(rows).astype(np.float64)
            there = np.isfinite(total)
            total[~there] = 0.0
            whole[rows] = np.square(total).sum(1)
            for layer in range(len(names)):
                values = np.where(there, layers.read_rows(layer * n_test + rows), 0.0)
                along[layer, rows] = (values * total).sum(1)
    with np.errstate(invalid="ignore"):
        share, share_of_all = along / whole, along.sum(1) / whole.sum()
    return LayerShares(tuple(names), np.array(parameters, np.int64), share, share_of_all)


def layers_details(folder: RunFolder) -> dict[str, str]:
    """What `status` says of the stage besides."""
    details = {"layers": f"{len(layer_names(folder)):,}"}
    if left := len(planned_tiles(folder)) - len(covered_tiles(folder)):
        details["left out"] = f"{left:,} tiles of test samples that were asked about since; {REMEDY}"
    return details
