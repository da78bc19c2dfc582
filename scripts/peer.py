"""Another library as a contestant: whether it is there, and a call of it without a word."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

EVERY = 10**9

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some of them would ask a server for code


@dataclass(frozen=True)
class Peer:
    """A library's way: its key, what the table calls it, its package, what it does, for how many samples at most."""

    key: str
    title: str
    module: str
    distribution: str
    work: Callable[..., Any]
    most: int = EVERY

    @property
    def installed(self) -> bool:
        """Whether its package can be found."""
        return installed(self.module)

    def __call__(self, *given: Any) -> Any:
        """Do it without a word."""
        with silent():
            return self.work(*given)


def installed(module: str) -> bool:
    """Whether a package can be found."""
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is printed, no warning shown, and no log is left open that would write to where this went."""
    root = logging.getLogger()
    before = list(root.handlers)
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                yield
        finally:
            root.handlers[:] = before


def why(error: Exception) -> str:
    """A failure in a line, as the table says it of who does not take part."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
