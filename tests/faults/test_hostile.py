"""A run folder from somebody who means harm: no code of his runs, nothing outside is read or written, no hang."""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.disk.ledger import BlockRecord, FileRecord, Ledger
from infl_cache.disk.manifest import Manifest
from infl_cache.disk.store import record_of_file
from infl_cache.errors import BadInput, DamagedStore, ForeignRun, IncompleteStore, InflCacheError
from infl_cache.stages.verify import verify
from tests.faults import times
from tests.faults.data import contents, small_task

OPTIONS = {
    "solver": "exact",
    "damping": 0.1,
    "progress": False,
    "block_rows": 8,
    "test_block_rows": 3,
    "by_layer": True,
}
REFUSALS = (DamagedStore, BadInput, ForeignRun, IncompleteStore)
ACTS = {
    "status": lambda path: str(Run(path).status()),
    "verify": lambda path: verify(Run(path).folder, show=False).sound,
    "scores": lambda path: Run(path).scores(),
    "helpful": lambda path: Run(path).helpful(0, 3),
    "helps": lambda path: Run(path).helps(0, 3),
    "grad_z": lambda path: Run(path).grad_z(slice(None)),
    "s_test": lambda path: Run(path).s_test(slice(None)),
    "by_layer": lambda path: Run(path).by_layer(),
    "layer_shares": lambda path: Run(path).layer_shares(),
    "suspects": lambda path: Run(path).suspects(2),
    "export": lambda path: main(["export", str(path), "--out", str(path.parent / "out.json")]),
    "report": lambda path: main(["report", str(path)]),
    "all": lambda path: Run(path, small_task(), **OPTIONS).all(),
    "self-influence": lambda path: Run(path, small_task(), **OPTIONS).self_influence(),
    "force": lambda path: Run(path, small_task(), **OPTIONS).all(force=True),
    "repair": lambda path: Run(path, small_task(), **OPTIONS).verify(repair=True),
}

# In the short version.
FEW = ("verify", "scores", "helpful", "grad_z", "all")
READ = [act for act in (ACTS if times(0, 1) else FEW) if act not in ("all", "force", "repair", "self-influence")]
TRIED = [*ACTS] if times(0, 1) else [*FEW]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("hostile") / "run", small_task(), **OPTIONS)
    run.all()
    run.self_influence()
    (run.path / "report").mkdir()
    (run.path / "report" / "influence.png").write_bytes(b"a picture")
    (run.path / "report" / "index.html").write_bytes(b"a page")
    return run.path


