"""The long table in Parquet: every number as NumPy has it on the whole matrix, and never many rows in memory."""

import io
import tracemalloc

import numpy as np
import pytest

from infl_cache import BadInput, IncompleteStore, Run
from infl_cache.disk.run import RunFolder
from infl_cache.stages.export import export, parquet
from tests import tasks
from tests.test_reading import without_matrix

pq = pytest.importorskip("pyarrow.parquet")
pd = pytest.importorskip("pandas")

QUIET = {"progress": False, "damping": 0.1, "solver": "exact"}
COLUMNS = [
    "test_id", "train_id", "rank", "effect", "influence", "loss_change_if_removed", "test_label", "train_label"
]  # fmt: skip


@pytest.fixture(scope="module", params=["loss", "margin"])
def run(request, tmp_path_factory):
    made = Run(tmp_path_factory.mktemp("run") / "r", tasks.mlp(n_train=20, n_test=5), measure=request.param, **QUIET)
    made.all()
    return made


def expected(run, k=None):
    """Every pair (of each end k at most) that helps or harms, by a loop over the matrix."""
    sign = -1 if run.options.selection.measure == "margin" else 1
    lines = []
    for j, row in enumerate(np.array(run.scores())):
        for effect, direction in (("helpful", sign), ("harmful", -sign)):
            order = [i for i in np.argsort(direction * row, kind="stable") if direction * row[i] < 0]
            lines += [(j, int(i), place + 1, effect, row[i]) for place, i in enumerate(order[:k])]
    return pd.DataFrame(lines, columns=COLUMNS[:5])


def table(path):
    found = pd.read_parquet(path)
    assert list(found.columns) == COLUMNS
    np.testing.assert_array_equal(found["loss_change_if_removed"], -found["influence"])
    return found


@pytest.mark.parametrize("top_k", [3, None])
def test_the_strongest_of_either_end_and_no_other(run, top_k, tmp_path):
    found = table(export(run.folder, "parquet", tmp_path / "t.parquet", top_k, show=False))
    wanted = expected(run, top_k or 100)
    assert found[COLUMNS[:4]].astype({"effect": str}).values.tolist() == wanted[COLUMNS[:4]].values.tolist()
    assert found["influence"].tolist() == wanted["influence"].tolist()
    targets = [each.tensors[1].numpy() for each in (run.task.test, run.task.train)]
    assert (found["test_label"].to_numpy() == targets[0][found["test_id"]]).all()
    assert (found["train_label"].to_numpy() == targets[1][found["train_id"]]).all()


def test_all_pairs_in_the_order_of_the_matrix_in_groups_of_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "PAIRS", 12)
    path = export(run.folder, "parquet", tmp_path / "t.parquet", "all", show=False)
    found, matrix = table(path), np.array(run.scores())
    assert found["test_id"].tolist() == np.repeat(np.arange(5), 20).tolist()
    assert found["train_id"].tolist() == np.tile(np.arange(20), 5).tolist()
    np.testing.assert_array_equal(found["influence"], matrix.ravel())
    order = ["test_id", "effect", "rank"]
    ranked = found.astype({"effect": str}).sort_values(order)[COLUMNS[:4]].values.tolist()
    assert ranked == expected(run).sort_values(order)[COLUMNS[:4]].values.tolist()
    groups = pq.ParquetFile(path).metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [12, 20, 20, 20, 20, 8]


def test_the_schema_says_what_the_numbers_mean(run, tmp_path):
    schema = pq.read_schema(export(run.folder, "parquet", tmp_path / "t.parquet", 1, show=False))
    facts = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert facts["n_train"] == "20"
    assert facts["n_test"] == "5"
    assert (facts["damping"], facts["solver"]) == ("0.1", "exact")
    measure = run.options.selection.measure
    assert facts["measure"] == measure
    assert facts["sign"].startswith("negative = helpful" if measure == "loss" else "positive = helpful")
    assert [str(schema.field(name).type) for name in ("train_id", "influence", "test_label")] == [
        "int64", "float", "int64"
    ]  # fmt: skip


