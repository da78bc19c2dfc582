"""What a solver has fitted to the curvature, once a run: kept on the disk, for the test samples of later calls."""

from __future__ import annotations

from collections.abc import Callable

import torch

from infl_cache.disk.state import read_header, read_state, write_state
from infl_cache.errors import DamagedStore
from infl_cache.maths.solvers.base import State
from infl_cache.stages.opening import Opened, log

FIT = "s_test.fit"
FITS = {"stest": FIT, "self_influence": "self_influence.fit"}


class KeptFit:
    """A `Keeper` of one fit; it goes with the identity of the stage, any other is left alone."""

    def __init__(self, run: Opened, stage: str = "stest") -> None:
        self._path, self._fingerprint = run.folder.path / FITS[stage], run.folder.fingerprint(stage)

    def found(self) -> State | None:
        """The fit of this very system, if there is one."""
        try:
            header = read_header(self._path)
            if header is None or header.identity != {"stage": self._fingerprint}:
                return None
            arrays = read_state(self._path, header)
        except DamagedStore as error:
            log.warning(f"{error}; it is fitted anew")
            return None
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def offer(self, state: Callable[[], State]) -> None:
        """Keep a fit; a disk that takes none ends nothing."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state().items()}
        try:
            write_state(self._path, {"stage": self._fingerprint}, {}, arrays)
        except OSError as error:
            log.warning(f"{self._path}: what was fitted could not be kept ({error.strerror})")
