"""What each layer gives is what its own columns give; the layers sum to the matrix, and their shares to one."""

import shutil

import numpy as np
import pytest
import torch

from infl_cache import BadInput, DamagedStore, DiskFull, IncompleteStore, Run
from infl_cache.__main__ import main
from infl_cache.disk.reader import BlockReader
from infl_cache.disk.run import RunFolder
from infl_cache.disk.state import read_header
from infl_cache.stages import by_layer as stage
from infl_cache.stages import contraction, room, source
from infl_cache.stages import influence as whole_stage
from infl_cache.stages.layers import LayerShares
from infl_cache.stages.report import report
from infl_cache.stages.verify import verify
from tests import tasks
from tests.stages.test_contraction import steps_of
from tests.stages.test_influence import wide
from tests.tasks import TASKS

QUIET = {"progress": False}
OPTIONS = {"damping": 0.1, "solver": "identity", "block_rows": 4, "tile_rows": 3, **QUIET}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(whole_stage, "TILE_COLUMNS", 4)


def made(path, task, **options):
    run = Run(path, task, **{**OPTIONS, "by_layer": True, **options})
    run.all()
    return run


def columns_of(task):
    """Each module's columns of a plain row, from the model's own names."""
    found, start = {}, 0
    for name, parameter in task.model.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).extend(range(start, start + parameter.numel()))
        start += parameter.numel()
    return found


def expected_layers(run):
    """The slow twin: float64 rows of both stores, cut into columns."""
    tests = np.sort(run.tests)
    gradients, s_test = run.grad_z(slice(None)).astype(np.float64), run.s_test(tests).astype(np.float64)
    return {
        name: -s_test[:, at] @ gradients[:, at].T / len(gradients) for name, at in columns_of(run.task).items()
    }, tests


def check(run, tolerance=1e-6):
    """Layers, their sum and their shares, beside the twin's."""
    (expected, tests), found, shares = expected_layers(run), run.by_layer(), run.layer_shares()
    total = sum(expected.values())
    size = np.linalg.norm(total)
    assert list(found) == list(expected) == list(shares.names)
    for layer, (name, values) in enumerate(expected.items()):
        assert np.linalg.norm(found[name][tests] - values) <= tolerance * size, name
        assert shares.parameters[layer] == len(columns_of(run.task)[name])
        share = (values * total).sum(1) / (total * total).sum(1)
        np.testing.assert_allclose(shares.share[layer, tests], share, rtol=0, atol=10 * tolerance)
        of_all = (values * total).sum() / size**2
        np.testing.assert_allclose(shares.share_of_all[layer], of_all, rtol=0, atol=10 * tolerance)
    summed = sum(np.array(values[tests], np.float64) for values in found.values())
    assert np.linalg.norm(summed - run.scores()[tests]) <= 1e-6 * size
    np.testing.assert_allclose(shares.share[:, tests].sum(0), 1, atol=1e-5)
    assert shares.share_of_all.sum() == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """An undisturbed run."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whole_stage, "TILE_COLUMNS", 4)
        return made(tmp_path_factory.mktemp("calm") / "r", wide())


MODELS = sorted(set(TASKS) - {"branching"})


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in MODELS), *((name, torch.float32) for name in ("convnet", "mlp", "tied"))],
)
def test_layers_equal_their_columns_in_numpy_and_sum_to_the_matrix(name, dtype, tmp_path):
    run = made(tmp_path / "r", TASKS[name](dtype))
    check(run)
    stored = np.load(tmp_path / "r" / "influence_by_layer.npy", mmap_mode="r", allow_pickle=False)
    assert (stored.dtype, stored.shape) == (np.float32, (len(run.by_layer()), 4, 10))
    assert not any(values.flags.writeable for values in run.by_layer().values())


@pytest.mark.parametrize(
    "given",
    [{"layer_forms": "*=factored", "codec": "none"}, {"memory": "4KB"}, {"memory": "4KB", "form": "dense"}],
    ids=str,
)
@pytest.mark.parametrize("make", [TASKS["tied"], wide], ids=["tied", "wide"])
def test_forms_and_memory_change_nothing(make, given, monkeypatch, tmp_path):
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_BYTES", 2000)
    monkeypatch.setattr("infl_cache.disk.layout.CHUNK_COLUMNS", 50)
    check(made(tmp_path / "r", make(), **given))


def test_products_in_bfloat16_are_near(calm, tmp_path):
    run = made(tmp_path / "r", wide(), product_dtype="bfloat16")
    for name, values in calm.by_layer().items():
        assert 0 < np.linalg.norm(run.by_layer()[name] - values) < 2e-2 * np.linalg.norm(values)


def test_gradients_that_are_not_kept_are_made_once_for_all_layers(calm, monkeypatch, tmp_path):
    seen, plain = [], source.capture
    monkeypatch.setattr(source, "capture", lambda *given: (seen.append(1), plain(*given))[1])
    run = Run(tmp_path / "r", wide(), **{**OPTIONS, "tile_rows": 7}, cache=False)
    run.all()
    once = len(seen)
    made(tmp_path / "r", wide(), tile_rows=7, cache=False)
    assert once > 0
    assert len(seen) == 2 * once
    for name, values in run.by_layer().items():
        np.testing.assert_allclose(values, calm.by_layer()[name], rtol=1e-4, atol=1e-6)


def test_each_store_is_read_once(monkeypatch, tmp_path):
    """For a row of tiles: what a layer is made of, and its part of s_test, which lies in chunks with other layers'."""
    Run(tmp_path / "r", wide(), **{**OPTIONS, "tile_rows": 7}).all()
    opened, plain = [], BlockReader._content
    monkeypatch.setattr(
        BlockReader, "_content", lambda self, record, block: opened.append(record.path) or plain(self, record, block)
    )
    run = made(tmp_path / "r", wide(), tile_rows=7)
    gradients = [path for path in opened if path.startswith("grad_z.zarr/")]
    assert len(gradients) == len(set(gradients)) == 4 * 8, "input and output gradient of two layers, in eight blocks"
    solutions = [path for path in opened if path.startswith("s_test.zarr/")]
    assert len(solutions) == len(run.by_layer()) * len(set(solutions))