def test_what_was_not_asked_for_is_left_out_and_what_is_not_finite_is_null(tmp_path):
    task = tasks.regression(n_train=8, n_test=4)
    task.train.tensors[0][3] = np.inf
    run = Run(tmp_path / "r", task, test="1:3", nonfinite="skip", **QUIET)
    run.all()
    every = table(export(run.folder, "parquet", None, "all", show=False))
    assert every["test_id"].unique().tolist() == [1, 2]
    lost = every[every["train_id"] == 3]
    assert len(lost) == 2
    assert lost[["rank", "effect", "influence", "loss_change_if_removed"]].isna().all(axis=None)
    assert every[every["train_id"] != 3]["influence"].notna().all()
    strongest = table(export(run.folder, "parquet", None, 8, show=False))
    assert sorted(strongest["train_id"].unique()) == [0, 1, 2, 4, 5, 6, 7]
    schema = pq.read_schema(run.path / "export" / "influence.parquet")
    assert str(schema.field("train_label").type) == "double"


def test_a_run_without_a_matrix_has_its_rankings_and_no_more(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), top_k=3, **QUIET)
    run.all()
    kept = expected(run, 3)
    without_matrix(run.path)
    found = table(export(RunFolder(run.path), "parquet", show=False))
    assert found[COLUMNS[:4]].astype({"effect": str}).values.tolist() == kept[COLUMNS[:4]].values.tolist()
    with pytest.raises(BadInput, match=r"k: expected at most 3, .*found 4"):
        export(RunFolder(run.path), "parquet", top_k=4, show=False)
    with pytest.raises(IncompleteStore, match=r"expected a matrix for --top-k all, found .*--no-matrix"):
        export(RunFolder(run.path), "parquet", top_k="all", show=False)


def test_ranks_equal_a_plain_sort_with_ties_zeros_and_nan():
    row = np.random.default_rng(0).integers(-3, 4, 200).astype(np.float32)
    row[::17] = np.nan
    for sign in (1, -1):
        found, kinds = parquet.ranks(row, sign), parquet.effects(row, sign)
        for effect, direction in ((0, sign), (1, -sign)):
            keys = [(direction * value, i) for i, value in enumerate(row) if direction * value < 0]
            assert [i for _, i in sorted(keys)] == [int(np.flatnonzero((kinds == effect) & (found == place + 1))[0])
                                                   for place in range(len(keys))]  # fmt: skip
        assert ((found == 0) == ((row == 0) | np.isnan(row))).all()


def test_an_empty_table_has_its_columns():
    file = io.BytesIO()
    labels = parquet.Labels(np.zeros(1), np.zeros(2))
    parquet.write_all(file, [], labels, 1, {})
    assert pq.read_table(file).column_names == COLUMNS


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(parquet, "PAIRS", 1 << 14)
    arrow, n_train = parquet.require_pyarrow(), 20_000
    labels = parquet.Labels(np.zeros(100), np.zeros(n_train))

    def peak(n_test):
        rows = ((j, np.random.default_rng(j).standard_normal(n_train, np.float32)) for j in range(n_test))
        with arrow.OSFile("/dev/null", "wb") as file:
            tracemalloc.start()
            parquet.write_all(file, rows, labels, 1, {})
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most, arrow.total_allocated_bytes()

    (few, _), (many, left) = peak(3), peak(30)
    assert many < few + 500_000
    assert left < 20_000_000


def test_a_kind_word_where_pyarrow_is_missing(run, uninstalled, tmp_path):
    uninstalled("pyarrow")
    with pytest.raises(BadInput, match=r"expected pyarrow, found none; pip install 'infl_cache\[parquet\]'"):
        export(run.folder, "parquet", tmp_path / "new" / "t.parquet", show=False)
    assert not (tmp_path / "new").exists()
