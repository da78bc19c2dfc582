"""The ledger survives what happens to files and processes, and readers never disturb it."""

import sqlite3
from dataclasses import replace

import pytest

from infl_cache.disk.ledger import BlockRecord, FileRecord, Ledger
from infl_cache.errors import DamagedStore

FILES = (FileRecord("grad_z.zarr/a/c.0.0", 68, 0xFFFFFFFF), FileRecord("grad_z.zarr/b/c.0", 40, 0))
FIRST = BlockRecord("grads", 0, 0, 4, "d0", 2, (1, 3), 0.25, 1.7e9, FILES)
SECOND = BlockRecord("grads", 1, 4, 8, "d1", 0, (), 0.5, 1.7e9 + 1, ())
OTHER = BlockRecord("stest", 0, 0, 2, "", 0, (), 1.0, 1.7e9 + 2, (FileRecord("s_test.zarr/c.0.0", 1, 2),))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def filled(path, *records):
    ledger = Ledger(path)
    for record in records:
        ledger.commit(record)
    return ledger


def read_only(path, stage="grads"):
    ledger = Ledger(path, read_only=True)
    try:
        return ledger.done(stage)
    finally:
        ledger.close()


def test_every_field_of_a_record_survives_closing_and_opening(path):
    filled(path, SECOND, FIRST, OTHER).close()
    again = Ledger(path)
    assert again.done("grads") == {0: FIRST, 1: SECOND}
    assert list(again.done("grads")) == [0, 1]
    assert again.done("stest") == {0: OTHER}
    assert again.done("influence") == {}
    again.close()


def test_a_block_committed_again_replaces_the_old_row_and_its_files(path):
    newer = replace(FIRST, digest="other", files=(FileRecord("grad_z.zarr/new", 1, 1),))
    ledger = filled(path, FIRST, SECOND, newer)
    assert ledger.done("grads") == {0: newer, 1: SECOND}
    ledger.close()


def test_clearing_a_stage_leaves_the_others(path):
    ledger = filled(path, FIRST, SECOND, OTHER)
    ledger.clear("grads")
    assert ledger.done("grads") == {}
    assert ledger.done("stest") == {0: OTHER}
    ledger.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT DISTINCT stage FROM files").fetchall() == [("stest",)]
    connection.close()


def test_a_commit_that_fails_half_way_changes_nothing(path):
    ledger = filled(path, FIRST)
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit(replace(FIRST, digest="half", files=(FILES[0], FILES[0])))
    assert ledger.done("grads") == {0: FIRST}
    ledger.close()


def test_a_commit_waits_for_the_disk(path):
    ledger = Ledger(path)
    full = 2
    assert ledger._connection.execute("PRAGMA synchronous").fetchone() == (full,)
    assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    ledger.close()


def test_a_commit_outlives_its_process(path, start_child):
    child = start_child(
        """
from pathlib import Path
from infl_cache.disk.ledger import BlockRecord, Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.commit(BlockRecord("grads", 7, 28, 32, "d", 0, (), 1.0, 2.0, ()))
print("committed", flush=True)
sys.stdin.read()
""",
        path,
    )
    assert child.stdout.readline() == "committed\n"
    assert list(read_only(path)) == [7], "a reader beside the writer"
    child.kill()
    child.wait()
    assert list(read_only(path)) == [7], "a reader after the writer was killed"
    ledger = Ledger(path)
    assert list(ledger.done("grads")) == [7]
    ledger.close()


def test_a_reader_sees_what_an_open_writer_has_committed_and_blocks_nobody(path):
    writer = filled(path, FIRST)
    reader = Ledger(path, read_only=True)
    assert reader.done("grads") == {0: FIRST}
    writer.commit(SECOND)
    assert reader.done("grads") == {0: FIRST, 1: SECOND}
    reader.close()
    writer.close()


def test_a_reader_cannot_write(path):
    filled(path, FIRST).close()
    reader = Ledger(path, read_only=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.commit(SECOND)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.clear("grads")
    assert reader.done("grads") == {0: FIRST}
    reader.close()


def test_reading_changes_no_byte_of_the_ledger(path):
    filled(path, FIRST, SECOND).close()
    before = path.read_bytes()
    assert list(read_only(path)) == [0, 1]
    assert path.read_bytes() == before


def test_a_finished_ledger_is_read_where_nothing_can_be_written(nobody_writes):
    with nobody_writes() as (folder, seal):
        filled(folder / "ledger.sqlite", FIRST, SECOND).close()
        seal()
        with pytest.raises(PermissionError):
            (folder / "probe").touch()
        assert read_only(folder / "ledger.sqlite") == {0: FIRST, 1: SECOND}


def test_what_a_killed_writer_committed_is_read_where_nothing_can_be_written(nobody_writes):
    with nobody_writes() as (folder, seal):
        writer = filled(folder / "ledger.sqlite", FIRST, SECOND)
        assert (folder / "ledger.sqlite-wal").stat().st_size > 0
        seal()
        assert read_only(folder / "ledger.sqlite") == {0: FIRST, 1: SECOND}
        writer.close()


def test_the_file_may_lie_in_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "50% a?b#c &d=1"
    folder.mkdir()
    filled(folder / "ledger.sqlite", FIRST).close()
    assert read_only(folder / "ledger.sqlite") == {0: FIRST}


@pytest.mark.parametrize("read", [True, False])
def test_a_file_that_is_no_ledger_is_named(path, read):
    path.write_bytes(b"no database, but longer than the header of one" * 40)
    with pytest.raises(DamagedStore, match=r"ledger\.sqlite: expected an SQLite ledger, found"):
        Ledger(path, read_only=read)
    assert path.read_bytes().startswith(b"no database")


def test_damaged_pages_are_an_error_and_no_empty_answer(path):
    records = [replace(FIRST, index=index) for index in range(200)]
    filled(path, *records).close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 : -4096] = bytes(len(data) - 4096 * 3)
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=r"ledger\.sqlite"):
        read_only(path)


@pytest.mark.parametrize("read", [True, False])
def test_the_error_of_a_damaged_ledger_says_what_to_do(path, read):
    path.write_bytes(b"no database")
    with pytest.raises(DamagedStore, match=r"restore|remove|--force"):
        Ledger(path, read_only=read)


@pytest.mark.parametrize("bad_rows", ["[1, 2", "7", '["x"]', "null"])
def test_a_row_that_cannot_be_understood_is_an_error(path, bad_rows):
    filled(path, FIRST).close()
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE blocks SET bad_rows = ?", (bad_rows,))
    connection.close()
    with pytest.raises(DamagedStore, match=r"ledger\.sqlite.*cannot be read"):
        read_only(path)
