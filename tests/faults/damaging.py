"""Ways to damage a file of a run, and a child that tries them: what crashes an interpreter must be seen."""

import shutil
import sqlite3
import time

from infl_cache import Run
from infl_cache.disk.ledger import Ledger
from infl_cache.errors import DamagedStore, IncompleteStore
from tests import tasks
from tests.faults.killing import note

QUIET = {"progress": False}
OPTIONS = {"block_rows": 8, "test_block_rows": 3, "tile_rows": 3, "solver": "exact", "damping": 0.1, **QUIET}
PASSING = (".lock", "ledger.sqlite")


def task():
    """What the runs of these tests are about."""
    return tasks.mlp(n_train=20, n_test=5)


def made(path, **options):
    """A finished run of several blocks in every stage."""
    run = Run(path, task(), **{**OPTIONS, **options})
    run.all()
    return run


def contents(path):
    """Every file of a run but the ledger, which holds times, and the lock."""
    found = (each for each in path.rglob("*") if each.is_file() and not each.name.startswith(PASSING))
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in found}


def damaged(file, how):
    """Damage a file: cut to so many bytes (an int, from the end if negative), or in the way that is named."""
    data = bytearray(file.read_bytes())
    if isinstance(how, int):
        file.write_bytes(data[:how])
        return
    file.unlink()
    if how == "half":
        file.write_bytes(data[: len(data) // 2])
    elif how == "folder":
        file.mkdir()
    elif how.startswith("flip"):
        data[int(how.removeprefix("flip "))] ^= 1
        file.write_bytes(data)
    elif how.startswith("swap"):
        shutil.copy(file.parent / how.removeprefix("swap "), file)
    else:
        assert how == "gone"


def edited(path, sql, *values):
    """Change rows of the ledger behind its back."""
    with sqlite3.connect(path / "ledger.sqlite") as connection:
        assert connection.execute(sql, values).rowcount > 0
    connection.close()


class Commits:
    """Which blocks of which stage are committed from now on."""

    def __init__(self, monkeypatch):
        self.found = []
        original = Ledger.commit

        def commit(ledger, record):
            self.found.append((record.stage, record.index))
            original(ledger, record)

        monkeypatch.setattr(Ledger, "commit", commit)


def repair_slowly(path, log):
    """In a child: repair a run, with a line in the log and some time to be killed at each commit and at each claim."""

    def slowed(original, word):
        def called(*arguments):
            note(log, f"before {word}")
            time.sleep(0.02)
            original(*arguments)
            note(log, f"after {word}")
            time.sleep(0.02)

        return called

    Ledger.commit, Ledger.forget = slowed(Ledger.commit, "commit"), slowed(Ledger.forget, "forget")
    assert Run(path, task(), by_layer=True, **OPTIONS).verify(repair=True).sound


def read_everything(path):
    """In a child: whatever reads the damaged chunk refuses it; none crashes or gives a number."""
    for read in (lambda run: run.grad_z(slice(None)), lambda run: run.influence(force=True)):
        try:
            read(Run(path, task(), **OPTIONS))
        except (DamagedStore, IncompleteStore):
            continue
        raise SystemExit(f"{path}: read as if nothing had happened")


def try_damages(source, scratch, name, ways):
    """In a child: each way of damage to one file of a copy of a run; then everything that reads it."""
    for number, how in enumerate(ways):
        path = scratch / str(number)
        shutil.copytree(source, path)
        damaged(path / name, how)
        read_everything(path)
        shutil.rmtree(path)
