"""The run folder: the order in which a block becomes a fact, and everything that must never happen to it."""

import errno
import json
import os
import random
import shutil
import time

import numpy as np
import pytest

from infl_cache.config import Options, read_config_file
from infl_cache.disk.layout import ArrayLayout, Block, chunk_keys
from infl_cache.disk.ledger import FileRecord, Ledger, array_bytes
from infl_cache.disk.run import CHILDREN, RunFolder
from infl_cache.disk.store import METADATA
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import BadInput, DamagedStore, DiskFull, ForeignRun, IncompleteStore, Locked


@pytest.fixture
def folder(tmp_path, sample):
    """A run folder with all three blocks of the stage grads."""
    return sample.make(tmp_path / "run")


# --- the order of a commit


@pytest.fixture
def events(monkeypatch):
    """What reached the disk, in order: fsync (inode, content, which is None for a folder), replace and commit."""
    seen = []
    fsync, replace, commit = os.fsync, os.replace, Ledger.commit

    def spied_fsync(descriptor):
        content = None
        if not os.path.isdir(f"/dev/fd/{descriptor}"):
            with open(f"/dev/fd/{descriptor}", "rb") as file:
                content = file.read()
        seen.append(("fsync", os.fstat(descriptor).st_ino, content))
        fsync(descriptor)

    def spied_replace(source, target):
        seen.append(("replace", os.fspath(target)))
        replace(source, target)

    def spied_commit(self, record):
        seen.append(("commit", record.index))
        commit(self, record)

    monkeypatch.setattr(os, "fsync", spied_fsync)
    monkeypatch.setattr(os, "replace", spied_replace)
    monkeypatch.setattr(Ledger, "commit", spied_commit)
    return seen


def test_a_block_is_written_then_synced_then_its_folders_are_then_it_is_committed(tmp_path, sample, events):
    folder = RunFolder(tmp_path / "run")
    with folder.writing():
        sample.begin(folder)
        for block in sample.blocks:
            events.clear()
            sample.commit(folder, block)
            committed = events.index(("commit", block.index))
            for layout in sample.layouts:
                files = [folder.path / "grad_z.zarr" / layout.path / key for key in chunk_keys(layout, block)]
                synced = [events.index(("fsync", file.stat().st_ino, file.read_bytes())) for file in files]
                named = events.index(("fsync", files[0].parent.stat().st_ino, None))
                assert max(synced) < named < committed


def test_the_store_and_its_names_are_on_the_disk_before_the_manifest_speaks_of_them(tmp_path, sample, events):
    folder = RunFolder(tmp_path / "run")
    with folder.writing():
        events.clear()
        sample.begin(folder)
    store = folder.path / "grad_z.zarr"
    spoken = events.index(("replace", str(folder.path / "manifest.json")))
    for file in store.rglob(METADATA):
        assert events.index(("fsync", file.stat().st_ino, file.read_bytes())) < spoken
    for made in [folder.path, store, *(path for path in store.rglob("*") if path.is_dir())]:
        assert events.index(("fsync", made.stat().st_ino, None)) < spoken


def test_the_name_of_a_new_run_folder_is_on_the_disk_before_its_first_block(tmp_path, sample, events):
    folder = RunFolder(tmp_path / "runs" / "first")
    with folder.writing():
        sample.begin(folder)
        sample.commit(folder, sample.blocks[0])
    synced = [inode for kind, inode, *content in events[: events.index(("commit", 0))] if kind == "fsync"]
    assert (tmp_path / "runs").stat().st_ino in synced
    assert tmp_path.stat().st_ino in synced


def test_a_block_whose_files_could_not_be_synced_is_not_committed(tmp_path, sample, monkeypatch):
    folder = sample.make(tmp_path / "run", n_blocks=1)

    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    with folder.writing(), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            sample.commit(folder, sample.blocks[1])
    sample.assert_intact(folder, 0)


# --- opening, resuming


