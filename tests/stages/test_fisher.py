"""Stage 2 by `fisher` through a run folder: dense numbers, tiles on the disk, kills, damage, refusals."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infl_cache import BadInput, DamagedStore, ForeignRun, IncompleteStore, Run
from infl_cache.disk.tiles import FOLDER, TileFolder
from infl_cache.errors import DiskFull
from infl_cache.maths import tiled
from infl_cache.maths.solvers.fisher import Fisher
from infl_cache.stages import fisher as stage
from tests import tasks
from tests.faults.killing import killed, note, started, wait_for_lines
from tests.tasks import TASKS
from tests.twins import gradient_rows

QUIET = {"progress": False}


def dense_s_test(task, damping, rows=None):
    """Of plain autograd's gradients, in float64."""
    grads = gradient_rows(task, range(len(task.train)) if rows is None else rows).double()
    shift = damping + task.weight_decay
    matrix = grads.T @ grads / len(grads) + shift * torch.eye(grads.shape[1], dtype=torch.float64)
    right = gradient_rows(task, range(len(task.test)), data="test", measure=True).double()
    return torch.linalg.solve(matrix, right.T).T.numpy()


def worst_row(found, expected):
    return (np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max()


def made(path, task, **options):
    run = Run(path, task, **{"solver": "fisher", "damping": 0.05, **QUIET, **options})
    run.grads()
    run.stest()
    return run


@pytest.mark.parametrize("form", ["auto", "dense"])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_equals_a_dense_solve(name, form, tmp_path):
    task = TASKS[name](weight_decay=0.01)
    run = made(tmp_path / "r", task, form=form, block_rows=4)
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05)) <= 1e-9


@pytest.mark.parametrize("layer_forms", ["*=factored", "*=dense"])
@pytest.mark.parametrize("name", ["tied", "tokens", "twice", "mlp"])
def test_equals_a_dense_solve_in_forms_that_were_asked_for(name, layer_forms, tmp_path):
    task = TASKS[name](n_train=20)
    run = made(tmp_path / "r", task, layer_forms=layer_forms, block_rows=8)
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05)) <= 1e-9


@pytest.mark.parametrize("name", ["mlp", "tokens", "convnet", "tied"])
def test_equals_a_dense_solve_with_a_float32_model(name, tmp_path):
    task = TASKS[name](torch.float32, n_train=30)
    run = made(tmp_path / "r", task, block_rows=8)
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05)) <= 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_are_solved_with_as_they_are_stored(dtype, tmp_path):
    task = tasks.mlp(torch.float32, n_train=30)
    run = made(tmp_path / "r", task, dtype=dtype)
    grads = torch.from_numpy(run.grad_z(slice(None))).double()
    matrix = grads.T @ grads / 30 + 0.05 * torch.eye(grads.shape[1], dtype=torch.float64)
    right = gradient_rows(task, range(4), data="test").double()
    assert worst_row(run.s_test(slice(None)), torch.linalg.solve(matrix, right.T).T.numpy()) <= 1e-5


