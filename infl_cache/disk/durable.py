"""Files that are on the disk when we say so: fsync of data and folders, atomic replacement, and a disk that is full."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import google_crc32c

from infl_cache.disk.direct import write_durably
from infl_cache.errors import BadInput, DiskFull

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system calls a disk, or a user's part of it, that is full."""

MOST_SYNCS = 16


def sync_file(path: Path) -> None:
    """Return once the content of `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_together(paths: Iterable[Path]) -> None:
    """Return once the contents of all these files and the names in all these folders are on the disk.

    In threads: a journal puts those that wait at the same time onto the disk by one commit.
    """
    different = sorted(set(paths))
    if len(different) == 1:
        sync_file(different[0])
    elif different:
        with ThreadPoolExecutor(min(len(different), MOST_SYNCS)) as pool:
            list(pool.map(sync_file, different))


def make_folders(folder: Path) -> None:
    """Make a folder and its parents; return once all the new names are on the disk."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    sync_together(each.parent for each in missing)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash or power cut it holds either the old or the new content."""
    write_durably(path, data)
    sync_file(path.parent)


def require_writable(path: Path) -> None:
    """`BadInput` unless a file of that name could be written: said before the work, not after it."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInput(f"{path}: expected a file that can be written, found a folder, or one that cannot be written in")


def require_folder(folder: Path) -> None:
    """`BadInput` unless files can be written in a folder that is there, or it can be made where it is missing."""
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    if not place.is_dir():
        raise BadInput(f"{place}: expected a folder that can be written in, found a file; move it, or remove it")
    if cannot_be_written(place):
        raise BadInput(f"{place}: expected a folder that can be written in, found one that is read-only or another's")


def cannot_be_written(folder: Path) -> bool:
    """Whether a folder is there in which this user, or anybody, can write nothing."""
    return folder.is_dir() and not os.access(folder, os.W_OK)


def crc32c_of_file(path: Path, piece: int = 1 << 22) -> int:
    """CRC-32C (Castagnoli) of the whole file."""
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(piece):
            crc = google_crc32c.extend(crc, data)
    return crc


def crc32c(data: bytes, before: int = 0) -> int:
    """CRC-32C (Castagnoli) of `data`, after what had the checksum `before`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    return int(google_crc32c.extend(before, data))


def remove(targets: Iterable[Path]) -> None:
    """Remove files and whole folders, those that are there."""
    for target in targets:
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


@contextmanager
def disk_full_is_said(folder: Path) -> Iterator[None]:
    """Turn "no space left" from any depth into `DiskFull`; what was committed stays good."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) not in DISK_FULL and "disk is full" not in str(error):
            raise
        free = shutil.disk_usage(folder if folder.exists() else os.curdir).free
        raise DiskFull(
            f"{folder}: the disk is full ({free:,} bytes free); make room and run the same command again,"
            " what was committed is kept"
        ) from error
