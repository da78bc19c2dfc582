import numpy as np
import pytest
import torch

from infl_cache import BadInput, DamagedStore, ForeignRun, IncompleteStore, Run
from infl_cache.disk.layout import blocks
from infl_cache.disk.run import RunFolder
from infl_cache.maths import scores
from infl_cache.stages import influence as stage
from infl_cache.stages.export import export
from infl_cache.stages.tiles import all_tiles
from tests import tasks
from tests.tasks import TASKS

QUIET = {"progress": False}


def expected_matrix(run):
    gradients, s_test = run.grad_z(slice(None)).astype(np.float64), run.s_test(slice(None)).astype(np.float64)
    return -s_test @ gradients.T / len(gradients)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(set(TASKS) - {"branching"}))
def test_the_matrix_equals_numpy(name, dtype, tmp_path):
    run = Run(tmp_path / "r", TASKS[name](dtype), damping=0.1, block_rows=4, **QUIET)
    run.all()
    matrix = run.scores()
    assert (matrix.dtype, matrix.shape) == (np.float32, (4, 10))
    assert relative(matrix, expected_matrix(run)) <= 1e-6


def wide(dtype=torch.float32, n_train=30, n_test=7):
    """Layers so wide that they are stored as factors, at one position and at several."""

    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(24, 40), torch.nn.Linear(40, 30)

        def forward(self, x):
            return self.outer(torch.tanh(self.inner(x)).sum(1))

    model = tasks.built(Wide, dtype)
    return tasks.classified(model, tasks.normal(n_train + n_test, 3, 24, dtype=dtype), n_train, classes=30)


@pytest.mark.parametrize("options", [{"tile_rows": 1}, {"tile_rows": 3, "block_rows": 7}, {"block_rows": 1}])
def test_tiles_and_blocks_change_nothing(options, tmp_path):
    first, other = (
        Run(tmp_path / name, wide(), damping=0.1, solver="exact", **given, **QUIET)
        for name, given in (("a", {}), ("b", options))
    )
    first.all(), other.all()
    assert [layer["key"] for layer in first.folder.plan("grads")["forms"]["factored"]] == ["inner", "outer"]
    assert relative(other.scores(), first.scores()) <= 1e-6
    assert relative(first.scores(), expected_matrix(first)) <= 1e-6


def test_a_form_dense_run_gives_the_same_matrix(tmp_path):
    factored, dense = (
        Run(tmp_path / form, wide(), damping=0.1, solver="exact", form=form, **QUIET) for form in ("auto", "dense")
    )
    factored.all(), dense.all()
    assert relative(factored.scores(), dense.scores()) <= 1e-6


@pytest.mark.parametrize(
    ("n_test", "n_train", "rows", "block", "group"), [(7, 30, 3, 7, 2), (1, 1, 1, 1, 1), (5, 11, 9, 4, 9)]
)
def test_tiles_cover_every_entry_exactly_once(n_test, n_train, rows, block, group):
    seen = np.zeros((n_test, n_train), int)
    for tile in all_tiles(blocks(n_test, rows), blocks(n_train, block), group):
        seen[tile.test.start : tile.test.stop, tile.columns] += 1
    assert (seen == 1).all()


def test_stages_that_are_not_finished_are_said(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    with pytest.raises(IncompleteStore, match=r"expected the stage grads, found it not begun; run infl-cache grads"):
        run.influence()
    run.grads()
    with pytest.raises(IncompleteStore, match="stest"):
        run.influence()


def test_an_unfinished_matrix_never_has_the_final_name(tmp_path, monkeypatch):
    run = Run(tmp_path / "r", tasks.mlp(), block_rows=2, damping=0.1, **QUIET)
    run.grads(), run.stest()
    monkeypatch.setattr(stage, "TILE_COLUMNS", 2)
    original, calls = scores.influence, []

    def failing(dots, n_train):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the lights went out")
        return original(dots, n_train)

    monkeypatch.setattr(scores, "influence", failing)
    with pytest.raises(RuntimeError, match="lights"):
        run.influence()
    assert not (tmp_path / "r" / "influence.npy").exists()
    with pytest.raises(IncompleteStore, match="expected a finished matrix"):
        run.scores()
    again = Run(tmp_path / "r", tasks.mlp(), **QUIET)
    again.influence()
    assert len(calls) == 2 + 1 + 3, "two tiles were committed, one was in flight, three were left"
    assert relative(again.scores(), expected_matrix(again)) <= 1e-6


@pytest.mark.parametrize("file", ["grad_z.zarr/dense/c.0.0", "s_test.zarr/s_test/c.0.0"])
def test_a_flipped_bit_in_a_store_never_reaches_the_matrix(file, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, form="dense", **QUIET)
    run.grads(), run.stest()
    path = tmp_path / "r" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match=rf"{file.rpartition('/')[0]}.*rows 0 to \d+"):
        Run(tmp_path / "r", tasks.mlp(), **QUIET).influence()
    assert not (tmp_path / "r" / "influence.npy").exists()


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_products_in_bfloat16_are_near_and_say_how_near(form, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, form=form, product_dtype="bfloat16", **QUIET)
    run.all()
    error = relative(run.scores(), expected_matrix(run))
    assert 1e-5 < error < 2e-2
    measured = run.folder.plan("influence")["product_error"]
    assert measured["relative"] == pytest.approx(error, rel=0.5)
    assert "bfloat16: influences change by" in str(run.status())
    with pytest.raises(ForeignRun, match="product_dtype"):
        Run(tmp_path / "r", tasks.mlp(), product_dtype="float32", **QUIET).influence()
    again = Run(tmp_path / "r", tasks.mlp(), product_dtype="float32", **QUIET)
    again.influence(force=True)
    assert relative(again.scores(), expected_matrix(again)) <= 1e-6