def test_a_finished_run_opens_again_with_all_it_holds(folder, sample):
    again = RunFolder(folder.path)
    sample.assert_intact(again, 0, 1, 2)
    assert again.array_layouts("grads") == sample.layouts
    assert again.stage_blocks("grads") == sample.blocks
    assert again.require_complete("grads") == again.records("grads")
    record = again.records("grads")[1]
    assert (record.start, record.stop, record.digest, record.seconds) == (4, 8, "d1", 0.5)
    assert abs(record.committed - time.time()) < 60
    on_disk = sum(path.stat().st_size for path in (folder.path / "grad_z.zarr").rglob("c*") if path.is_file())
    assert array_bytes(again.records("grads").values()) == on_disk


def test_a_run_is_carried_on_from_what_is_committed_and_the_plan_is_kept(tmp_path, sample):
    sample.make(tmp_path / "run", n_blocks=1)
    again = RunFolder(tmp_path / "run")
    with again.writing():
        plan = again.claim("grads", sample.task, sample.identity, force=False)
        assert plan["block_rows"] == 4
        sample.commit(again, *[block for block in sample.blocks if block.index not in again.done("grads")])
    sample.assert_intact(again, 0, 1, 2)


def test_a_stage_that_is_not_begun_has_no_plan(tmp_path, sample):
    folder = RunFolder(tmp_path / "run")
    with folder.writing():
        assert folder.claim("grads", sample.task, sample.identity, force=False) is None
    with pytest.raises(IncompleteStore, match="expected the stage grads, found it not begun; run infl-cache grads"):
        folder.plan("grads")
    assert folder.fingerprint("grads") == "not begun"


def test_an_unfinished_stage_is_said_with_its_figures(tmp_path, sample):
    folder = sample.make(tmp_path / "run", n_blocks=2)
    with pytest.raises(
        IncompleteStore, match="expected grads to be finished, found 2 of 3 blocks; run infl-cache grads"
    ):
        folder.require_complete("grads")


def test_a_first_attempt_that_was_refused_leaves_nothing_behind(tmp_path, sample, contents):
    with pytest.raises(BadInput, match="bad data"), RunFolder(tmp_path / "run").writing():
        raise BadInput("bad data")
    assert contents(tmp_path) == {}
    assert not list(tmp_path.rglob("ledger*"))
    sample.assert_intact(sample.make(tmp_path / "run"), 0, 1, 2)


def test_a_process_killed_before_its_manifest_is_carried_on(tmp_path, sample, start_child):
    child = start_child(
        """
from pathlib import Path
from infl_cache.disk.run import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.writing():
    (folder.path / "grad_z.zarr").mkdir()
    (folder.path / "manifest.json.partial").write_text("{")
    print("half begun", flush=True)
    sys.stdin.read()
""",
        tmp_path / "run",
    )
    assert child.stdout.readline() == "half begun\n"
    child.kill()
    child.wait()
    sample.assert_intact(sample.make(tmp_path / "run"), 0, 1, 2)


def test_what_a_killed_writer_was_writing_goes_with_the_next_writer_and_with_no_refused_one(folder, sample):
    left = [folder.path / "manifest.json.partial", folder.path / "grad_z.zarr" / "dense" / "c.0.0.77ab.partial"]
    with folder.writing():
        for file in left:
            file.write_bytes(b"half")
        with pytest.raises(Locked), RunFolder(folder.path).writing():
            pass
        assert all(file.exists() for file in left)
    with folder.writing():
        assert not any(file.exists() for file in left)
    sample.assert_intact(folder, 0, 1, 2)


def test_somebody_elses_folder_is_refused_and_not_touched(tmp_path, contents):
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(BadInput, match="expected a run folder or an empty one, found other files; choose another --run"),
        RunFolder(tmp_path).writing(),
    ):
        pass
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_a_path_that_is_or_goes_through_a_file_is_bad_input(tmp_path, path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match=r"file.*run folder"), RunFolder(tmp_path / path).writing():
        pass


