"""One writer: the second one is told who the first is, and a dead one holds nothing."""

import os
import time

import pytest

from infl_cache.disk.lock import _HELD, only_writer
from infl_cache.errors import BadInput, Locked

HOLD = """
from pathlib import Path
from infl_cache.disk.lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def held(start_child, folder):
    child = start_child(HOLD, folder)
    assert child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_told_which_process_holds_the_folder(tmp_path, start_child):
    child = held(start_child, tmp_path)
    began = time.perf_counter()
    message = rf"expected no other writer, found process {child.pid} on .+; wait for it or stop it"
    with pytest.raises(Locked, match=message), only_writer(tmp_path):
        pass
    assert time.perf_counter() - began < 1
    # Being refused has not broken the lock of the first.
    with pytest.raises(Locked, match=message), only_writer(tmp_path):
        pass


def test_the_lock_is_free_at_once_after_its_holder_was_killed(tmp_path, start_child):
    child = held(start_child, tmp_path)
    child.kill()
    child.wait()
    began = time.perf_counter()
    with only_writer(tmp_path):
        assert time.perf_counter() - began < 1


def test_a_worker_that_the_killed_holder_had_forked_does_not_keep_the_lock(tmp_path, start_child):
    child = start_child(
        """
import os
from pathlib import Path
from infl_cache.disk.lock import only_writer
with only_writer(Path(sys.argv[1])):
    worker = os.fork()
    if not worker:
        print("forked", flush=True)
        sys.stdin.read()
        os._exit(0)
    os.waitpid(worker, 0)
""",
        tmp_path,
    )
    assert child.stdout.readline() == "forked\n"
    child.kill()
    child.wait()
    with only_writer(tmp_path):
        pass


def test_the_holder_named_is_the_living_one_and_not_a_killed_one(tmp_path, start_child):
    first = held(start_child, tmp_path)
    first.kill()
    first.wait()
    second = held(start_child, tmp_path)
    with pytest.raises(Locked, match=f"process {second.pid} "), only_writer(tmp_path):
        pass


def test_two_writers_in_one_process_exclude_each_other_too(tmp_path):
    with only_writer(tmp_path), pytest.raises(Locked, match=f"process {os.getpid()} "), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_an_error_inside_sets_the_folder_free(tmp_path):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path):
        raise ZeroDivisionError
    with only_writer(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "host": "h"}', '{"pid": 1}', "\x00\xff"])
def test_a_holder_file_that_says_nothing_does_not_hide_that_the_folder_is_locked(tmp_path, text):
    with only_writer(tmp_path):
        (tmp_path / ".lock-holder").write_text(text, encoding="latin-1")
        with pytest.raises(Locked, match="found another process"), only_writer(tmp_path):
            pass


def test_the_handler_of_forks_is_registered_once_for_all_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "register_at_fork", lambda **_: pytest.fail("one more for every lock"))
    with only_writer(tmp_path):
        assert len(_HELD) == 1
    assert not _HELD


def test_a_folder_that_cannot_be_written_names_no_writer(nobody_writes):
    with nobody_writes() as (folder, seal):
        seal()
        with pytest.raises(BadInput, match="cannot be written"), only_writer(folder):
            pass
