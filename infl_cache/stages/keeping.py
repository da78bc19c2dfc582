"""The state of an iteration (stage 2's, or self-influence's) on the disk.

A kill loses minutes of it, a signal that asks to stop loses none.

A state goes with the stage's identity, its block and the right-hand sides themselves; any other, and one that is
damaged, is left alone. It is never unpickled, and gone once its block is committed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infl_cache.disk.durable import remove
from infl_cache.disk.layout import Block
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import Header, read_header
from infl_cache.errors import DamagedStore, Interrupted
from infl_cache.maths.digest import digest_of
from infl_cache.maths.solvers.base import State
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.kept import KeptState
from infl_cache.stages.opening import Opened, log

STATE = "s_test.state"
STATES = {"stest": STATE, "self_influence": "self_influence.state"}
# Between two states that are kept; up to twice as long where writing one takes long.
CHECKPOINT_SECONDS = 120.0
WRITING_SECONDS = 6.0
# How long a signal that asks to stop waits for the iteration to come to its end.
PATIENCE_SECONDS = 20.0


class Keeping:
    """A `Keeper` for one block after the other."""

    def __init__(self, run: Opened, stage: str = "stest") -> None:
        self._run, self._stage = run, stage
        self._kept = KeptState(
            run.folder.path / STATES[stage], "the state of the iteration", "the iteration starts at its beginning",
            self._say, other="the state of another iteration, not gone on with",
        )  # fmt: skip
        self._block, self._rhs, self._digest = Block(0, 0, 0), torch.empty(0), ""
        self._iteration, self._offers, self._due = 0, 0, 0.0
        self._asked_to_stop: float | None = None
        self._said: set[str] = set()

    def begin(self, block: Block, rhs: Tensor) -> Keeping:
        """From here on it is about these right-hand sides."""
        self._block, self._rhs, self._digest = block, rhs, ""
        self._iteration, self._offers = 0, 0
        self._due = time.monotonic() + CHECKPOINT_SECONDS
        return self

    def found(self) -> State | None:
        """The state last kept for the very same system and right-hand sides, if any."""
        found = self._kept.read(self._identity(), self._run.device)
        if found is None:
            return None
        header, state = found
        self._iteration = int(header.facts["iteration"])
        log.info(f"block {self._block.index} goes on from iteration {self._iteration}, {_kept(header)}")
        return state

    def offer(self, state: Callable[[], State]) -> None:
        """Called after each iteration; keeps `state()` if the last one kept is old, or if it is time to stop."""
        self._iteration, self._offers = self._iteration + 1, self._offers + 1
        if self._stopping() or time.monotonic() >= self._due:
            self._keep(state())
        self._run.check()

    def tick(self) -> None:
        """Called in the middle of an iteration: a signal that asks to stop waits for its end, but not for long."""
        if not self._stopping():
            return
        assert self._asked_to_stop is not None
        if not self._offers or time.monotonic() - self._asked_to_stop > PATIENCE_SECONDS:
            self._run.check()

    def forget(self) -> None:
        """The block is committed."""
        remove([self._kept.path])

    def _stopping(self) -> bool:
        try:
            self._run.check()
        except Interrupted:
            self._asked_to_stop = self._asked_to_stop or time.monotonic()
            return True
        return False

    def _keep(self, state: State) -> None:
        started = time.monotonic()
        self._kept.write(self._identity(), {"iteration": self._iteration, "when": time.time()}, state)
        now = time.monotonic()
        self._due = now + CHECKPOINT_SECONDS * min(2.0, max(1.0, (now - started) / WRITING_SECONDS))

    def _identity(self) -> dict[str, Any]:
        self._digest = self._digest or digest_of([self._rhs])
        place = [self._block.index, self._block.start, self._block.stop]
        return {"stage": self._run.folder.fingerprint(self._stage), "block": place, "rhs": self._digest}

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)


def kept_line(folder: RunFolder) -> str | None:
    """What is kept of a block that is not done yet, in words."""
    try:
        header = read_header(folder.path / STATE)
        if header is None or header.identity["stage"] != folder.fingerprint("stest"):
            return None
        block = int(header.identity["block"][0])
        if block in folder.records("stest"):
            return None
        return f"iteration {int(header.facts['iteration'])} of block {block} {_kept(header)}"
    except (DamagedStore, KeyError, TypeError, ValueError, IndexError) as error:
        return f"what is kept of an iteration cannot be read ({error})"


def _kept(header: Header) -> str:
    age = max(0.0, time.time() - float(header.facts["when"]))
    return f"kept {human_seconds(age)} ago ({human_bytes(header.n_bytes)})"
