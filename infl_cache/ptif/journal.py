"""What is logged, and where it goes: stdout, and a file if one is named."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infl_cache.disk.durable import require_writable
from infl_cache.errors import BadInput

FORMAT = "%(asctime)s %(levelname)s: %(message)s"


class _Screen(logging.StreamHandler[Any]):
    """Writes to what is stdout at the time."""

    def __init__(self) -> None:
        logging.Handler.__init__(self, logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))

    @property
    def stream(self) -> Any:
        return sys.stdout

    @stream.setter
    def stream(self, value: Any) -> None:
        """Not kept."""


class _File(logging.FileHandler):
    """Appends to a file."""

    def __init__(self, filename: Path) -> None:
        if not filename.parent.is_dir():
            raise BadInput(f"{filename}: expected a file in a folder that is there, found no {filename.parent}")
        require_writable(filename)
        super().__init__(filename, encoding="utf-8")
        self.setLevel(logging.INFO)
        self.setFormatter(logging.Formatter(FORMAT))


def init_logging(filename: str | Path | None = None) -> None:
    """Log to stdout from level INFO on, and to the file if one is named; called again, the last call holds.

    It is the root logger that is set up: the program's own `logging.info` is shown, too.
    Raises `BadInput` for a file that cannot be written.
    """
    root = logging.getLogger()
    handlers: list[logging.Handler] = [_Screen(), *([_File(Path(filename))] if filename is not None else [])]
    for before in [each for each in root.handlers if isinstance(each, (_Screen, _File))]:
        root.removeHandler(before)
        before.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(logging.INFO)


@contextmanager
def logged_to(filename: str | None) -> Iterator[None]:
    """Log what this package says to a file besides stdout while inside; nothing changes if none is named."""
    root, own = logging.getLogger(), logging.getLogger("infl_cache")
    there = [each for each in root.handlers if isinstance(each, _File)]
    if filename is None or any(Path(each.baseFilename) == Path(filename).absolute() for each in there):
        yield
        return
    file, level = _File(Path(filename)), own.level
    handlers = [file, *([] if root.handlers else [_Screen()])]
    try:
        for handler in handlers:
            own.addHandler(handler)
        own.setLevel(min(own.getEffectiveLevel(), logging.INFO))
        yield
    finally:
        own.setLevel(level)
        for handler in handlers:
            own.removeHandler(handler)
            handler.close()


def display_progress(
    text: str, current_step: int, last_step: int, enabled: bool = True, fix_zero_start: bool = True
) -> None:
    """Write how far a loop has come over the last line of stdout; nothing if not `enabled`.

    `fix_zero_start`: steps are counted from 0, so that step 0 is the first one done.

    >>> display_progress("pictures", 1, 4)
    pictures: 2 of 4 (50 %)
    """
    if not enabled:
        return
    done = current_step + 1 if fix_zero_start else current_step
    again = sys.stdout.isatty() and done < last_step
    share = f" ({done / last_step:.0%})".replace("%", " %") if last_step else ""
    sys.stdout.write(("\r" if sys.stdout.isatty() else "") + f"{text}: {done} of {last_step}{share}")
    sys.stdout.write("" if again else "\n")
    sys.stdout.flush()
