"""A trial store measures and leaves nothing behind."""

import numpy as np

from infl_cache.disk.codecs import Codec
from infl_cache.disk.layout import array_layout
from infl_cache.disk.trial import free_bytes, try_store


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
