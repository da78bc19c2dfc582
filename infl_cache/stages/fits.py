"""What a solver has fitted to the curvature, once a run: kept on the disk, for the test samples of later calls."""

from __future__ import annotations

from collections.abc import Callable

from infl_cache.maths.solvers.base import State
from infl_cache.stages.kept import KeptState
from infl_cache.stages.opening import Opened, log

FIT = "s_test.fit"
FITS = {"stest": FIT, "self_influence": "self_influence.fit"}


class KeptFit:
    """A `Keeper` of one fit; it goes with the identity of the stage, any other is left alone."""

    def __init__(self, run: Opened, stage: str = "stest") -> None:
        path = run.folder.path / FITS[stage]
        self._kept = KeptState(path, "what was fitted", "it is fitted anew", log.warning)
        self._identity, self._device = {"stage": run.folder.fingerprint(stage)}, run.device

    def found(self) -> State | None:
        """The fit of this very system, if there is one."""
        found = self._kept.read(self._identity, self._device)
        return None if found is None else found[1]

    def offer(self, state: Callable[[], State]) -> None:
        """Keep a fit."""
        self._kept.write(self._identity, {}, state())
