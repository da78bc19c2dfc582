"""What may lie in a run folder, and what is swept out of it: other people's files never, our own leftovers always."""

from __future__ import annotations

import os
from pathlib import Path

from infl_cache.disk.durable import remove
from infl_cache.disk.tiles import FOLDER as TILES
from infl_cache.errors import BadInput

# What each stage leaves in the run folder.
OUTPUTS = {
    "grads": ("grad_z.zarr",),
    "stest": ("s_test.zarr", "s_test.state", "s_test.fit", TILES),
    "influence": ("influence.npy", "influence.partial.npy", "influence.state", "influence.tile"),
    "rankings": ("rankings.npz",),
    "by_layer": ("influence_by_layer.npy", "influence_by_layer.partial.npy", "by_layer.tile"),
    "layer_shares": ("by_layer.npz",),
    "self_influence": ("self_influence.zarr", "self_influence.state", "self_influence.fit"),
    "self_ranking": ("self_influence.npz",),
}
# Which stages hang on a stage.
CHILDREN = {
    "grads": ("influence", "rankings", "by_layer", "layer_shares", "self_influence", "self_ranking"),
    "stest": ("influence", "rankings", "by_layer", "layer_shares"),
    "influence": ("rankings", "by_layer", "layer_shares"),
    "rankings": (),
    "by_layer": ("layer_shares",),
    "layer_shares": (),
    "self_influence": ("self_ranking",),
    "self_ranking": (),
}
# Figures and pictures of a finished run, and the retrainings that they are made of: no claim of the ledger's.
VALIDATION = "validate"
# What says what a run is and holds.
OWN = {"manifest.json", "run.yaml", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", ".lock", VALIDATION}
# Folders in which a killed writer's temporary files may lie.
FOLDERS = (*(name for names in OUTPUTS.values() for name in names if name.endswith((".zarr", TILES))), VALIDATION)


def refuse_other_folders(folder: Path) -> None:
    """`BadInput` if the folder holds somebody's files and no run: nothing of theirs is to be overwritten."""
    ours = ("manifest.json", "ledger.sqlite")
    if not folder.is_dir() or any((folder / name).exists() for name in ours):
        return
    if any(not each.name.startswith(".lock") for each in folder.iterdir()):
        raise BadInput(f"{folder}: expected a run folder or an empty one, found other files; choose another --run")


def refuse_own_files(folder: Path, path: Path) -> None:
    """`BadInput` for a file of the run itself, finished or not: what leaves a run is not written over it."""
    place, own = path.resolve(), {name for names in OUTPUTS.values() for name in names} | OWN
    if folder.resolve() in place.parents and place.relative_to(folder.resolve()).parts[0] in own:
        raise BadInput(f"out: expected a file of your own, found {path}, which is the run's; choose another --out")


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a writer that was killed; to be called under the lock, so that none of them is in use."""
    for place in (folder, *(folder / name for name in FOLDERS)):
        for here, inner, names in os.walk(place):
            if place == folder:
                inner.clear()
            for name in names:
                if name.endswith(".partial"):
                    os.unlink(os.path.join(here, name))


def forget_unbegun(folder: Path) -> None:
    """Leave no trace of a run that was refused before its first stage began, or had no room to; under the lock.

    The ledger goes last: as long as it is there, whoever is killed here leaves a run folder.
    """
    remove_leftovers(folder)
    remove(folder / name for outputs in OUTPUTS.values() for name in outputs)
    remove(folder / name for name in ("run.yaml", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite"))