def test_a_folder_that_cannot_be_written_is_bad_input(nobody_writes, sample):
    with nobody_writes() as (parent, seal):
        sample.make(parent / "run")
        seal()
        with pytest.raises(BadInput, match="run"), RunFolder(parent / "run").writing():
            pass
        with pytest.raises(BadInput, match="new"), RunFolder(parent / "new").writing():
            pass


def test_a_finished_run_is_read_where_nothing_can_be_written(nobody_writes, sample):
    with nobody_writes() as (parent, seal):
        sample.assert_intact(sample.make(parent / "run"), 0, 1, 2)
        seal()
        sample.assert_intact(RunFolder(parent / "run"), 0, 1, 2)


def test_nothing_is_changed_outside_of_writing(folder, sample, contents):
    before = contents(folder.path)
    with pytest.raises(RuntimeError, match="inside `with folder"):
        folder.drop(["grads"])
    with pytest.raises(RuntimeError, match="inside `with folder"):
        folder.commit("grads", sample.blocks[0], [], 0.0)
    with pytest.raises(RuntimeError, match="inside `with folder"):
        sample.begin(folder)
    assert contents(folder.path) == before


@pytest.mark.parametrize("moment", ["begun", "carried on"])
def test_the_configuration_is_written_when_a_stage_begins_or_goes_on_and_runs_again_as_it_is(tmp_path, sample, moment):
    if moment == "carried on":
        sample.make(tmp_path / "run", n_blocks=1)
    options = Options.resolve({"damping": 1e-05, "tolerance": 3.0e-10, "memory": "2GB", "solver": "exact"})
    folder = RunFolder(tmp_path / "run")
    folder.configuration = {"task": "a b.py:f", "task_args": {"n": 3}, **options.flat()}
    with folder.writing():
        if folder.claim("grads", sample.task, sample.identity, force=False) is None:
            sample.begin(folder)
        else:
            folder.write_configuration()
        read = read_config_file(folder.path / "run.yaml")  # a killed run knows its options
    assert (read.pop("task"), read.pop("task_args")) == ("a b.py:f", {"n": 3})
    assert Options.resolve(read) == options


# --- identity


def test_another_configuration_is_refused_field_by_field_and_nothing_is_touched(folder, sample, contents):
    before = contents(folder.path)
    asked = {**sample.identity, "damping": 0.1, "form": "dense"}
    folder.configuration = asked
    with folder.writing(), pytest.raises(ForeignRun) as refused:
        folder.claim("grads", sample.task, asked, force=False)
    message = str(refused.value)
    assert "damping: expected 0.01, found 0.1" in message
    assert "form: expected 'auto', found 'dense'" in message
    assert "--run" in message
    assert "--force" in message
    assert contents(folder.path) == before


def test_another_task_is_refused_field_by_field_for_every_stage_and_nothing_is_touched(folder, sample, contents):
    before = contents(folder.path)
    other = {**sample.task, "weights": "cc33"}
    folder.configuration = {"task": "other.py:task"}
    for stage in OUTPUTS:
        with folder.writing(), pytest.raises(ForeignRun, match="weights: expected 'aa11', found 'cc33'") as refused:
            folder.claim(stage, other, sample.identity, force=False)
        assert "n_train" not in str(refused.value)
    assert contents(folder.path) == before


def test_the_manifest_is_read_afresh_under_the_lock(tmp_path, sample):
    early = RunFolder(tmp_path / "run")
    sample.make(tmp_path / "run")
    with early.writing(), pytest.raises(ForeignRun, match="weights"):
        early.claim("grads", {**sample.task, "weights": "cc33"}, sample.identity, force=False)


MATRIX = {"influence", "rankings", "by_layer", "layer_shares"}


def begin_everything(folder, sample):
    """Every stage, each with a committed block and its files."""
    with folder.writing():
        for stage in ("grads", "stest", "self_influence"):
            sample.begin(folder, stage)
            sample.commit(folder, *sample.blocks, stage=stage)
        for stage in ("influence", "rankings", "by_layer", "layer_shares", "self_ranking"):
            folder.begin(stage, sample.task, sample.identity, {"n_rows": 1, "block_rows": 1})
            (folder.path / OUTPUTS[stage][0]).write_bytes(stage.encode())
            folder.commit(stage, Block(0, 0, 1), [folder.record_file(OUTPUTS[stage][0])], 0.0)


