"""Damage to a finished run: `verify` names it, stages refuse it, `--repair` makes exactly that again, byte for byte."""

import json
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, DamagedStore, ForeignRun, IncompleteStore
from infl_cache.stages import repair as module
from tests import tasks
from tests.faults import times
from tests.faults.damaging import (
    OPTIONS,
    QUIET,
    Commits,
    contents,
    damaged,
    edited,
    made,
    repair_slowly,
    task,
    try_damages,
)
from tests.faults.killing import killed, started, wait_for_lines

CHUNK = "grad_z.zarr/0/input/c.1.0.0"
OTHER = "s_test.zarr/s_test/c.1.0"
WAYS = [0, 1, "half", -1, "flip 3", "flip -1", "flip -5", "gone", "folder"]
TASK = "from tests.faults.damaging import task\n\ndef small():\n    return task()\n"


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A finished run with everything in it."""
    run = made(tmp_path_factory.mktemp("calm") / "r", by_layer=True)
    run.self_influence()
    return run


@pytest.fixture
def run(calm, tmp_path):
    """A copy of it to be damaged."""
    return Run(shutil.copytree(calm.path, tmp_path / "r"), task(), by_layer=True, **OPTIONS)


@contextmanager
def refused(run, match):
    """What is done inside stops with exit code 4; `run.yaml`, which says where a run is, is as it was."""
    kept = (run.path / "run.yaml").read_bytes()
    with pytest.raises((DamagedStore, IncompleteStore), match=match) as stopped:
        yield
    assert stopped.value.exit_code == 4
    (run.path / "run.yaml").write_bytes(kept)


def repaired_as_it_was(run, calm, commits):
    """Repair a run; it is sound and byte for byte as it was. What was committed on the way."""
    assert run.verify(repair=True).faults == ()
    assert contents(run.path) == contents(calm.path)
    for stage in calm.folder.manifest.stages:
        was, now = calm.folder.records(stage), RunFolder(run.path).records(stage)
        assert {index: record.files for index, record in now.items()} == {i: each.files for i, each in was.items()}
    return commits.found


@pytest.mark.parametrize("how", [*WAYS, "swap c.0.0.0"])
def test_a_damaged_chunk_is_named_refused_and_made_again_alone(how, run, calm, monkeypatch):
    damaged(run.path / CHUNK, how)
    (fault,) = run.verify().faults
    assert (fault.stage, fault.block, fault.file, fault.rows) == ("grads", 1, CHUNK, "rows 8 to 15")
    assert str(fault).startswith(f"{CHUNK} (rows 8 to 15): expected ")
    if how not in ("flip 3", "flip -5"):  # what the last bytes tell, which are all that is read before a block is used
        with refused(run, match=r"rows 8 to 15\).*infl-cache verify .* --repair"):
            run.grads()
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == [("grads", 1)]


@pytest.mark.parametrize(
    ("name", "stage", "block"),
    [
        (OTHER, "stest", 1),
        ("grad_z.zarr/digest/c.2", "grads", 2),
        ("self_influence.zarr/residual/c.0", "self_influence", 0),
    ],
)
def test_in_each_store(name, stage, block, run, calm, monkeypatch):
    damaged(run.path / name, "flip -6")
    (fault,) = run.verify().faults
    assert (fault.stage, fault.block, fault.file) == (stage, block, name)
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == [(stage, block)]


def test_several_at_once_and_a_store_that_is_gone(run, calm, monkeypatch):
    damaged(run.path / CHUNK, "gone")
    damaged(run.path / "grad_z.zarr/loss/c.0", "half")
    shutil.rmtree(run.path / "s_test.zarr")
    faults = run.verify().faults
    assert {fault.stage for fault in faults} == {"grads", "stest"}
    assert len(faults) == 2 + sum(name.startswith("s_test.zarr/") for name in contents(calm.path))
    found = repaired_as_it_was(run, calm, Commits(monkeypatch))
    assert sorted(found) == [("grads", 0), ("grads", 1), ("stest", 0), ("stest", 1)]


@pytest.mark.parametrize("edit", [("data_type", "float32"), ("shape", [20, 7]), ("codecs", []), None, "folder"])
@pytest.mark.parametrize("name", ["grad_z.zarr/0/input/zarr.json", "s_test.zarr/zarr.json"])
def test_metadata_that_were_changed_are_written_again(name, edit, run, calm, monkeypatch):
    file = run.path / name
    if isinstance(edit, tuple):
        file.write_text(json.dumps({**json.loads(file.read_text()), edit[0]: edit[1]}))
    else:
        damaged(file, edit or "gone")
    (fault,) = run.verify().faults
    assert (fault.file, fault.block) == (name, None)
    with refused(run, match=r"zarr\.json"):
        run.influence(force=True) if name.startswith("s_test") else run.grads()
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == []


def test_metadata_of_a_store_that_has_grown(tmp_path):
    made(tmp_path / "calm", test="0:2")
    calm = made(tmp_path / "calm", test="all")
    run = Run(shutil.copytree(calm.path, tmp_path / "r"), task(), **QUIET)
    for name in ("zarr.json", "s_test/zarr.json", "loss/zarr.json"):
        damaged(run.path / "s_test.zarr" / name, "gone")
    assert len(run.verify().faults) == 3
    assert run.verify(repair=True).faults == ()
    assert contents(run.path) == contents(calm.path)


def test_metadata_that_cannot_be_made_as_they_were_are_said(run, monkeypatch, caplog):
    damaged(run.path / "grad_z.zarr/zarr.json", "gone")
    monkeypatch.setattr("infl_cache.disk.growth.metadata_contents", lambda layouts, codec: {"zarr.json": b"{}"})
    before = contents(run.path)
    assert [fault.file for fault in run.verify(repair=True).faults] == ["grad_z.zarr/zarr.json"]
    assert "cannot be repaired" in caplog.text
    assert contents(run.path) == before


@pytest.mark.parametrize("column", ["size", "crc"])
def test_an_edited_record_of_a_chunk(column, run, calm, monkeypatch):
    edited(run.path, f"UPDATE files SET {column} = {column} + 1 WHERE path = ?", CHUNK)
    (fault,) = run.verify().faults
    assert (fault.block, fault.file) == (1, CHUNK)
    with refused(run, match="rows 8 to 15"):
        run.grads()
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == [("grads", 1)]


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "grad_z.zarr/0/input/c.0.0.0", None])
def test_a_record_of_another_file_is_no_record(path, run, calm, monkeypatch):
    if path is None:
        edited(run.path, "DELETE FROM files WHERE path = ?", CHUNK)
    else:
        edited(run.path, "UPDATE files SET path = ? WHERE path = ?", path, CHUNK)
    faults = run.verify().faults
    assert {fault.block for fault in faults} == {1}
    assert CHUNK in {fault.file for fault in faults}
    assert set(repaired_as_it_was(run, calm, Commits(monkeypatch))) == {("grads", 1)}


@pytest.mark.parametrize(("name", "stage"), [("influence.npy", "influence"), ("influence_by_layer.npy", "by_layer")])
def test_all_damaged_tiles_are_named_and_made_again_alone(name, stage, run, calm, monkeypatch):
    last = 4 * np.load(run.path / name, mmap_mode="r").shape[-1]
    damaged(run.path / name, "flip 130")
    damaged(run.path / name, f"flip {-last}")
    first, second = run.verify().faults
    assert first.file == second.file == name
    assert "test rows 0 to 2, train columns 0 to" in first.rows
    assert "test rows 3 to 4" in second.rows
    with refused(run, match=r"test rows 0 to 2.* not what was committed; .* --repair"):
        run.influence() if stage == "influence" else run.by_layer()
    found = repaired_as_it_was(run, calm, Commits(monkeypatch))
    assert sorted(found) == sorted((stage, fault.block) for fault in (first, second))


@pytest.mark.parametrize("how", [0, 1, "half", -1, "flip 1", "flip 12", "flip 62", "gone"])
@pytest.mark.parametrize("name", ["influence.npy", "influence_by_layer.npy"])
def test_a_matrix_that_is_cut_or_has_no_head_is_made_again_whole(name, how, run, calm, monkeypatch):
    damaged(run.path / name, how)
    (fault,) = run.verify().faults
    assert (fault.file, fault.block) == (name, None)
    with refused(run, name):
        run.scores() if name == "influence.npy" else run.by_layer()
    found = repaired_as_it_was(run, calm, Commits(monkeypatch))
    assert sorted(found) == [(fault.stage, block) for block in sorted(calm.folder.records(fault.stage))]


@pytest.mark.parametrize("how", [0, -1, "flip 80", "gone", "folder"])
@pytest.mark.parametrize("name", ["rankings.npz", "by_layer.npz", "self_influence.npz"])
def test_a_single_file_is_made_again_of_what_is_there(name, how, run, calm, monkeypatch):
    damaged(run.path / name, how)
    (fault,) = run.verify().faults
    assert fault.file == name
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == [(fault.stage, 0)]


@pytest.mark.parametrize(("names", "again"), [(["rankings.npz"], 0), (["influence.state"], 2),
                                              (["influence.state", "rankings.npz"], 2)])  # fmt: skip
def test_without_a_matrix_of_what_the_rankings_are_made_of(names, again, tmp_path, monkeypatch):
    calm = made(tmp_path / "calm", matrix=False)
    run = Run(shutil.copytree(calm.path, tmp_path / "r"), task(), **QUIET)
    for name in names:
        damaged(run.path / name, "flip -9")
    assert [fault.file for fault in run.verify().faults] == names
    found = repaired_as_it_was(run, calm, Commits(monkeypatch))
    tiles = len(calm.folder.records("influence")) if again else 0
    assert tiles == again
    assert sorted(found) == sorted([("influence", index) for index in range(tiles)]
                                   + [("rankings", 0)] * ("rankings.npz" in names))  # fmt: skip


def test_rankings_are_never_made_of_sums_that_are_of_another_length(tmp_path):
    calm = made(tmp_path / "calm", matrix=False)
    damaged(calm.path / "rankings.npz", "half")
    run = Run(calm.path, task(), top_k=3, **OPTIONS)
    assert run.verify(repair=True).faults == ()
    expected = made(tmp_path / "other", matrix=False)
    assert run.helpful(0, k=3).ids.tolist() == expected.helpful(0, k=3).ids.tolist()


@pytest.mark.parametrize("stage", ["rankings", "layer_shares", "self_ranking"])
def test_a_repair_that_was_stopped_before_its_last_file(stage, run, calm, monkeypatch):
    folder = RunFolder(run.path)
    folder.configuration = yaml.safe_load((run.path / "run.yaml").read_text())
    with folder.writing():
        folder.drop([stage])
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == [(stage, 0)]


def test_an_unfinished_stage_is_not_carried_on(tmp_path, monkeypatch):
    calm = made(tmp_path / "calm")
    run = Run(shutil.copytree(calm.path, tmp_path / "r"), task(), **QUIET)
    edited(run.path, "DELETE FROM blocks WHERE stage = 'grads' AND block = 2")
    edited(run.path, "DELETE FROM blocks WHERE stage = 'stest' AND block = 0")
    damaged(run.path / CHUNK, "half")
    damaged(run.path / OTHER, "half")
    commits = Commits(monkeypatch)
    assert run.verify(repair=True).faults == ()
    assert commits.found == [("grads", 1), ("stest", 1)]
    assert sorted(RunFolder(run.path).records("grads")) == [0, 1]


def test_a_repair_that_was_killed_is_carried_on(run, calm, monkeypatch):
    damaged(run.path / CHUNK, "half")
    damaged(run.path / OTHER, "gone")
    damaged(run.path / "influence.npy", -1)
    for stage in ("grads", "stest", "influence"):
        with monkeypatch.context() as patched:
            patched.setattr("infl_cache.disk.run.RunFolder.commit", power_cut)
            with pytest.raises(RuntimeError, match="the lights went out"):
                run.verify(repair=True)
        assert stage in {fault.stage for fault in run.verify().faults if "to be made again" in str(fault)}
        with monkeypatch.context() as patched:
            patched.setattr(module, "ORDER", (stage,))
            run.verify(repair=True)
    assert repaired_as_it_was(run, calm, Commits(monkeypatch)) == []


def test_a_repair_that_is_killed_at_any_step_is_carried_on(calm, tmp_path):
    """Of the two claims and four commits of this repair, before and after each."""
    stopped = 0
    for lines in range(1, 12, times(6, 1)):
        run = Run(shutil.copytree(calm.path, tmp_path / str(lines)), task(), by_layer=True, **OPTIONS)
        for name, how in ((CHUNK, "half"), ("grad_z.zarr/loss/c.0", "gone"), ("influence.npy", "flip 130"),
                          ("influence.npy", "flip -4")):  # fmt: skip
            damaged(run.path / name, how)
        log = tmp_path / f"log{lines}"
        child = started(repair_slowly, run.path, log)
        wait_for_lines(child, log, lines)
        stopped += killed(child)
        assert run.verify(repair=True).faults == ()
        assert contents(run.path) == contents(calm.path)
    assert stopped > 1


def power_cut(*arguments, **named):
    raise RuntimeError("the lights went out")


def test_another_task_or_other_options_touch_nothing(run):
    damaged(run.path / CHUNK, "half")
    damaged(run.path / OTHER, "half")
    before = contents(run.path)
    for other, words in ((Run(run.path, tasks.mlp(n_train=21, n_test=5), **QUIET), "n_train"),
                         (Run(run.path, None, **QUIET), "task")):  # fmt: skip
        with pytest.raises((ForeignRun, BadInput), match=words):
            other.verify(repair=True)
        assert contents(run.path) == before
    with pytest.raises(ForeignRun, match=r"damping: expected 0\.1, found 0\.2"):
        Run(run.path, task(), damping=0.2, **QUIET).verify(repair=True)
    assert [fault.file for fault in run.verify().faults] == [OTHER]


def test_a_ledger_that_is_gone_is_named_and_not_made_up(run):
    (run.path / "ledger.sqlite").unlink()
    (fault,) = run.verify().faults
    assert fault.file == "ledger.sqlite"
    with pytest.raises(DamagedStore, match=r"ledger.sqlite: expected .* found no file"):
        run.verify(repair=True)


def test_a_sample_finds_damage_in_proportion_and_sizes_always(run, calm):
    names = sorted(name for name in contents(run.path) if "/c." in name)
    assert run.verify(sample=0.05).faults == ()
    verdict = run.verify(sample=0.25)
    assert 0 < verdict.read_files < verdict.files
    assert 0 < verdict.read_bytes < verdict.n_bytes
    assert len({run.verify(sample=0.25).seed for _ in range(3)}) > 1, "drawn anew"
    damaged(run.path / CHUNK, "flip 3")
    found = [bool(run.verify(sample=0.5).faults) for _ in range(30)]
    assert 3 < sum(found) < 27
    damaged(run.path / names[-1], -1)
    assert all(names[-1] in str(run.verify(sample=0.01)) for _ in range(3))


def test_damage_is_refused_and_never_crashes_the_interpreter(calm, tmp_path):
    generator = random.Random(4)
    size = (calm.path / CHUNK).stat().st_size
    cuts = [generator.randrange(size) for _ in range(times(2, 200))]
    flips = [f"flip {generator.randrange(size)}" for _ in range(times(4, 200))]
    child = started(try_damages, calm.path, tmp_path, CHUNK, [*cuts, *flips, *WAYS])
    child.join(times(60, 600))
    assert child.exitcode == 0


def test_on_the_command_line(run, calm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    assert main(["verify", "r", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []
    assert main(["verify", "r", "--sample", "50%"]) == 0
    assert "seed" in capsys.readouterr().out
    damaged(Path("r") / CHUNK, "half")
    assert main(["verify", "r", "--json", "report.json"]) == 4
    assert f"{CHUNK} (rows 8 to 15)" in (said := capsys.readouterr().err)
    assert "infl-cache verify r --repair" in said
    report = json.loads(Path("report.json").read_text())
    assert report["faults"][0]["rows"] == "rows 8 to 15"
    assert report["files"] == report["read_files"] > 50
    before = contents(Path("r"))
    assert main(["verify", "r", "--repair"]) == 2, "it was made in Python: run.yaml names no task"
    for wrong in (["--sample", "0"], ["--sample", "lots"], ["--json", "."], ["--json", "no/such/file"]):
        assert main(["verify", "r", *wrong]) == 2
    assert contents(Path("r")) == before
    capsys.readouterr()
    assert main(["verify", "r", "--repair", "--task", "task.py:small"]) == 0
    assert "everything is as it was committed" in capsys.readouterr().out
    assert contents(Path("r")) == contents(calm.path)
