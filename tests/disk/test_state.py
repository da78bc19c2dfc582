"""The state of an iteration: read back bit by bit, or not at all."""

import json
import os

import numpy as np
import pytest

from infl_cache.disk import state
from infl_cache.disk.state import read_header, read_state, write_state
from infl_cache.errors import DamagedStore

IDENTITY = {"stage": "abc", "block": 3}
ARRAYS = {
    "value": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "squared": np.array([np.nan, np.inf, 1e-300]),
    "steps": np.array([1, -(2**40), 7]),
    "active": np.array([True, False, True]),
    "generator": np.arange(5, dtype=np.uint8),
    "nothing": np.empty((0, 4), np.float32),
    "one": np.array(2.5),
}


@pytest.fixture
def path(tmp_path):
    write_state(tmp_path / "s_test.state", IDENTITY, {"iteration": 5}, ARRAYS)
    return tmp_path / "s_test.state"


def read(path):
    return read_state(path, read_header(path))


def test_what_was_kept_is_read_bit_by_bit(path):
    header, found = read_header(path), read(path)
    assert (header.identity, header.facts, header.n_bytes) == (IDENTITY, {"iteration": 5}, path.stat().st_size)
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        found[name][...] = 0  # its own, to be computed with


def test_where_there_is_no_file_there_is_no_state(tmp_path):
    assert read_header(tmp_path / "none") is None


def test_every_flipped_bit_and_every_length_is_found(path):
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(DamagedStore):
            read(path)
        path.write_bytes(whole[:place])
        with pytest.raises(DamagedStore):
            read(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedStore, match="found a damaged file"):
        read(path)


def test_objects_are_neither_written_nor_read(path, tmp_path):
    with pytest.raises(ValueError, match="expected one of float32"):
        write_state(tmp_path / "o", {}, {}, {"x": np.array([object()])})
    assert not (tmp_path / "o").exists()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"float32"', b'"object" ', 1))
    with pytest.raises(DamagedStore):
        read(path)


def test_a_header_that_promises_more_than_there_is_takes_no_memory(path):
    header = json.dumps({"identity": {}, "facts": {}, "arrays": [["x", "float64", [2**60]]]}).encode()
    path.write_bytes(state.MAGIC + len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(DamagedStore, match="bytes, found"):
        read_header(path)


def test_a_new_state_replaces_the_old_one_whole(path, monkeypatch):
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_state(path, IDENTITY, {"iteration": 6}, ARRAYS)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_state(path, IDENTITY, {"iteration": 6}, {"value": np.zeros(2)})
    assert read_header(path).facts == {"iteration": 6}
    assert read(path)["value"].tolist() == [0, 0]


def test_arrays_of_many_pieces(tmp_path):
    large = np.random.default_rng(0).standard_normal(state.PIECE // 8 * 2 + 3)
    write_state(tmp_path / "s", {}, {}, {"a": large, "b": large[::2]})
    found = read(tmp_path / "s")
    assert np.array_equal(found["a"], large)
    assert np.array_equal(found["b"], large[::2])