@pytest.mark.parametrize(
    ("forced", "dropped"),
    [
        ("grads", {"grads", *MATRIX, "self_influence", "self_ranking"}),
        ("stest", {"stest", *MATRIX}),
        ("influence", MATRIX),
        ("rankings", {"rankings"}),
        ("by_layer", {"by_layer", "layer_shares"}),
        ("self_influence", {"self_influence", "self_ranking"}),
    ],
)
def test_force_drops_exactly_the_stage_and_what_hangs_on_it(tmp_path, sample, contents, forced, dropped):
    assert {forced, *CHILDREN[forced]} == dropped
    folder = RunFolder(tmp_path / "run")
    begin_everything(folder, sample)
    (folder.path / "notes.txt").write_text("mine")
    kept = set(OUTPUTS) - dropped
    before = contents(folder.path)
    records = {stage: folder.records(stage) for stage in kept}
    with folder.writing():
        assert folder.claim(forced, sample.task, {"damping": 7.0}, force=True) is None
        assert contents(folder.path).keys() >= before.keys(), "nothing goes before the new stage begins"
        folder.begin(forced, sample.task, {"damping": 7.0}, {"n_rows": 4, "block_rows": 4})
    again = RunFolder(folder.path)
    assert set(again.manifest.stages) == {*kept, forced}
    assert {stage: again.records(stage) for stage in OUTPUTS} == {**records, **{stage: {} for stage in dropped}}
    gone = tuple(name for stage in dropped for name in OUTPUTS[stage])
    expected = {name: data for name, data in before.items() if name.split("/")[0] not in gone}
    changed = {"manifest.json", "ledger.sqlite", "run.yaml"}
    after = contents(folder.path)
    assert after.keys() | {"run.yaml"} == expected.keys() | {"run.yaml"}
    assert {name: after[name] for name in after.keys() - changed} == {
        name: expected[name] for name in expected.keys() - changed
    }


def test_force_on_stage_one_with_another_task_removes_all_of_the_old(tmp_path, sample):
    folder = RunFolder(tmp_path / "run")
    begin_everything(folder, sample)
    other = {**sample.task, "weights": "cc33"}
    with folder.writing():
        assert folder.claim("grads", other, sample.identity, force=True) is None
        folder.begin("grads", other, sample.identity, sample.plan)
    assert not any((folder.path / name).exists() for names in OUTPUTS.values() for name in names)
    assert RunFolder(folder.path).manifest.task == other
    assert list(RunFolder(folder.path).manifest.stages) == ["grads"]


def test_force_on_a_later_stage_with_another_task_is_refused_and_touches_nothing(tmp_path, sample, contents):
    folder = RunFolder(tmp_path / "run")
    begin_everything(folder, sample)
    before = contents(folder.path)
    for stage in ("stest", "influence"):
        with folder.writing(), pytest.raises(ForeignRun, match="weights: expected 'aa11', found 'cc33'"):
            folder.claim(stage, {**sample.task, "weights": "cc33"}, sample.identity, force=True)
    assert contents(folder.path) == before


def test_a_crash_while_old_files_are_removed_leaves_no_claim_on_them(folder, sample, monkeypatch):
    def die(_):
        raise KeyboardInterrupt

    with folder.writing(), monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        assert folder.claim("grads", sample.task, sample.identity, force=True) is None
        with pytest.raises(KeyboardInterrupt):
            sample.begin(folder)
    assert (folder.path / "grad_z.zarr").exists()
    again = RunFolder(folder.path)
    assert again.records("grads") == {}
    assert "grads" not in again.manifest.stages
    sample.assert_intact(sample.make(folder.path), 0, 1, 2)


# --- damage


