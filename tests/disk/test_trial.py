"""A trial store measures and leaves nothing behind."""

import numpy as np

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import array_layout
from infl_cache.disk.trial import allocated_bytes, free_bytes, try_codec, try_matrix, try_store


def test_a_trial_next_to_a_folder_that_is_not_there_yet(tmp_path):
    layouts = [array_layout("x", 64, (100,), "float32", 64)]
    trial = try_store(tmp_path / "not" / "there", layouts, Codec("none", 5), {"x": np.ones((64, 100), np.float32)})
    assert trial.n_bytes == 64 * 100 * 4 + 4
    assert min(trial.encode_seconds, trial.write_seconds, trial.read_seconds) > 0
    assert free_bytes(tmp_path / "not" / "there") > trial.n_bytes
    assert list(tmp_path.iterdir()) == []


def test_compression_shows_in_the_bytes(tmp_path):
    layouts = [array_layout("x", 64, (100,), "float32", 64)]
    sizes = [
        try_store(tmp_path, layouts, codec, {"x": np.zeros((64, 100), np.float32)}).n_bytes
        for codec in (Codec("none", 5), Codec("lz4", 5))
    ]
    assert sizes[1] < sizes[0] / 10


def test_a_codec_is_tried_in_memory_and_says_what_the_store_says(tmp_path):
    layouts = [array_layout("x", 64, (100,), "float32", 64)]
    data = {"x": np.random.default_rng(0).standard_normal((64, 100)).astype(np.float32).round(1)}
    for codec in (Codec("none", 5), Codec("lz4", 5), Codec("zstd", 5)):
        size, encoding, decoding = try_codec(layouts, codec, data)
        assert abs(size - try_store(tmp_path, layouts, codec, data).n_bytes) < 0.1 * size
        assert min(encoding, decoding) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_tile_is_tried_and_nothing_is_left(tmp_path):
    assert try_matrix(tmp_path, 3, 5) > 0
    assert list(tmp_path.iterdir()) == []


def test_holes_of_a_file_take_no_room(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(10**7)
    assert allocated_bytes(tmp_path / "file") < 10**6
    (tmp_path / "file").write_bytes(bytes(10**6))
    assert allocated_bytes(tmp_path / "file") >= 10**6
    assert allocated_bytes(tmp_path / "none") == 0
