"""Named tensors kept in a file of the run folder, for what they belong to and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infl_cache.disk.durable import remove
from infl_cache.disk.manifest import Identity
from infl_cache.disk.state import Header, read_header, read_state, write_state
from infl_cache.errors import DamagedStore
from infl_cache.maths.solvers.base import State


@dataclass(frozen=True)
class KeptState:
    """The state in `path`. What is wrong with it ends nothing: it is told by `say`, with what happens `instead`.

    `what` it is, `other` is said of a state that belongs to another identity (nothing by default).
    """

    path: Path
    what: str
    instead: str
    say: Callable[[str], None]
    other: str = ""

    def read(self, identity: Identity, device: torch.device) -> tuple[Header, State] | None:
        """The state of that identity and its header, each tensor on `device` that was on one; None if there is none."""
        try:
            header = read_header(self.path)
            if header is None:
                return None
            if header.identity != identity:
                if self.other:
                    self.say(f"{self.path}: {self.other}")
                return None
            arrays = read_state(self.path, header)
        except DamagedStore as error:
            self.say(f"{error}; {self.instead}")
            return None
        there = set(header.facts.get("on_device", ()))
        return header, {
            name: torch.from_numpy(array).to(device if name in there else "cpu") for name, array in arrays.items()
        }

    def write(self, identity: Identity, facts: dict[str, Any], state: State) -> None:
        """Replace it; a disk that takes none must not end what it is to protect."""
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        on_device = [name for name, tensor in state.items() if tensor.device.type != "cpu"]
        try:
            write_state(self.path, identity, {**facts, "on_device": on_device}, arrays)
        except OSError as error:
            remove([self.path.with_name(f"{self.path.name}.partial")])
            self.say(f"{self.path}: {self.what} could not be kept ({error.strerror})")