def first_file(folder, sample, block=1, array=0):
    layout = sample.layouts[array]
    return folder.path / "grad_z.zarr" / layout.path / chunk_keys(layout, sample.blocks[block])[0]


@pytest.mark.parametrize("array", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 1, 0.5, -1])
def test_a_truncated_chunk_is_named_with_its_rows(folder, sample, size, array):
    file = first_file(folder, sample, array=array)
    whole = file.stat().st_size
    os.truncate(file, int(whole * size) if size == 0.5 else size % whole)
    with pytest.raises(DamagedStore, match=rf"{file} \(rows 4 to 7\): expected {whole} bytes .* found .*--force"):
        RunFolder(folder.path).done("grads")
    folder.check_block(folder.records("grads")[0])


def test_a_deleted_chunk_is_named_with_its_rows(folder, sample):
    file = first_file(folder, sample)
    file.unlink()
    with pytest.raises(DamagedStore, match=rf"{file} \(rows 4 to 7\): expected \d+ bytes, found no file; .*--force"):
        folder.done("grads")


def test_a_folder_in_place_of_a_chunk_is_named_with_its_rows(folder, sample):
    file = first_file(folder, sample)
    file.unlink()
    file.mkdir()
    with pytest.raises(DamagedStore, match=rf"{file} \(rows 4 to 7\): expected \d+ bytes, found what cannot be read"):
        folder.done("grads")


def test_a_valid_chunk_of_other_rows_is_named_with_its_rows(folder, sample):
    source, file = first_file(folder, sample, block=0), first_file(folder, sample, block=1)
    shutil.copy(source, file)
    assert np.isfinite(folder.store("grads").read_block(sample.blocks[1])["dense"]).all(), "zarr alone reads it"
    with pytest.raises(DamagedStore, match=rf"{file} \(rows 4 to 7\): expected .*checksum"):
        folder.done("grads")


def test_every_flipped_bit_of_a_chunk_is_found_by_the_check_or_the_reading(folder, sample):
    file = first_file(folder, sample)
    whole = file.read_bytes()
    record = folder.records("grads")[1]
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(DamagedStore, match=r"dense.*rows 4 to 7"):  # noqa: PT012
            folder.check_block(record)
            folder.store("grads").read_block(sample.blocks[1])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("dense/zarr.json", '"float32"', '"float64"'),
        ("dense/zarr.json", '"NaN"', "0.0"),
        ("digest/zarr.json", "10", "11"),
        ("layer/zarr.json", "group", "array"),
        ("zarr.json", "3", "2"),
    ],
)
def test_edited_metadata_are_named_and_not_believed(folder, name, old, new):
    file = folder.path / "grad_z.zarr" / name
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(DamagedStore, match=rf"{file}: expected \d+ bytes with checksum [0-9a-f]+, found .*--force"):
        RunFolder(folder.path).store("grads")


def test_missing_metadata_are_named(folder):
    file = folder.path / "grad_z.zarr" / "dense" / METADATA
    file.unlink()
    with pytest.raises(DamagedStore, match=rf"{file}: expected \d+ bytes, found no file"):
        RunFolder(folder.path).store("grads")


def test_files_that_nobody_committed_prove_nothing(tmp_path, sample):
    folder = sample.make(tmp_path / "run", n_blocks=1)
    with folder.writing():
        folder.store("grads", "r+").write_block(sample.blocks[1], sample.data(sample.blocks[1]))
    sample.assert_intact(folder, 0)


@pytest.mark.parametrize("path", ["../secret", "grad_z.zarr/../../secret", "/etc/passwd"])
def test_a_ledger_that_names_files_outside_the_folder_is_not_followed(folder, path):
    (folder.path.parent / "secret").write_bytes(b"x")
    with folder.writing():
        folder.commit("grads", Block(0, 0, 4), [FileRecord(path, 1, 120)], 0.0)
    with pytest.raises(DamagedStore, match="expected file names inside the folder, found"):
        folder.done("grads")


