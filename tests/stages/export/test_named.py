"""`run.to_xarray()`: the matrix itself under names, and what else is known."""

import numpy as np
import pytest

from infl_cache import BadInput, IncompleteStore, Run
from infl_cache.stages.suspects import column
from tests import tasks
from tests.test_reading import without_matrix

xarray = pytest.importorskip("xarray")
QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}


@pytest.fixture
def run(tmp_path):
    made = Run(tmp_path / "r", tasks.mlp(n_train=20, n_test=5), **QUIET)
    made.all()
    return made


def mapped(array):
    """Whether the numbers lie in a file that is mapped, not in memory."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_it_is_the_memory_map_of_the_scores_with_ids_and_labels(run):
    found, scores = run.to_xarray(), run.scores()
    assert found["influence"].dims == ("test", "train")
    np.testing.assert_array_equal(found["influence"], scores)
    values = found["influence"].variable._data
    assert mapped(values)
    assert not values.flags.writeable
    assert float(found["influence"].sel(test=3, train=7)) == scores[3, 7]
    labels = [each.tensors[1].numpy() for each in (run.task.test, run.task.train)]
    np.testing.assert_array_equal(found["test_label"], labels[0], strict=False)
    np.testing.assert_array_equal(found["train_label"], labels[1])
    by_class = found["influence"].groupby("train_label").mean()
    np.testing.assert_allclose(by_class.sel(train_label=0), scores[:, labels[1] == 0].mean(1)[:, None].squeeze())
    assert (found.attrs["n_train"], found.attrs["n_test"], found.attrs["damping"]) == (20, 5, 0.1)
    assert found.attrs["sign"].startswith("negative = helpful")
    assert float(found["test_residual"].max()) < 1e-6
    assert bool((found["test_converged"] == 1).all())
    assert "self_influence" not in found
    assert "layer_share" not in found


def test_it_has_what_else_was_computed(run):
    run.self_influence()
    both = Run(run.path, run.task, by_layer=True, progress=False)
    both.influence()
    found = both.to_xarray()
    np.testing.assert_array_equal(found["self_influence"], column(both.folder, "self_influence"))
    np.testing.assert_array_equal(found["layer_share"], both.layer_shares().share)
    assert found["layer"].values.tolist() == list(both.layer_shares().names)
    np.testing.assert_allclose(found["layer_share"].sum("layer"), 1)


def test_rows_that_nobody_asked_for_are_nan(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), test="1:3", **QUIET)
    run.all()
    found = run.to_xarray()
    assert np.isnan(found["influence"]).all("train").values.tolist() == [True, False, False, True]
    assert np.isnan(found["test_label"]).values.tolist() == [True, False, False, True]


def test_the_stores_open_in_xarray_with_the_same_names(run):
    run.self_influence()
    for name, sizes in (
        ("grad_z.zarr", {"train": 20}),
        ("s_test.zarr", {"row": 5, "parameter": 70}),
        ("self_influence.zarr", {"train": 20}),
    ):
        with xarray.open_zarr(run.path / name, consolidated=False, chunks=None) as found:
            assert dict(found.sizes) == sizes
    with xarray.open_zarr(run.path / "grad_z.zarr", group="0", consolidated=False, chunks=None) as layer:
        assert layer["input"].dims == ("train", "input_1", "input_2")
        assert layer["output_grad"].shape[0] == 20
    with xarray.open_zarr(run.path / "s_test.zarr", consolidated=False, chunks=None) as solved:
        np.testing.assert_array_equal(solved["s_test"], run.s_test(slice(None)))


def test_without_xarray_it_says_so(run, uninstalled):
    uninstalled("xarray")
    with pytest.raises(BadInput, match=r"expected xarray, found none; pip install 'infl_cache\[xarray\]'"):
        run.to_xarray()


def test_without_a_matrix_it_says_so(run):
    without_matrix(run.path)
    with pytest.raises(IncompleteStore, match="--no-matrix"):
        run.to_xarray()
