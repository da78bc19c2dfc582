"""A model of what a power cut leaves of a folder, from the syncs that a program made.

Durable is: the content of a file as it was at its last fsync, the names in a folder as they were at the folder's last
fsync, and the ledger as it was when a commit of its last returned (SQLite syncs by itself, out of sight). All else may
be there or not, whole, empty or garbled: `Disk.after_a_cut` makes such a folder.

Watched are `os.fsync` and the ledger; every write, rename, removal and sync is a moment at which the power may go.
"""

import os
import random
import threading
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from infl_cache.disk.ledger import Ledger

LEDGER = ("ledger.sqlite", "ledger.sqlite-wal")
MOMENTS = ("fsync", "write", "pwrite", "replace", "unlink", "mkdir")
# What becomes of a name, and of content, that was not synced.
NAMES, CONTENTS = ("lost", "there"), ("empty", "garbled", "cut", "there")


class Disk:
    """Watches a folder while a program writes it; `cut(moment)` is called at each moment, in any of its threads."""

    def __init__(self, folder, kept, cut=lambda moment: None):
        self.folder, self.kept, self.cut = folder, kept, cut
        self.kept.mkdir()
        self.contents, self.names, self.ledger = {}, {}, {}
        self.moments = 0
        self.order = []
        self._cutting = False
        self._lock = threading.RLock()

    @contextmanager
    def watched(self):
        """Inside, what the program does is seen."""
        doors = {name: patch.object(os, name, self._moment(name)) for name in MOMENTS}
        doors |= {
            name: patch.object(Ledger, name, self._committing(name))
            for name in ("__init__", "commit", "clear", "close")
        }
        for door in doors.values():
            door.start()
        try:
            yield self
        finally:
            for door in doors.values():
                door.stop()

    def _moment(self, name):
        original = getattr(os, name)

        def called(*given, **options):
            with self._lock:
                self._cut()
                found = original(*given, **options)
                if name == "fsync":
                    self._synced(Path(os.readlink(f"/proc/self/fd/{given[0]}")))
                return found

        return called

    def _committing(self, name):
        original = getattr(Ledger, name)

        def called(ledger, *given, **options):
            with self._lock:
                self._cut()
                found = original(ledger, *given, **options)
                self.ledger = {
                    each: (self.folder / each).read_bytes() for each in LEDGER if (self.folder / each).exists()
                }
                if name == "commit":
                    self.order.append(("commit", given[0]))
                return found

        return called

    def _cut(self):
        if not self._cutting:  # what is made of a cut is no moment of the program
            self._cutting = True
            self.moments += 1
            self.cut(self.moments)
            self._cutting = False

    def _synced(self, path):
        self.order.append(("sync", str(path)))
        if path.is_dir():
            self.names[str(path)] = {each.name: each.stat().st_ino for each in path.iterdir()}
        elif path.exists():
            number = path.stat().st_ino
            self.contents[number] = path.read_bytes()
            link = self.kept / str(number)  # as long as it is there no other file gets that number
            if not link.exists():
                os.link(path, link)

    def after_a_cut(self, place, names, contents, seed):
        """Make in `place` the folder that a cut now leaves, where names and contents that are not synced are so."""
        with self._lock:
            chance = random.Random(seed)
            parent = str(self.folder.parent)
            if self.folder.exists() and (names == "there" or self.folder.name in self.names.get(parent, {})):
                self._remake(self.folder, place, names, contents, chance)
                for name in LEDGER:
                    (place / name).unlink(missing_ok=True)
                for name, content in self.ledger.items():
                    (place / name).write_bytes(content)

    def _remake(self, folder, place, names, contents, chance):
        place.mkdir()
        live = {each.name: each for each in folder.iterdir()}
        durable = self.names.get(str(folder), {})
        for name in sorted(live if names == "there" else durable):
            path = live.get(name)
            if path is not None and path.is_dir():
                self._remake(path, place / name, names, contents, chance)
            elif not name.startswith(LEDGER[0]):
                number = path.stat().st_ino if names == "there" else durable[name]
                now = path.read_bytes() if path is not None and path.stat().st_ino == number else b""
                (place / name).write_bytes(self._content(number, now, contents, chance))

    def _content(self, number, now, contents, chance):
        """What is left of a file: that of its last sync, or, where it was written since, what `contents` says."""
        synced = self.contents.get(number, b"")
        if synced == now or (not now and synced):
            return synced
        if contents == "there":
            return now
        if contents == "cut":
            return synced or now[: chance.randrange(len(now) + 1)]
        if contents == "garbled":  # pages of the new and the old state, and pages of anything
            sizes = max(len(now), len(synced))
            pieces = [
                chance.choice((now, synced, chance.randbytes(sizes)))[start : start + 512]
                for start in range(0, sizes, 512)
            ]
            return b"".join(pieces) if synced and len(synced) == len(now) else chance.randbytes(len(now))
        return synced