class Wide(torch.nn.Module):
    """Some 5,000 parameters, of which a layer is worth factoring."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(60, 60), torch.nn.Linear(60, 20)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def wide_task(dtype=torch.float64, n_train=90):
    model = tasks.built(Wide, dtype)
    return tasks.classified(model, tasks.normal(n_train + 4, 60, dtype=dtype), n_train, 20)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("damping", [1e-4, 1e-2])
def test_equals_a_dense_solve_of_five_thousand_parameters(dtype, bound, damping, tmp_path):
    task = wide_task(dtype)
    run = made(tmp_path / "r", task, damping=damping)
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, damping)) <= bound


@pytest.fixture
def on_disk(monkeypatch):
    """Small tiles and panels, kept on the disk."""
    monkeypatch.setattr(stage, "replace", small_and_kept)


def small_and_kept(solver, **changes):
    return Fisher(solver.tolerance, 1, side=8, panel=16, **changes)


def test_the_disk_gives_the_bits_that_memory_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "replace", lambda solver, **_: Fisher(side=8, panel=16))
    memory = made(tmp_path / "memory", tasks.mlp(n_train=40))
    assert not (tmp_path / "memory" / FOLDER).exists()
    monkeypatch.setattr(stage, "replace", small_and_kept)
    disk = made(tmp_path / "disk", tasks.mlp(n_train=40))
    assert np.array_equal(memory.s_test(slice(None)), disk.s_test(slice(None)))
    assert "Gram matrix" in str(disk.status())
    assert "Gram matrix" not in str(memory.status())
    assert disk.status().stages[1].complete
    names = {path.name for path in (tmp_path / "disk" / FOLDER).rglob("*.tile")}
    assert names == {f"factor-{i}-{j}.tile" for i in range(5) for j in range(i + 1)}
    disk.influence()


def test_memory_does_not_change_the_numbers(tmp_path):
    task = wide_task()
    found = [made(tmp_path / str(m), task, memory=m).s_test(slice(None)) for m in ("1MB", "10MB", "1GB")]
    assert worst_row(found[0], found[2]) <= 1e-12
    assert worst_row(found[1], found[2]) <= 1e-12


@pytest.mark.usefixtures("on_disk")
def test_tiles_serve_again_until_something_they_hang_on_changes(tmp_path, monkeypatch):
    puts = []
    real = TileFolder.put
    monkeypatch.setattr(TileFolder, "put", lambda self, *each: puts.append(each[:3]) or real(self, *each))
    path, task = tmp_path / "r", tasks.mlp(n_train=40)
    run = made(path, task, test_block_rows=2)
    first = run.s_test(slice(None))
    assert len(puts) == 30
    # As after a kill: nothing of s_test was committed, the tiles are whole.
    with run.folder.writing():
        run.folder._writable.clear("stest")
    puts.clear()
    run.stest()
    assert puts == []
    assert np.array_equal(run.s_test(slice(None)), first)
    again = Run(path, task, solver="fisher", damping=0.1, **QUIET)
    again.stest(force=True)
    assert len(puts) == 30
    assert len(list((path / FOLDER).iterdir())) == 1
    Run(path, task, solver="cg", damping=0.1, **QUIET).stest(force=True)
    assert not (path / FOLDER).exists()


@pytest.mark.usefixtures("on_disk")
def test_another_memory_goes_on_with_the_tiles_that_are_there(tmp_path, monkeypatch):
    path, task = tmp_path / "r", tasks.mlp(n_train=40)
    run = made(path, task)
    first = run.s_test(slice(None))
    with run.folder.writing():
        run.folder._writable.clear("stest")
    monkeypatch.setattr(stage, "replace", lambda solver, **changes: Fisher(memory=1, side=5, panel=10, **changes))
    monkeypatch.setattr(TileFolder, "put", None)
    Run(path, task, **QUIET).stest()
    assert np.array_equal(run.s_test(slice(None)), first)


@pytest.mark.usefixtures("on_disk")
def test_another_store_of_gradients_is_another_system(tmp_path):
    path, task = tmp_path / "r", tasks.mlp(torch.float32)
    made(path, task)
    Run(path, task, dtype="float16", **QUIET).grads(force=True)
    with pytest.raises(ForeignRun, match="grads"):
        Run(path, task, dtype="float16", **QUIET).stest()


def killable(path, log):
    """A whole stage 2 that writes down every tile before it is put."""
    torch.set_num_threads(1)
    stage.replace = small_and_kept
    real = TileFolder.put

    def put(self, kind, i, j, values):
        note(log, f"{kind} {i} {j}")
        real(self, kind, i, j, values)

    TileFolder.put = put
    Run(path, tasks.mlp(n_train=64), solver="fisher", damping=0.05, **QUIET).stest()


def test_sigkills_lose_a_tile_at_most_and_change_nothing(tmp_path):
    path, calm, log = tmp_path / "killed", tmp_path / "calm", tmp_path / "log"
    for each in (path, calm):
        Run(each, tasks.mlp(n_train=64), **QUIET).grads()
    kills, tiles, in_flight = 0, 8 * 9, 0
    written: list[str] = []
    finished = False
    while not finished:
        log.unlink(missing_ok=True)
        child = started(killable, path, log)
        wait_for_lines(child, log, 5 + 7 * kills)
        finished = not killed(child)
        kills += not finished
        new = log.read_text().splitlines() if log.exists() else []
        assert len(new) == len(set(new))
        repeated = set(written) & set(new)
        assert repeated <= set(written[-1:]), "more than the tile in flight was computed again"
        in_flight += len(repeated)
        written += new
    assert kills >= 3
    assert len(written) == tiles + in_flight
    gone = [place for place, each in enumerate(written) if each.startswith("gram")]
    assert gone[-1] < min(place for place, each in enumerate(written) if each.startswith("factor"))
    killable(calm, tmp_path / "calm.log")
    assert np.array_equal(Run(path, **QUIET).s_test(slice(None)), Run(calm, **QUIET).s_test(slice(None)))
    assert not list((path / FOLDER).rglob("*.partial"))


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("damage", ["flip", "cut", "swap", "empty"])
def test_a_damaged_tile_is_noticed(damage, tmp_path):
    path, task = tmp_path / "r", tasks.mlp(n_train=40)
    run = made(path, task)
    with run.folder.writing():
        run.folder._writable.clear("stest")
    (tile,) = (path / FOLDER).rglob("factor-3-1.tile")
    data = bytearray(tile.read_bytes())
    if damage == "flip":
        data[100] ^= 1
    other = tile.with_name("factor-2-1.tile").read_bytes()
    tile.write_bytes({"flip": data, "cut": data[:-8], "swap": other, "empty": b""}[damage])
    with pytest.raises(DamagedStore, match=r"factor-3-1\.tile: expected the tile .*remove"):
        run.stest()
    tile.unlink()  # what is missing is computed again, it alone
    run.stest()
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05)) <= 1e-9


@pytest.mark.usefixtures("on_disk")
def test_a_disk_without_room_is_said_beforehand(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=7_000)
    monkeypatch.setattr("infl_cache.disk.tiles.shutil", SimpleNamespace(disk_usage=lambda path: usage))
    with pytest.raises(DiskFull, match=r"room for 7,680 bytes of the Gram matrix, found 7,000 free"):
        made(tmp_path / "r", tasks.mlp(n_train=40))
    assert not list((tmp_path / "r" / FOLDER).rglob("*.tile"))


def test_without_damping_it_is_refused_before_anything_is_written(tmp_path):
    run = Run(tmp_path / "r", tasks.mlp(), solver="fisher", damping=0.0, **QUIET)
    run.grads()
    with pytest.raises(BadInput, match=r"(?s)found 0;.*--damping"):
        run.stest()
    assert not (tmp_path / "r" / "s_test.zarr").exists()
    made(tmp_path / "decaying", tasks.mlp(weight_decay=0.1), damping=0.0)


def test_damping_auto_is_looked_for(tmp_path):
    task = tasks.mlp(n_train=30)
    run = made(tmp_path / "r", task, damping="auto")
    damping = run.folder.plan("stest")["damping"]
    assert damping > 0
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, damping)) <= 1e-9


def test_a_given_damping_needs_no_spectrum(tmp_path):
    assert "spectrum" not in made(tmp_path / "r", tasks.mlp()).folder.plan("stest")


def test_it_wants_the_gradients_first(tmp_path):
    with pytest.raises(IncompleteStore, match="infl-cache grads"):
        Run(tmp_path / "r", tasks.mlp(), solver="fisher", **QUIET).stest()


def test_a_subsample_is_the_mean_over_it(tmp_path):
    task = tasks.mlp(n_train=30)
    run = made(tmp_path / "r", task, curvature_samples=12, block_rows=8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(42))
    rows = sorted(order[:12].tolist())
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05, rows)) <= 1e-9


@pytest.mark.parametrize("name", ["mlp", "tokens", "convnet"])
def test_gradients_that_are_not_kept_are_computed_again(name, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "replace", lambda solver, **_: Fisher(side=8, panel=8))
    task = TASKS[name](n_train=20)
    run = made(tmp_path / "r", task, cache=False, block_rows=8)
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05)) <= 1e-9


def test_samples_without_a_finite_gradient_are_skipped(tmp_path):
    x, y = tasks.normal(24, 5), tasks.normal(24, 2, seed=3)
    x[6], y[6] = 0, 0

    def root_loss(outputs, targets):
        return (outputs - targets).square().sum(1).sqrt()

    model = tasks.built(lambda: torch.nn.Linear(5, 2, bias=False), torch.float64)
    train, test = tasks.split(x, y, n_train=20)
    task = tasks.Task(model=model, train=train, test=test, loss=root_loss)
    run = made(tmp_path / "r", task, nonfinite="skip", block_rows=8)
    rows = [row for row in range(20) if row != 6]
    assert worst_row(run.s_test(slice(None)), dense_s_test(task, 0.05, rows)) <= 1e-9


def test_two_kinds_of_tiles_are_told_apart():
    assert stage.KINDS == ("gram", "factor")
    assert set(tiled.Kind.__args__) == set(stage.KINDS)


def test_tiles_belong_to_gradients_samples_shift_and_arithmetic(tmp_path, monkeypatch):
    """Also where no --force has removed the folder, as when nothing of s_test had been committed."""
    monkeypatch.setattr(stage, "_keeper", lambda run, identity: identity)

    class Folder:
        store = "one"

        def fingerprint(self, stage):
            return f"{stage} {self.store}"

    def identity(rows=(0, 1), shift=0.1, store="one", dtype=torch.float64):
        monkeypatch.setattr(Folder, "store", store)
        monkeypatch.setattr(stage, "solve_dtype", lambda run: dtype)
        options = type("Options", (), {"resources": type("Resources", (), {"progress": False})})
        run = type("Run", (), {"folder": Folder(), "options": options})
        return stage.with_tiles(run, Fisher(), rows, shift).keep

    found = [identity(), identity((0, 2)), identity(shift=0.2), identity(store="two"), identity(dtype=torch.float32)]
    assert len(set(found)) == 5
    assert identity() == found[0]
