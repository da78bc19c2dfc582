"""Files written past the page cache hold the same bytes, whatever their length and whatever the file system can."""

import errno
import os
import threading

import numpy as np
import pytest

from infl_cache.disk import direct
from infl_cache.disk.direct import PIECE, SECTOR, SMALLEST, write_durably

LENGTHS = [0, 1, SECTOR, SMALLEST - 4, SMALLEST, SMALLEST + 1, PIECE - 4, PIECE, PIECE + SECTOR + 7, 2 * PIECE + 5]


def content(length):
    return np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_file_of_any_length_holds_its_parts_one_after_the_other(tmp_path, length):
    body = content(length)
    write_durably(tmp_path / "file", body, b"tail")
    assert (tmp_path / "file").read_bytes() == body + b"tail"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_was_there_is_replaced_whole(tmp_path):
    (tmp_path / "file").write_bytes(content(3 * SMALLEST))
    write_durably(tmp_path / "file", content(SMALLEST))
    assert (tmp_path / "file").read_bytes() == content(SMALLEST)


def test_a_file_system_that_refuses_at_opening_gets_the_same_bytes(tmp_path, monkeypatch):
    opened, real = [], os.open

    def refusing(path, flags, mode=0o777):
        opened.append(bool(flags & direct.DIRECT))
        if flags & direct.DIRECT:
            raise OSError(errno.EINVAL, "no direct writing here")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    write_durably(tmp_path / "file", content(SMALLEST + 9))
    assert (tmp_path / "file").read_bytes() == content(SMALLEST + 9)
    assert opened == [True, False]


def test_a_file_system_that_refuses_at_writing_gets_the_same_bytes(tmp_path, monkeypatch):
    real, refused = os.write, []

    def refusing(descriptor, data):
        if direct.fcntl.fcntl(descriptor, direct.fcntl.F_GETFL) & direct.DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "not this length")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", refusing)
    write_durably(tmp_path / "file", content(PIECE + 77))
    assert (tmp_path / "file").read_bytes() == content(PIECE + 77)
    assert refused == [PIECE]


def test_another_error_is_raised_and_the_old_file_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="full"):
        write_durably(tmp_path / "file", content(SMALLEST))
    assert (tmp_path / "file").read_bytes() == b"old"


def test_short_writes_are_carried_on(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[: max(SECTOR, len(data) // 2)]))
    write_durably(tmp_path / "file", content(SMALLEST + 3 * SECTOR + 5))
    assert (tmp_path / "file").read_bytes() == content(SMALLEST + 3 * SECTOR + 5)


def test_threads_write_side_by_side_each_from_its_own_buffer(tmp_path):
    bodies = [content(SMALLEST + 1000 * number) for number in range(6)]
    files = [tmp_path / str(number) for number in range(6)]
    threads = [threading.Thread(target=write_durably, args=pair) for pair in zip(files, bodies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [file.read_bytes() == body for file, body in zip(files, bodies, strict=True)] == [True] * 6