@pytest.mark.parametrize(("block_rows", "n_rows"), [(8, 10), (10, 10), (3, 10), (4, 8), (0, 10)])
def test_a_plan_that_does_not_fit_the_committed_rows_is_damage_and_no_finished_stage(
    tmp_path, sample, block_rows, n_rows
):
    folder = sample.make(tmp_path / "run", n_blocks=3 if n_rows == 8 else 2)
    file = folder.path / "manifest.json"
    content = json.loads(file.read_text())
    content["stages"]["grads"]["plan"].update(block_rows=block_rows, n_rows=n_rows)
    file.write_text(json.dumps(content))
    with pytest.raises(DamagedStore):  # noqa: PT012
        again = RunFolder(folder.path)
        again.require_complete("grads")
        again.done("grads")


def test_a_run_that_has_lost_its_manifest_is_damaged_and_keeps_all_its_work(folder, contents):
    (folder.path / "manifest.json").unlink()
    before = contents(folder.path)
    refused = RunFolder(folder.path)
    with pytest.raises(DamagedStore, match=r"manifest\.json"), refused.writing():
        pass
    with pytest.raises(RuntimeError, match="inside `with folder"):
        refused.drop(["grads"])
    assert contents(folder.path) == before


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}'])
def test_a_damaged_manifest_is_said_before_anything_is_touched(folder, contents, damage):
    (folder.path / "manifest.json").write_text(damage)
    before = contents(folder.path)
    with pytest.raises(DamagedStore, match=r"manifest\.json"):
        RunFolder(folder.path)
    with pytest.raises(DamagedStore, match=r"manifest\.json"), folder.writing():
        pass
    assert contents(folder.path) == before


def test_a_manifest_of_another_format_is_said_before_anything_is_touched(folder, contents):
    file = folder.path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))
    before = contents(folder.path)
    with pytest.raises(ForeignRun, match="expected format 1, found format 2"), folder.writing():
        pass
    assert contents(folder.path) == before


def test_a_missing_ledger_means_that_nothing_is_done(folder, sample):
    for file in folder.path.glob("ledger.sqlite*"):
        file.unlink()
    assert RunFolder(folder.path).records("grads") == {}
    with pytest.raises(IncompleteStore, match="0 of 3"):
        RunFolder(folder.path).require_complete("grads")
    with folder.writing():
        sample.commit(folder, *sample.blocks)
    sample.assert_intact(folder, 0, 1, 2)


def test_the_ledger_of_another_run_is_found_out(tmp_path, folder, sample):
    other = sample.make(tmp_path / "other", n_blocks=0)
    with other.writing():
        store = other.store("grads", "r+")
        for block in sample.blocks:
            doubled = {path: 2 * values for path, values in sample.data(block).items()}
            other.commit("grads", block, store.write_block(block, doubled), 0.5)
    shutil.copy(other.path / "ledger.sqlite", folder.path / "ledger.sqlite")
    with pytest.raises(DamagedStore, match="checksum"):
        folder.done("grads")


# --- a full disk


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def limit_the_ledger(folder):
    """SQLite's own "database or disk is full"."""
    connection = folder._ledger._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")


@pytest.mark.parametrize("place", ["chunk", "fsync", "ledger"])
def test_a_full_disk_is_said_and_keeps_what_was_committed_and_is_carried_on(tmp_path, sample, monkeypatch, place):
    folder = sample.make(tmp_path / "run", n_blocks=1)

    def go_on():
        with folder.writing(), monkeypatch.context() as patch:
            if place == "chunk":
                patch.setattr(os, "write", no_space)
            if place == "fsync":
                patch.setattr(os, "fsync", no_space)
            if place == "ledger":
                limit_the_ledger(folder)
            for _ in range(20):  # the last page of the ledger has room for some rows
                sample.commit(folder, sample.blocks[1])
                folder.commit("rankings", Block(random.getrandbits(30), 0, 1), [], 0.0, digest="x" * 1000)

    with pytest.raises(DiskFull, match=r"disk is full \([\d,]+ bytes free\); make room"):
        go_on()
    done = sorted(folder.done("grads"))
    assert done in ([0], [0, 1])
    sample.assert_intact(folder, *done)
    with folder.writing():
        sample.commit(folder, *sample.blocks[1:])
    sample.assert_intact(folder, 0, 1, 2)