@pytest.fixture
def path(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@contextmanager
def limited(seconds=20, gigabytes=8):
    """Within so much time and memory, or the test fails."""

    def late(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (gigabytes * 10**9, before[1][1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        resource.setrlimit(resource.RLIMIT_AS, before[1])


def tried(act, path, may_succeed=True):
    """An act on a hostile folder: a refusal of ours, or nothing at all; whether it was refused."""
    with limited():
        try:
            found = ACTS[act](path)
        except REFUSALS:
            return True
    refused = found is False or (type(found) is int and found in (2, 3, 4))
    refused |= hasattr(found, "sound") and not found.sound
    assert refused or may_succeed, f"{act} took it"
    return refused


LINKED = (
    "manifest.json", "ledger.sqlite", "run.yaml", "influence.npy", "rankings.npz", "influence_by_layer.npy",
    "by_layer.npz", "self_influence.npz", "grad_z.zarr", "s_test.zarr", "self_influence.zarr", "report",
    "grad_z.zarr/zarr.json", "grad_z.zarr/loss", "grad_z.zarr/loss/c.0", "s_test.zarr/s_test/zarr.json",
    "report/influence.png", "report/index.html", ".lock", "influence.partial.npy", "ledger.sqlite-wal", "x.partial",
)  # fmt: skip


@pytest.mark.parametrize("name", LINKED)
def test_links_out_of_the_folder_are_refused_and_what_they_lead_to_is_not_touched(name, path, tmp_path):
    outside, place = tmp_path / "outside", path / name
    outside.mkdir()
    target = outside / "kept"
    if place.is_dir() or place.exists():
        shutil.move(place, target)
    else:
        target.write_bytes(b"somebody's")
    place.symlink_to(target)
    before = contents(outside)
    for act in ("all", "force", "repair", "self-influence")[: times(2, 4)]:
        assert tried(act, path, may_succeed=False)
        assert contents(outside) == before
    for act in READ:
        tried(act, path)
        assert contents(outside) == before
    if "/" not in name:
        assert tried("status", path)
    assert place.is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "ledger.sqlite", "influence.npy", "rankings.npz", "run.yaml"])
def test_a_pipe_in_place_of_a_file_does_not_make_us_wait(name, path):
    (path / name).unlink()
    os.mkfifo(path / name)
    for act in TRIED:
        assert tried(act, path, may_succeed=False)


def test_a_folder_that_is_a_link_itself_is_the_users_choice(path, tmp_path):
    (tmp_path / "named").symlink_to(path)
    assert all(result.computed == 0 for result in Run(tmp_path / "named", small_task(), **OPTIONS).all())


class Harm:
    """What a pickle does when somebody loads it."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


def with_pickle(name, canary):
    """Content of a file that runs code in whoever unpickles it."""
    harm = pickle.dumps(Harm(canary))
    objects = np.empty(1, dtype=object)
    objects[0] = Harm(canary)
    if name.endswith(".npy"):
        buffer = BytesIO()
        np.save(buffer, objects, allow_pickle=True)
        return buffer.getvalue()
    if name.endswith(".npz"):
        buffer = BytesIO()
        np.savez(buffer, **dict.fromkeys(("helpful_ids", "helpful_values", "mean", "names", "share"), objects))
        return buffer.getvalue()
    return harm


FILES = (
    "manifest.json", "ledger.sqlite", "run.yaml", "influence.npy", "rankings.npz", "influence_by_layer.npy",
    "by_layer.npz", "self_influence.npz", "s_test.state", "influence.tile", "influence.state", "s_test.fit",
    "grad_z.zarr/zarr.json", "grad_z.zarr/loss/c.0", "s_test.zarr/s_test/zarr.json",
)  # fmt: skip


def recorded_as_it_is(path, name):
    """The ledger and the manifest made to say that a file is as it was committed."""

    record = record_of_file(path, path / name)
    with sqlite3.connect(path / "ledger.sqlite") as connection:
        connection.execute("UPDATE files SET size = ?, crc = ? WHERE path = ?", (record.size, record.crc, name))
    connection.close()
    manifest = Manifest.read(path / "manifest.json")
    for entry in manifest.stages.values():
        for each in entry["plan"].get("metadata", ()):
            if each["path"] == name:
                each.update(size=record.size, crc=record.crc)
    manifest.write(path / "manifest.json")


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "said to be committed"])
@pytest.mark.parametrize("name", FILES)
def test_nothing_is_unpickled(name, known, path, tmp_path):
    canary = tmp_path / "canary"
    (path / name).write_bytes(with_pickle(name, str(canary)))
    if known and name not in ("manifest.json", "ledger.sqlite"):
        recorded_as_it_is(path, name)
    for act in TRIED:
        shutil.copytree(path, tmp_path / "again" / "run")
        tried(act, tmp_path / "again" / "run")
        assert not canary.exists()
        shutil.rmtree(tmp_path / "again")


def edited(path, change):
    """The manifest changed behind its back, its checksum made to fit."""
    manifest = Manifest.read(path / "manifest.json")
    change(manifest.stages)
    content = {"format": 1, "checksum": manifest.checksum(), "task": manifest.task, "stages": manifest.stages}
    (path / "manifest.json").write_text(json.dumps(content))


HUGE = 10**18
PLANS = {
    "rows": lambda stages: stages["grads"]["plan"].update(n_rows=HUGE),
    "rows that fit": lambda stages: stages["grads"]["plan"].update(n_rows=10**11, block_rows=1),
    "block rows": lambda stages: stages["grads"]["plan"].update(block_rows=0),
    "negative": lambda stages: stages["stest"]["plan"].update(block_rows=-3),
    "text": lambda stages: stages["grads"]["plan"].update(n_rows="many"),
    "spans": lambda stages: stages["stest"]["plan"].update(spans=[[0, HUGE]]),
    "spans of a billion": lambda stages: stages["stest"]["plan"].update(spans=[[0, 10**9]], block_rows=3),
    "samples": lambda stages: stages["stest"]["plan"].update(samples=[[0, HUGE, 1]]),
    "step": lambda stages: stages["stest"]["plan"].update(samples=[[0, 3, 0]]),
    "shape": lambda stages: stages["grads"]["plan"]["arrays"][0].update(row_shape=[HUGE]),
    "chunk": lambda stages: stages["grads"]["plan"]["arrays"][0].update(chunk_rows=HUGE),
    "axes": lambda stages: stages["grads"]["plan"]["arrays"][0].update(axes=[{"x": 1}, 2]),
    "chunk shape": lambda stages: stages["grads"]["plan"]["arrays"][0].update(chunk_row_shape=[HUGE, HUGE]),
    "objects": lambda stages: stages["grads"]["plan"]["arrays"][0].update(dtype="O"),
    "dtype": lambda stages: stages["grads"]["plan"]["arrays"][0].update(dtype="exec('x')"),
    "array outside": lambda stages: stages["grads"]["plan"]["arrays"][0].update(path="../../outside"),
    "array at the root": lambda stages: stages["grads"]["plan"]["arrays"][0].update(path="/outside"),
    "metadata outside": lambda stages: stages["grads"]["plan"]["metadata"][0].update(path="../outside/kept"),
    "growth outside": lambda stages: stages["grads"]["plan"].update(
        metadata_before=[{"path": "../outside/kept", "size": 10, "crc": 1}]
    ),
    "tiles": lambda stages: stages["influence"]["plan"].update(tile_blocks=0),
    "layers": lambda stages: stages["by_layer"]["plan"].update(layers=[]),
    "forms": lambda stages: stages["grads"]["plan"].update(forms={}),
    "forms of another kind": lambda stages: stages["grads"]["plan"].update(forms=[["x"] * 9]),
}  # fmt: skip


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_that_no_run_can_have_is_refused_at_once(what, path, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"somebody's")
    edited(path, PLANS[what])
    before = contents(outside)
    refused = [tried(act, path) for act in TRIED]
    assert any(refused)
    assert contents(outside) == before


@pytest.mark.parametrize("value", [{}, {"name": "x"}, {"largest": 1.0}])
def test_a_spectrum_without_its_numbers_is_refused(finished, tmp_path, value):
    path = tmp_path / "edited"
    shutil.copytree(finished, path)
    edited(path, lambda stages: stages["stest"]["plan"].update(spectrum=value))
    with pytest.raises(DamagedStore, match="expected a plan of stest that a run can have"):
        Run(path).status()


def test_a_plan_with_any_fact_of_another_kind_is_a_refusal_or_the_same_run(finished, tmp_path):
    chance = random.Random(int(os.environ.get("INFL_CACHE_SEED") or 1))
    stages = Manifest.read(finished / "manifest.json").stages
    values = ["x", 7, [], {}, None, -1, 1e308, [[0, 1]], ["x"], {"name": "x"}, True, "gone"]
    edits = [(stage, key, value) for stage, entry in stages.items() for key in entry["plan"] for value in values]
    assert len(edits) > 300
    scores = np.array(Run(finished).scores())
    for stage, key, value in chance.sample(edits, times(25, len(edits))):
        path = tmp_path / "edited"
        shutil.copytree(finished, path)

        def change(stages, stage=stage, key=key, value=value):
            stages[stage]["plan"].pop(key)
            if value != "gone":
                stages[stage]["plan"][key] = value

        edited(path, change)
        for act in TRIED:
            tried(act, path)
        with contextlib.suppress(InflCacheError):
            np.testing.assert_array_equal(Run(path).scores(), scores, err_msg=f"{stage} {key} {value!r}")
        shutil.rmtree(path)


def test_folders_in_folders_without_end_are_refused(path, monkeypatch):
    monkeypatch.chdir(path / "grad_z.zarr")
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    os.chdir("/")
    assert tried("grad_z", path, may_succeed=False)
    assert tried("all", path, may_succeed=False)
    subprocess.run(["rm", "-rf", str(path)], check=True)


@pytest.mark.parametrize("name", ["pipe.yaml", "zero.yaml"])
def test_a_configuration_that_is_no_plain_file_is_not_waited_for(name, tmp_path):
    file = tmp_path / name
    if name == "pipe.yaml":
        os.mkfifo(file)
    else:
        file = Path("/dev/zero")
    with limited(5):
        assert main(["run", "--config", str(file)]) == 2


LEDGERS = {
    "a view that never ends": (
        "DROP TABLE blocks; CREATE VIEW blocks AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        " SELECT 'grads' AS stage, i AS block, 0 AS start, 8 AS stop, '' AS digest, 0 AS nonfinite, '[]' AS bad_rows,"
        " 0.0 AS seconds, 0.0 AS committed FROM n"
    ),
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON blocks BEGIN DELETE FROM files; END",
    "another table": "CREATE TABLE other (x)",
    "a generated column": (
        "DROP TABLE files; CREATE TABLE files (stage TEXT, block INTEGER, path TEXT, size INTEGER,"
        " crc INTEGER GENERATED ALWAYS AS (size * 2))"
    ),
    "nothing": "UPDATE blocks SET digest = CAST(zeroblob(10) AS TEXT), start = -1",
    "huge numbers": f"UPDATE blocks SET start = {2**62}, stop = {2**63 - 1}",
    "texts for numbers": "UPDATE blocks SET start = 'DROP TABLE', seconds = 'x'",
    "blobs": "UPDATE files SET path = CAST(path AS BLOB), size = x'00'",
    "deep lists": "UPDATE blocks SET bad_rows = '" + "[" * 50_000 + "]" * 50_000 + "'",
    "names outside": "UPDATE files SET path = '../outside/' || rowid",
    "names from the root": "UPDATE files SET path = '/etc/' || rowid",
    "names with a NUL": "UPDATE files SET path = 'a' || char(0) || rowid",
    "many rows": (
        "INSERT INTO blocks WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 30000)"
        " SELECT 'grads', i, 0, 8, '', 0, '[]', 0.0, 0.0 FROM n"
    ),
}


@pytest.mark.parametrize("what", LEDGERS)
def test_a_ledger_that_plays_tricks_is_refused(what, path, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_bytes(b"somebody's")
    with sqlite3.connect(path / "ledger.sqlite") as connection:
        connection.executescript(LEDGERS[what])
    connection.close()
    before = contents(outside)
    assert [act for act in ("status", "grad_z", "all") if not tried(act, path)] in ([], ["status"])
    for act in TRIED:
        tried(act, path)
    assert contents(outside) == before


def header_of_shape(shape, descr="<f4"):

    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("head", [header_of_shape((HUGE, 1)), header_of_shape((6, 24), "|O"),
                                  b"\x93NUMPY\x01\x00v\x00{'descr': __import__('os').mkdir('x')}"])  # fmt: skip
@pytest.mark.parametrize("name", ["influence.npy", "influence_by_layer.npy"])
def test_a_matrix_with_a_head_that_lies_is_refused(name, head, path):
    (path / name).write_bytes(head + bytes(64))
    act = "scores" if name == "influence.npy" else "by_layer"
    assert tried(act, path, may_succeed=False)
    assert tried("verify", path, may_succeed=False)


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "vlen-utf8", "numcodecs.zlib", "gzip", "no.such.codec"])
def test_a_foreign_codec_is_refused(codec, path):
    name = "grad_z.zarr/loss/zarr.json"
    metadata = json.loads((path / name).read_text())
    metadata["codecs"] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": codec, "configuration": {}},
    ]
    (path / name).write_text(json.dumps(metadata))
    assert tried("grad_z", path, may_succeed=False)
    recorded_as_it_is(path, name)
    for act in ("grad_z", "all", "verify"):
        with limited():
            try:
                ACTS[act](path)
                assert act == "verify"
            except InflCacheError:
                pass


def test_what_is_left_of_a_ledger_can_still_be_committed_to(tmp_path):
    Ledger(tmp_path / "ledger.sqlite").close()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    record = BlockRecord("grads", 0, 0, 4, "digest", 0, (), 1.0, 2.0, (FileRecord("grad_z.zarr/loss/c.0", 9, 7),))
    ledger.commit(record)
    ledger.close()
    assert Ledger(tmp_path / "ledger.sqlite", read_only=True).done("grads") == {0: record}
