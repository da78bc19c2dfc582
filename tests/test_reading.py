"""What a finished run answers, with a matrix and without one."""

import csv
import shutil

import numpy as np
import pytest

from infl_cache import BadInput, DamagedStore, IncompleteStore, Run
from infl_cache.disk.manifest import fingerprint
from infl_cache.disk.run import RunFolder
from infl_cache.stages.export import export
from infl_cache.stages.report import report
from infl_cache.stages.verify import verify
from tests import tasks

QUIET = {"progress": False}
WORDS = r"expected a matrix .*made with --no-matrix.*infl-cache influence --matrix --force"


def without_matrix(path):
    """What a run with `matrix=False` leaves."""
    folder = RunFolder(path)
    with folder.writing():
        folder.remember("influence", matrix=False)
    (path / "influence.npy").unlink()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("full") / "r", tasks.mlp(n_test=5), damping=0.1, top_k=5, top_k_train=2, **QUIET)
    run.all()
    return run


@pytest.fixture(scope="module")
def bare(full, tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "r"
    shutil.copytree(full.path, path)
    without_matrix(path)
    return Run(path, tasks.mlp(n_test=5), **QUIET)


def pairs(ranking):
    return ranking.ids.tolist(), ranking.values.tolist()


def expected(row, k, highest=False):
    order = np.argsort(-row if highest else row, kind="stable")[:k]
    return order.tolist(), row[order].tolist()


@pytest.mark.parametrize("kind", ["full", "bare"])
def test_rankings_are_those_of_the_matrix_with_it_and_without(kind, full, bare):
    run, matrix = {"full": full, "bare": bare}[kind], np.array(full.scores())
    for j in range(5):
        assert pairs(run.helpful(j, k=4)) == expected(matrix[j], 4)
        assert pairs(run.harmful(j, k=3)) == expected(matrix[j], 3, highest=True)
    for i in range(10):
        assert pairs(run.helps(i, k=2)) == expected(matrix[:, i], 2)
        assert pairs(run.harms(i, k=1)) == expected(matrix[:, i], 1, highest=True)
    targets = full.task.test.tensors[1].numpy()
    for label in np.unique(targets).tolist():
        mean = matrix[targets == label].astype(np.float64).mean(0).astype(np.float32)
        assert pairs(run.helpful_to_class(label, k=4)) == expected(mean, 4)
        assert pairs(run.harmful_to_class(label, k=4)) == expected(mean, 4, highest=True)
    mean = matrix.astype(np.float64).mean(0).astype(np.float32)
    assert pairs(run.helpful_to_all(k=10)) == expected(mean, 10)
    assert pairs(run.harmful_to_all(k=1)) == expected(mean, 1, highest=True)


def test_the_rest_of_a_matrix_that_is_not_kept_is_refused_with_what_to_do(bare):
    for ask in (bare.scores, bare.validate, lambda: export(bare.folder, "json", show=False)):
        with pytest.raises(IncompleteStore, match=WORDS):
            ask()
    for ask in (lambda: bare.helpful(0, k=6), lambda: bare.harmful_to_class(0, k=6)):
        with pytest.raises(BadInput, match=r"k: expected at most 5, .* found 6; .*--top-k 6, in .* with --force"):
            ask()
    with pytest.raises(BadInput, match=r"k: expected at most 2, .*--top-k-train 3"):
        bare.harms(0, k=3)
    with pytest.raises(BadInput, match=r"k: expected at most 5, .*--top-k 6"):
        export(bare.folder, "csv", top_k=6, show=False)


@pytest.mark.parametrize("kind", ["full", "bare"])
def test_samples_and_classes_that_are_none_are_refused(kind, full, bare):
    run = {"full": full, "bare": bare}[kind]
    for ask, words in (
        (lambda: run.helpful(5), "test sample: expected 0 to 4, found 5"),
        (lambda: run.helps(10), "training sample: expected 0 to 9, found 10"),
        (lambda: run.harms(0, k=0), "k: expected at least 1, found 0"),
        (lambda: run.helpful_to_all(k=0), "k: expected at least 1, found 0"),
        (lambda: run.helpful_to_class(0, k=-1), "k: expected at least 1, found -1"),
        (lambda: run.harmful_to_class(7), r"class: expected 0, 1, 2, found 7"),
    ):
        with pytest.raises(BadInput, match=words):
            ask()


def test_report_export_status_and_verify_need_no_matrix(full, bare):
    assert report(bare.folder) == report(full.folder)
    assert "Most harmful on average: " in report(full.folder)
    for top_k in (None, 3):
        found, same = (export(run.folder, "csv", top_k=top_k, show=False) for run in (bare, full))
        with open(found) as one, open(same) as other:
            rows, every = list(csv.DictReader(one)), list(csv.DictReader(other))
        assert rows == [row for row in every if int(row["rank"]) <= (top_k or 5)]
    assert "matrix: not kept (--no-matrix)" in str(bare.status())
    assert "not kept" not in str(full.status())
    # The matrix was taken away afterwards: what a run without one makes its rankings of was never there.
    assert [fault.file for fault in verify(bare.folder, show=False).faults] == ["influence.state"]


def test_damaged_missing_and_older_rankings_are_said(full, bare, tmp_path):
    path = tmp_path / "r"
    shutil.copytree(bare.path, path)
    file, run = path / "rankings.npz", Run(path)
    assert len(run.helpful(0, k=1).ids) == 1
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for ask in (lambda: run.helpful(0, k=1), lambda: run.helpful_to_all(1), lambda: report(run.folder)):
        with pytest.raises(DamagedStore, match=r"rankings\.npz: expected \d+ bytes with checksum"):
            ask()
    assert [fault.file for fault in verify(RunFolder(path), show=False).faults] == ["influence.state", "rankings.npz"]
    file.unlink()
    with pytest.raises(DamagedStore, match=r"rankings\.npz: expected \d+ bytes, found no file"):
        run.helpful(0, k=1)
    folder = RunFolder(path)
    with folder.writing():
        folder.drop(["rankings"])
    with pytest.raises(IncompleteStore, match="expected finished rankings, found none; run infl-cache influence"):
        run.helpful(0, k=1)


def test_rankings_of_an_older_version_are_read_and_made_anew(full, tmp_path):
    path = tmp_path / "r"
    shutil.copytree(full.path, path)
    older(path)
    run = Run(path, tasks.mlp(n_test=5), **QUIET)
    assert pairs(run.helpful_to_all(3)) == pairs(full.helpful_to_all(3))
    assert pairs(run.helps(3)) == pairs(full.helps(3))
    with pytest.raises(IncompleteStore, match="expected class_harmful_ids, found an older version's"):
        run.harmful_to_class(0)
    assert "Most harmful on average" in report(run.folder)
    run.influence()
    assert pairs(run.harmful_to_class(0, k=2)) == pairs(full.harmful_to_class(0, k=2))


def older(path):
    """Take out of the rankings what there was not when they were of test samples and the mean alone."""
    with np.load(path / "rankings.npz") as found:
        kept = {name: array for name, array in found.items() if not name.startswith(("train_", "class_"))}
    np.savez(path / "rankings.npz", **kept)
    folder = RunFolder(path)
    with folder.writing():
        entry = folder.manifest.stages["rankings"]
        del entry["identity"]["top_k_train"]
        entry["fingerprint"] = fingerprint({"task": folder.manifest.task, "stage": entry["identity"]})
        folder._write_manifest()
        record = folder.records("rankings")[0]
        folder.commit("rankings", folder.stage_blocks("rankings")[0], [folder.record_file("rankings.npz")], 0.0)
        assert record.files != folder.records("rankings")[0].files


def test_a_lost_chunk_is_damage_and_not_another_task(tmp_path):
    task = tasks.mlp(n_train=20, n_test=4)
    run = Run(tmp_path / "run", task, solver="identity", progress=False, block_rows=5)
    run.all()
    for name in ("grad_z.zarr/digest/c.2", "s_test.zarr/digest/c.0"):
        chunk = run.path / name
        kept = chunk.read_bytes()
        chunk.unlink()
        for read in (lambda again: again.helpful(0, 1), lambda again: again.scores()):
            with pytest.raises(DamagedStore, match=name):
                read(Run(run.path, task))
        chunk.write_bytes(kept)