def test_a_valid_chunk_in_another_place_never_reaches_the_matrix(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, form="dense", block_rows=5, **QUIET)
    run.grads(), run.stest()
    chunks = tmp_path / "r" / "grad_z.zarr" / "dense"
    (chunks / "c.0.0").write_bytes((chunks / "c.1.0").read_bytes())
    with pytest.raises(DamagedStore, match=r"dense/c\.0\.0 \(rows 0 to 4\)"):
        Run(tmp_path / "r", tasks.mlp(), **QUIET).influence()


def test_a_damaged_matrix_is_noticed_on_the_next_call(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET)
    run.all()
    path = tmp_path / "r" / "influence.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedStore, match="test rows 0 to 3, train columns 0 to 9 are not what was committed"):
        Run(tmp_path / "r", tasks.mlp(), **QUIET).influence()


def test_samples_that_are_not_finite_are_nan_and_out_of_the_rankings(tmp_path):
    task = tasks.logistic()
    task.test.tensors[0][2] = torch.inf
    run = Run(tmp_path / "r", task, nonfinite="skip", damping=0.1, **QUIET)
    run.all()
    assert np.isnan(run.scores()[2]).all()
    assert np.isfinite(run.scores()[[0, 1, 3]]).all()
    saved = np.load(tmp_path / "r" / "rankings.npz", allow_pickle=False)
    assert (saved["helpful_ids"][2] == -1).all()
    assert len(run.helpful(2).ids) == 0
    assert np.allclose(saved["mean"], run.scores()[[0, 1, 3]].mean(0), rtol=1e-6)


def test_rankings_per_test_sample_and_of_the_mean(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, top_k=4, **QUIET)
    run.all()
    saved, matrix = np.load(tmp_path / "r" / "rankings.npz", allow_pickle=False), run.scores()
    for j in range(4):
        order = np.argsort(matrix[j], kind="stable")
        assert saved["helpful_ids"][j].tolist() == order[:4].tolist() == run.helpful(j, k=4).ids.tolist()
        assert saved["harmful_ids"][j].tolist() == order[::-1][:4].tolist() == run.harmful(j, k=4).ids.tolist()
        assert np.array_equal(saved["harmful_values"][j], matrix[j][order[::-1][:4]])
    mean = matrix.astype(np.float64).mean(0)
    assert saved["mean_helpful_ids"].tolist() == np.argsort(mean, kind="stable")[:4].tolist()
    assert saved["mean_harmful_ids"].tolist() == np.argsort(-mean, kind="stable")[:4].tolist()


def test_other_rankings_are_made_without_computing_the_matrix_again(tmp_path, monkeypatch):
    Run(tmp_path / "r", tasks.mlp(), damping=0.1, top_k=4, **QUIET).all()
    monkeypatch.setattr(stage, "_compute", None)
    Run(tmp_path / "r", tasks.mlp(), top_k=6, **QUIET).influence()
    assert np.load(tmp_path / "r" / "rankings.npz")["helpful_ids"].shape == (4, 6)


def test_an_edited_manifest_is_never_believed(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET)
    run.all()
    manifest = tmp_path / "r" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"damping": 0.1', '"damping": 0.2'))
    with pytest.raises(DamagedStore, match="found an edited one"):
        run.stest()


@pytest.mark.parametrize(("model", "stored"), [(torch.float32, "float64"), (torch.float64, "float32")])
def test_gradients_stored_in_another_type_than_the_model_s_are_scored(model, stored, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(model), dtype=stored, damping=0.1, **QUIET)
    run.all()
    assert run.grad_z(0).dtype == np.dtype(stored)
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6


def test_a_parameter_without_axes_is_scored(tmp_path):
    class Scaled(torch.nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.scale * super().forward(x)

    task = tasks.classified(tasks.built(Scaled, torch.float64), tasks.normal(14, 5), 10)
    run = Run(tmp_path / "r", task, damping=0.1, **QUIET)
    run.all()
    assert relative(run.scores(), expected_matrix(run)) <= 1e-6


def test_readers_refuse_a_damaged_matrix_and_another_task(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET)
    run.all()
    with pytest.raises(ForeignRun, match="expected the sample"):
        Run(tmp_path / "r", tasks.regression()).scores()
    path = tmp_path / "r" / "influence.npy"
    data = path.read_bytes()
    for damaged in (data[:-5], data[:-4] + b"\0\0\0\0"):
        path.write_bytes(damaged)
        with pytest.raises(DamagedStore):
            Run(tmp_path / "r").scores()
        with pytest.raises(DamagedStore):
            export(RunFolder(tmp_path / "r"), "csv")


@pytest.mark.parametrize("k", [0, -1])
def test_a_ranking_of_no_length_and_rows_that_are_none_are_refused(k, tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), damping=0.1, **QUIET)
    run.all()
    with pytest.raises(BadInput, match="k: expected at least 1"):
        run.helpful(0, k=k)
    for rows in ([True, False], [1.5], [99], [-1]):
        with pytest.raises(BadInput, match="expected row numbers from 0 to 9"):
            run.grad_z(rows)
    assert run.grad_z([]).shape == (0, run.grad_z(0).shape[0])
