"""Tiles are whole or not there, know their names, and belong to one identity."""

from __future__ import annotations

import numpy as np
import pytest

from infl_cache.disk.sweep import remove_leftovers
from infl_cache.disk.tiles import FOLDER, TileFolder, bytes_of_tiles
from infl_cache.errors import DamagedStore, DiskFull

KINDS = ("gram", "factor")
VALUES = np.arange(6.0).reshape(2, 3)


def tiles(folder, identity="a", side=3):
    return TileFolder(folder, identity, side, KINDS)


def test_what_was_put_is_got_back_by_whoever_opens_the_folder(tmp_path):
    tiles(tmp_path).put("gram", 1, 0, VALUES.T.copy().T)
    again = tiles(tmp_path)
    assert again.has("gram", 1, 0)
    found = again.get("gram", 1, 0)
    assert (found.dtype, found.tolist()) == (np.float64, VALUES.ravel().tolist())
    found[0] = 7  # its own memory
    assert not again.has("gram", 0, 1)
    assert not again.has("factor", 1, 0)
    assert bytes_of_tiles(tmp_path) == 6 * 8 + 4


def test_a_tile_of_the_factor_takes_the_place_of_the_matrix_s(tmp_path):
    made = tiles(tmp_path)
    made.put("gram", 1, 0, VALUES), made.put("gram", 1, 1, VALUES)
    made.put("factor", 1, 0, -VALUES)
    for each in (made, tiles(tmp_path)):
        assert (each.has("gram", 1, 0), each.has("factor", 1, 0), each.has("gram", 1, 1)) == (False, True, True)
        assert each.get("factor", 1, 0).tolist() == (-VALUES).ravel().tolist()


def test_another_identity_finds_nothing_and_leaves_nothing(tmp_path):
    tiles(tmp_path, "a").put("gram", 0, 0, VALUES)
    other = tiles(tmp_path, "b")
    assert not other.has("gram", 0, 0)
    assert [each.name for each in tmp_path.iterdir()] == ["b-3"]


def test_tiles_that_are_there_keep_their_side(tmp_path):
    tiles(tmp_path, side=5).put("gram", 0, 0, VALUES)
    again = tiles(tmp_path, side=3)
    assert (again.side, again.has("gram", 0, 0)) == (5, True)


def test_a_tile_that_is_gone_is_named(tmp_path):
    made = tiles(tmp_path)
    made.put("gram", 0, 0, VALUES)
    next(tmp_path.rglob("*.tile")).unlink()
    with pytest.raises(DamagedStore, match=r"gram-0-0\.tile: cannot be read .*remove"):
        made.get("gram", 0, 0)


def test_room_is_counted_with_what_is_there(tmp_path, monkeypatch):
    made = tiles(tmp_path)
    made.put("gram", 0, 0, VALUES)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("infl_cache.disk.tiles.shutil.disk_usage", lambda path: usage)
    made.require_room(152)
    with pytest.raises(DiskFull, match="room for 101 bytes"):
        made.require_room(153)


def test_what_a_kill_left_half_written_is_swept_away(tmp_path):
    tiles(tmp_path / FOLDER).put("gram", 0, 0, VALUES)
    left = tmp_path / FOLDER / "a-3" / "gram-1-0.tile.partial"
    left.write_bytes(b"half")
    remove_leftovers(tmp_path)
    assert not left.exists()
    assert tiles(tmp_path / FOLDER).has("gram", 0, 0)


def test_a_folder_that_is_not_there_has_no_bytes(tmp_path):
    assert bytes_of_tiles(tmp_path / "none") == 0
