"""Every error this package raises on purpose, and the exit code each one becomes on the command line."""

from __future__ import annotations


class InflCacheError(Exception):
    """Base of all errors raised on purpose: one or two lines that say expected, found and remedy.

    `exit_code` is what the command line returns for it (see `infl-cache help errors`).

    >>> try:
    ...     raise DiskFull("grads: expected 2.0 GB free, found 1.0 GB; use another disk")
    ... except InflCacheError as error:
    ...     print(error.exit_code, error)
    5 grads: expected 2.0 GB free, found 1.0 GB; use another disk
    """

    exit_code = 1


class BadInput(InflCacheError):
    """The task, its data or an option cannot be used; nothing was written.

    >>> from infl_cache import Options
    >>> Options.resolve({"damping": -1})
    Traceback (most recent call last):
    infl_cache.errors.BadInput: damping: expected a finite number at least 0.0, found -1.0
    """

    exit_code = 2


class ForeignRun(InflCacheError):
    """The run folder belongs to another task or configuration; nothing was touched.

    >>> ForeignRun("runs/r belongs to another task or configuration: damping: expected 0.1, found 0.2").exit_code
    3
    """

    exit_code = 3


class DamagedStore(InflCacheError):
    """A store does not hold what its ledger recorded.

    >>> DamagedStore("grad_z.zarr/loss/c.0 (rows 0 to 19): expected 112 bytes, found no file").exit_code
    4
    """

    exit_code = 4


class IncompleteStore(InflCacheError):
    """A stage needs rows that an earlier stage has not finished.

    >>> IncompleteStore("runs/r: expected grads to be finished, found 3 of 8 blocks; run infl-cache grads").exit_code
    4
    """

    exit_code = 4


class DiskFull(InflCacheError):
    """The disk has no room left; what was committed stays good.

    >>> DiskFull("runs/r: the disk is full (0 bytes free); make room and run the same command again").exit_code
    5
    """

    exit_code = 5


class Locked(InflCacheError):
    """Another process is writing into the run folder.

    >>> Locked("runs/r: expected no other writer, found process 4711 on here; wait for it or stop it").exit_code
    6
    """

    exit_code = 6


class Interrupted(InflCacheError):
    """A signal asked to stop, and the stage stopped between two blocks; it can be carried on.

    >>> import signal
    >>> Interrupted("stopped by SIGINT between two blocks; what is done is kept", signal.SIGINT).exit_code
    130
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
