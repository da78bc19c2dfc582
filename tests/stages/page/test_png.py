"""The PNG files are what another reader reads, pixel by pixel."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from infl_cache.stages.page.png import png, shrunk


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (5, 9, 3), (31, 2, 3)])
def test_a_picture_comes_back_as_it_was(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = np.round(255 * imread(io.BytesIO(png(picture)), format="png")).astype(np.uint8)
    assert np.array_equal(found, picture)


@pytest.mark.parametrize("shape", [(200, 100), (100, 200, 3), (65, 3)])
def test_a_large_picture_is_shrunk_to_means(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = shrunk(picture, 50)
    assert max(found.shape[:2]) == 50
    assert abs(found.shape[0] / found.shape[1] - shape[0] / shape[1]) < 0.5 * shape[0] / shape[1]
    assert abs(found.mean() - picture.mean()) < 4
    assert shrunk(picture, 200) is picture
    halves = shrunk(np.repeat(np.repeat(picture, 2, 0), 2, 1), max(shape[:2]))
    assert np.array_equal(halves, picture)
