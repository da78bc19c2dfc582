"""Every error this package raises on purpose, and the exit code each one becomes on the command line."""

from __future__ import annotations


class InflCacheError(Exception):
    """Base of all errors raised on purpose: one or two lines that say expected, found and remedy.

    `exit_code` is what the command line returns for it (see `infl-cache help errors`).
    """

    exit_code = 1


class BadInput(InflCacheError):
    """The task, its data or an option cannot be used; nothing was written."""

    exit_code = 2


class ForeignRun(InflCacheError):
    """The run folder belongs to another task or configuration; nothing was touched."""

    exit_code = 3


class DamagedStore(InflCacheError):
    """A store does not hold what its ledger recorded."""

    exit_code = 4


class IncompleteStore(InflCacheError):
    """A stage needs rows that an earlier stage has not finished."""

    exit_code = 4


class DiskFull(InflCacheError):
    """The disk has no room left; what was committed stays good."""

    exit_code = 5


class Locked(InflCacheError):
    """Another process is writing into the run folder."""

    exit_code = 6


class Interrupted(InflCacheError):
    """A signal asked to stop, and the stage stopped between two blocks; it can be carried on."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