def test_one_layer_has_all_of_it(tmp_path):
    run = made(tmp_path / "r", tasks.logistic())
    assert list(run.by_layer()) == [""], "the model itself"
    assert np.array_equal(run.by_layer()[""], run.scores())
    assert np.allclose(run.layer_shares().share, 1)
    assert "(model)" in str(run.layer_shares())
    frozen = made(tmp_path / "frozen", tasks.mlp(parameters=["5.*"]))
    assert list(frozen.by_layer()) == ["5"]
    assert np.array_equal(frozen.by_layer()["5"], frozen.scores())


def test_shares_of_a_linear_model_in_closed_form(tmp_path):
    """Two linear maps in parallel: gradients are residuals by inputs, so their parts are |x . x'| of each."""

    class Parallel(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(3, 1, bias=False)

        def forward(self, x):
            return self.left(x[:, :2]) + self.right(x[:, 2:])

    x, y = tasks.normal(14, 5), tasks.normal(14, 1, seed=4)
    train, test = tasks.split(x, y, n_train=10)
    model = tasks.built(Parallel, torch.float64)
    run = made(tmp_path / "r", tasks.Task(model=model, train=train, test=test, loss=tasks.squared_error))
    with torch.no_grad():
        residual = model(x) - y
        left, right = ((residual[10:] @ residual[:10].T) * (x[10:, at] @ x[:10, at].T) / -10
                       for at in (slice(0, 2), slice(2, 5)))  # fmt: skip
    total = left + right
    np.testing.assert_allclose(run.by_layer()["left"], left, rtol=1e-5, atol=1e-7)
    share = ((left * total).sum(1) / total.square().sum(1)).numpy()
    np.testing.assert_allclose(run.layer_shares().share, [share, 1 - share], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done but for the layers."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whole_stage, "TILE_COLUMNS", 4)
        return made(tmp_path_factory.mktemp("finished") / "r", wide(), by_layer=False).path


def layers_of(path):
    """The same, with the layers."""
    run = Run(path, wide(), by_layer=True, **QUIET)
    run.influence()
    return run


def same_files(run, calm):
    for name in ("influence_by_layer.npy", "by_layer.npz", "influence.npy"):
        assert (run.path / name).read_bytes() == (calm.path / name).read_bytes(), name
    assert not list(run.path.glob("*.tile"))
    assert not list(run.path.glob("*.partial.npy"))


@pytest.mark.parametrize("stop", [1, 25])
def test_a_killed_run_goes_on_with_the_same_bits(stop, calm, finished, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        before = steps_of(None, patched, stop)
        with pytest.raises(RuntimeError, match="stopped"):
            layers_of(tmp_path / "r")
    assert not (tmp_path / "r" / "influence_by_layer.npy").exists()
    with pytest.raises(IncompleteStore, match=r"not finished; run infl-cache influence --by-layer"):
        Run(tmp_path / "r").by_layer()
    after = steps_of(None, monkeypatch)
    again = Run(tmp_path / "r", wide(), **QUIET)
    again.influence()
    assert len(before) == stop
    assert not set(before) & set(after), "no step is done twice"
    same_files(again, calm)


def test_the_sums_of_a_job_are_kept_and_no_other_job_takes_them(calm, monkeypatch, tmp_path):
    monkeypatch.setattr(whole_stage, "TILE_COLUMNS", 30)
    Run(tmp_path / "r", wide(), **OPTIONS).all()
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    with monkeypatch.context() as patched:
        before = steps_of(None, patched, 11)
        with pytest.raises(RuntimeError, match="stopped"):
            made(tmp_path / "r", wide())
    header = read_header(tmp_path / "r" / "by_layer.tile")
    assert (header.facts["steps"], header.identity["layer"]) == (11 - 8, 1), "the second layer, of eight blocks three"
    after = steps_of(None, monkeypatch)
    run = made(tmp_path / "r", wide())
    assert not set(before) & set(after)
    for name, values in calm.by_layer().items():
        np.testing.assert_allclose(run.by_layer()[name], values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("where", ["commit 3", "_open_matrices", "_finish", "_write_shares"])
def test_a_kill_between_two_acts_leaves_what_can_be_finished(where, calm, finished, monkeypatch, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    plain, seen = RunFolder.commit, []

    def killed(*given, **more):
        raise RuntimeError("killed")

    def commit(self, name, *given, **more):
        seen.append(name)
        return killed() if seen.count("by_layer") == int(where[-1]) + 1 else plain(self, name, *given, **more)

    with monkeypatch.context() as patched:
        commits = where.startswith("commit")
        patched.setattr(*(RunFolder, "commit", commit) if commits else (stage, where, killed))
        with pytest.raises(RuntimeError, match="killed"):
            layers_of(tmp_path / "r")
    again = Run(tmp_path / "r", wide(), **QUIET)
    again.influence()
    same_files(again, calm)


def test_a_finished_run_does_nothing_again(calm, tmp_path):
    path = shutil.copytree(calm.path, tmp_path / "r")
    times = [(path / name).stat().st_mtime_ns for name in ("influence_by_layer.npy", "by_layer.npz")]
    result = Run(path, wide(), **QUIET).influence()
    assert [(each.stage, each.rows, each.computed) for each in result.beside] == [("by_layer", 14, 0)]
    assert times == [(path / name).stat().st_mtime_ns for name in ("influence_by_layer.npy", "by_layer.npz")]
    assert not Run(path, wide(), by_layer=False, **QUIET).influence().beside


def test_test_samples_that_come_later_are_added(monkeypatch, tmp_path):
    task, path = tasks.mlp(n_train=15, n_test=11), tmp_path / "r"
    first = made(path, task, test="1:6")
    check(first)
    values = np.load(path / "influence_by_layer.npy")
    assert np.flatnonzero(np.isnan(values).all((0, 2))).tolist() == [0, 6, 7, 8, 9, 10]
    assert np.isnan(first.layer_shares().share[:, [0, 6]]).all()
    records = RunFolder(path).records("by_layer")
    more = Run(path, task, test="8:", **QUIET)
    more.grads(), more.stest()
    with monkeypatch.context() as patched:
        patched.setattr(stage, "_open_matrices", None)
        with pytest.raises(TypeError):
            more.influence()
    for read in (more.by_layer, more.layer_shares, first.by_layer):
        with pytest.raises(IncompleteStore, match="not finished; run infl-cache influence --by-layer"):
            read()
    (added,) = more.influence().beside
    assert (added.rows, added.computed) == (3 * 8, 3 * 3)
    check(more)
    after = RunFolder(path).records("by_layer")
    assert {index: after[index] for index in records} == records
    assert np.array_equal(np.load(path / "influence_by_layer.npy")[:, 1:6], values[:, 1:6])

    without = Run(path, task, test="all", by_layer=False, **QUIET)
    without.all()
    for read in (without.by_layer, without.layer_shares, more.by_layer):
        with pytest.raises(IncompleteStore, match="not finished; run infl-cache influence --by-layer"):
            read()
    assert "test samples that were asked about since" in str(without.status())
    assert "Which layers" not in report(RunFolder(path))
    assert verify(RunFolder(path), show=False).faults == ()
    full = made(path, task)
    check(full)
    assert np.isfinite(np.load(path / "influence_by_layer.npy")).all()
    assert "asked about since" not in str(full.status())


def test_samples_that_are_skipped_are_nan_and_out_of_the_shares(tmp_path):
    task = tasks.mlp()
    task.test.tensors[0][2] = torch.inf
    task.train.tensors[0][5, 0] = torch.inf  # which the first layer's gradient alone multiplies
    run = made(tmp_path / "r", task, nonfinite="skip", curvature="fisher", solver="fisher")
    kept, rest = [0, 1, 3], [0, 1, 2, 3, 4, 6, 7, 8, 9]
    for values in run.by_layer().values():
        assert np.isnan(values[2]).all()
        assert np.isnan(values[:, 5]).all()
        assert np.isfinite(values[np.ix_(kept, rest)]).all()
    shares = run.layer_shares()
    assert np.isnan(shares.share[:, 2]).all()
    np.testing.assert_allclose(shares.share[:, kept].sum(0), 1, atol=1e-5)
    assert shares.share_of_all.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("place", [200, -3])
def test_a_damaged_file_is_noticed_named_and_made_anew_when_it_is_removed(place, calm, tmp_path):
    run = Run(shutil.copytree(calm.path, tmp_path / "r"), wide(), **QUIET)
    file = run.path / "influence_by_layer.npy"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    layer, rows = ("inner", "0 to 2") if place > 0 else ("outer", "6 to 6")
    words = rf"influence_by_layer\.npy: layer '{layer}', test rows {rows}, train columns .* remove that file and run"
    for read in (run.by_layer, Run(run.path).by_layer, Run(run.path, wide(), **QUIET).influence):
        with pytest.raises(DamagedStore, match=words):
            read()
    (fault,) = verify(RunFolder(run.path), show=False).faults
    assert f"layer '{layer}'" in str(fault)
    assert run.scores().shape == (7, 30), "the matrix is sound"
    file.unlink()
    (fault,) = verify(RunFolder(run.path), show=False).faults
    assert "found no file" in str(fault)
    assert Run(run.path, wide(), **QUIET).influence().beside[0].computed == 14
    same_files(run, calm)


def test_damaged_shares_are_noticed_and_made_anew(calm, tmp_path):
    run = Run(shutil.copytree(calm.path, tmp_path / "r"), wide(), **QUIET)
    file = run.path / "by_layer.npz"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedStore, match=r"by_layer\.npz"):
        run.layer_shares()
    assert "by_layer.npz" in str(verify(RunFolder(run.path), show=False))
    Run(run.path, wide(), **QUIET).influence()
    same_files(run, calm)


def test_the_file_needs_room_on_the_disk(calm, finished, monkeypatch, tmp_path):
    path, needed = shutil.copytree(finished, tmp_path / "r"), 4 * 2 * 7 * 30
    monkeypatch.setattr(room, "free_bytes", lambda path: needed - 1)
    with pytest.raises(
        DiskFull, match=r"by-layer: expected 1\.7 kB free for the influences of 2 layers.*--no-by-layer"
    ):
        layers_of(path)
    assert not list(path.glob("influence_by_layer*"))
    monkeypatch.setattr(room, "free_bytes", lambda path: needed)
    same_files(layers_of(path), calm)


def test_force_on_the_matrix_drops_the_layers(tmp_path):
    run = made(tmp_path / "r", tasks.mlp())
    Run(run.path, tasks.mlp(), by_layer=False, **QUIET).influence(force=True)
    assert not list(run.path.glob("*by_layer*"))
    assert run.folder.records("by_layer") == {}
    with pytest.raises(
        IncompleteStore, match=r"expected influences by layer, found none; run infl-cache influence --by"
    ):
        run.by_layer()
    check(made(run.path, tasks.mlp()))


def test_a_run_without_a_matrix_has_no_layers(tmp_path, capsys):
    words = "by-layer: expected a run that keeps its matrix, found --no-matrix; give --matrix or --no-by-layer"
    with pytest.raises(BadInput, match=words):
        Run(tmp_path / "r", tasks.mlp(), by_layer=True, matrix=False)
    (tmp_path / "t.py").write_text("from tests.tasks import mlp")
    common = ["influence", "--task", f"{tmp_path}/t.py:mlp", "--run", str(tmp_path / "r")]
    assert main([*common, "--by-layer", "--no-matrix"]) == 2
    assert capsys.readouterr().err == f"infl-cache: {words}\n"
    assert not (tmp_path / "r").exists()


def test_the_command_line_prints_the_table_and_report_and_status_know_it(calm, tmp_path, capsys):
    (tmp_path / "t.py").write_text("from tests.tasks import mlp")
    common = ["--task", f"{tmp_path}/t.py:mlp", "--run", str(tmp_path / "r"), "--no-progress"]
    assert main(["run", *common, "--solver", "identity", "--by-layer"]) == 0
    out = capsys.readouterr().out
    assert out.count("Which layers carry the effect") == 1
    assert out.index("by-layer   12 of 12 rows computed") < out.index("test sample") < out.index("Which layers")
    assert main(["influence", *common]) == 0
    out = capsys.readouterr().out
    table = str(Run(tmp_path / "r").layer_shares())
    assert "by-layer   nothing left to do" in out
    assert out.endswith(f"\n\n{table}\n")
    assert table in report(RunFolder(tmp_path / "r"))
    text = str(Run(tmp_path / "r").status())
    assert "by-layer   3 of 3 tiles (done)" in text
    assert "layers: 3" in text


def test_the_table_has_the_largest_shares_first_and_twenty_rows():
    share = np.arange(25.0)[:, None] / 300 * np.array([0.5, 1.5, np.nan])
    names = ("", *(f"block.{layer}" for layer in range(1, 25)))
    lines = str(LayerShares(names, np.full(25, 1234), share, np.arange(25) / 300)).splitlines()
    assert lines[2].split() == ["layer", "parameters", "share", "lowest", "highest"]
    assert lines[3].split() == ["block.24", "1,234", "8.0%", "4.0%", "12.0%"]
    assert [line.split()[0] for line in lines[3:-1]] == [f"block.{layer}" for layer in range(24, 4, -1)]
    assert lines[-1] == "... and 5 more"
    none = LayerShares(("",), np.array([3]), np.full((1, 2), np.nan), np.array([np.nan]))
    assert str(none).splitlines()[3].split() == ["(model)", "3", "-", "-", "-"]


def test_the_sums_of_a_tile_that_is_a_fact_do_not_stay(tmp_path, finished, monkeypatch):
    """Killed between the ledger and the removal of the last tile's sums."""
    shutil.copytree(finished, tmp_path / "r")
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    plain = contraction.Sums.forget

    def stopping(self):
        if not [each for each in RunFolder(tmp_path / "r").stage_blocks("by_layer") if each.index not in recorded()]:
            raise RuntimeError("stopped")
        plain(self)

    def recorded():
        return RunFolder(tmp_path / "r").records("by_layer")

    with monkeypatch.context() as patched:
        patched.setattr(contraction.Sums, "forget", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            layers_of(tmp_path / "r")
    assert list((tmp_path / "r").glob("*.tile"))
    layers_of(tmp_path / "r")
    assert not list((tmp_path / "r").glob("*.tile"))
