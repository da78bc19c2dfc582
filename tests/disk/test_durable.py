"""What is on the disk when a function returns, told by the order of the system calls."""

import errno
import os

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk.durable import (
    crc32c,
    crc32c_of_file,
    disk_full_is_said,
    remove,
    sync_file,
    sync_together,
    write_atomically,
)
from infl_cache.errors import DiskFull


@pytest.fixture
def calls(monkeypatch):
    """Every fsync (by inode, with the size at that moment) and every rename, in order."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def spied_fsync(descriptor):
        stat = os.fstat(descriptor)
        seen.append(("fsync", stat.st_ino, stat.st_size))
        fsync(descriptor)

    def spied_replace(source, target):
        seen.append(("replace", os.fspath(source), os.fspath(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    return seen


def test_an_atomic_write_syncs_the_data_then_renames_then_syncs_the_folder(tmp_path, calls):
    path = tmp_path / "manifest.json"
    write_atomically(path, b"whole")
    data, rename, folder = calls
    assert data == ("fsync", path.stat().st_ino, len(b"whole"))
    assert rename[0] == "replace"
    assert rename[2] == str(path)
    assert folder[:2] == ("fsync", tmp_path.stat().st_ino)
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch, broken):
    path = tmp_path / "manifest.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_syncing_folders_syncs_each_of_them_once(tmp_path, calls):
    folders = [tmp_path / name for name in ("b", "a")]
    for folder in folders:
        folder.mkdir()
    sync_together([*folders, *folders])
    assert sorted(inode for _, inode, _ in calls) == sorted(folder.stat().st_ino for folder in folders)


def test_one_sync_of_several_that_fails_is_not_lost(tmp_path, monkeypatch):
    files, fsync = [tmp_path / f"{number}" for number in range(5)], os.fsync
    for file in files:
        file.write_bytes(b"data")
    bad = files[3].stat().st_ino

    def failing(descriptor):
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(errno.EIO, "input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="input/output"):
        sync_together(files)


def test_syncing_a_file_leaves_no_descriptor_open_even_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"x")
    opened = []

    def fail(descriptor):
        opened.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync_file(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_the_checksum_is_castagnoli():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=300), st.integers(1, 50))
@settings(deadline=None)
def test_the_checksum_of_a_file_does_not_depend_on_the_pieces_it_is_read_in(tmp_path_factory, data, piece):
    path = tmp_path_factory.getbasetemp() / "pieces"
    path.write_bytes(data)
    assert crc32c_of_file(path, piece) == crc32c_of_file(path) == crc32c(data) == google_crc32c.value(data)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_are_a_full_disk(tmp_path, code):
    with pytest.raises(DiskFull) as full, disk_full_is_said(tmp_path / "missing"):
        raise OSError(code, os.strerror(code))
    assert full.value.exit_code == 5
    assert isinstance(full.value.__cause__, OSError)


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError, match="Input/output"), disk_full_is_said(tmp_path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_removing_takes_files_and_whole_folders_and_never_what_a_link_points_to(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "file").write_text("x")
    (tmp_path / "file").write_text("x")
    remove(tmp_path / name for name in ("link", "folder", "file", "missing"))
    assert os.listdir(tmp_path) == ["kept"]
    assert (kept / "file").read_text() == "x"