def test_a_full_disk_while_a_stage_begins_leaves_no_claim_and_is_carried_on(tmp_path, sample, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(DiskFull):
            sample.make(folder.path)
    assert RunFolder(folder.path).manifest.stages == {}
    sample.assert_intact(sample.make(folder.path), 0, 1, 2)


# --- several processes

WRITER = """
import json, time
from pathlib import Path
import numpy as np
from infl_cache.disk.layout import Block, blocks
from infl_cache.disk.run import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.writing():
    store = folder.store("grads", "r+")
    for block in folder.stage_blocks("grads"):
        if block.index in folder.done("grads"):
            continue
        rows = np.arange(block.start, block.stop)
        data = {"x": np.repeat(rows, 1000).reshape(block.rows, 1000).astype(np.float32)}
        folder.commit("grads", block, store.write_block(block, data), 0.0)
        print(block.index, flush=True)
    print("finished", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def many_blocks(tmp_path, sample):
    """A begun stage of 500 blocks of 4 rows, in a run folder that children write into."""
    folder = RunFolder(tmp_path / "run")
    layouts = [ArrayLayout("x", 2000, (1000,), "float32", 2, (500,))]
    with folder.writing():
        folder.begin_store(
            "grads", sample.task, sample.identity, {"n_rows": 2000, "block_rows": 4}, layouts, sample.codec
        )
    return folder


def test_killed_writers_lose_nothing_that_they_committed_and_claim_nothing_else(many_blocks, start_child):
    said: set[int] = set()
    for kill in range(3):
        child = start_child(WRITER, many_blocks.path)
        for _ in range(5 + 3 * kill):
            line = child.stdout.readline()
            assert int(line) not in said, "a committed block was computed again"
            said.add(int(line))
        time.sleep(random.uniform(0, 0.02))
        child.kill()
        said.update(int(line) for line in child.communicate()[0].splitlines())
        done = many_blocks.done("grads")
        assert said <= done.keys()
        assert len(done) <= len(said) + 1, "at most the commit that it had no time to tell of"
        said = set(done)
        store = many_blocks.store("grads")
        for index in done:
            block = many_blocks.stage_blocks("grads")[index]
            expected = np.arange(block.start, block.stop, dtype=np.float32)
            np.testing.assert_array_equal(store.read_block(block)["x"], np.tile(expected[:, None], 1000))


def test_a_second_writer_is_refused_while_a_reader_follows_the_first(many_blocks, start_child):
    child = start_child(WRITER, many_blocks.path)
    for _ in range(4):
        last = int(child.stdout.readline())
    reader = RunFolder(many_blocks.path)
    records = reader.done("grads")
    assert set(range(last + 1)) <= records.keys()
    with pytest.raises(Locked, match=f"process {child.pid} "), RunFolder(many_blocks.path).writing():
        pass
    assert int(child.stdout.readline()) == last + 1, "the first one goes on"
    child.kill()
    child.wait()
    began = time.perf_counter()
    with RunFolder(many_blocks.path).writing():
        assert time.perf_counter() - began < 2


def test_the_disk_column_works_without_torch(folder, start_child):
    child = start_child(
        """
import pkgutil, importlib
from pathlib import Path
import infl_cache.disk
for each in pkgutil.iter_modules(infl_cache.disk.__path__):
    importlib.import_module(f"infl_cache.disk.{each.name}")
folder = sys.modules["infl_cache.disk.run"].RunFolder(Path(sys.argv[1]))
print(sorted(folder.done("grads")), "torch" in sys.modules)
""",
        folder.path,
    )
    assert child.communicate(timeout=60)[0] == "[0, 1, 2] False\n"
