import gzip
import importlib
import json

import numpy as np
import pytest
import torch

from tests.scripts.running import ROOT, ran, refused


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("pictures")


def test_solvers_are_compared_with_the_exact_one_and_with_the_same_retrainings(tmp_path):
    done = ran(
        "compare_solvers",
        tmp_path,
        "--quick",
        "--tasks",
        "digits,MNIST",
        "--only",
        "cg,identity",
        "--json",
        "figures.jsonl",
    )
    assert done.returncode == 0, done.stderr
    assert "MNIST: skipped, --data names no folder" in done.stdout
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["exact", "cg", "identity"]
    assert {line.count("|") for line in table} == {8}
    (record,) = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    exact, cg, identity = record["rows"]
    assert (record["name"], record["n_params"], record["n_train"], record["n_test"]) == ("digits", 2410, 1500, 4)
    assert exact["spearman_lowest"] == pytest.approx(1)
    assert exact["relative_error"] == 0
    assert exact["largest_residual"] < 1e-9
    assert cg["largest_residual"] <= 1e-4
    assert cg["spearman_lowest"] > 0.999
    assert cg["relative_error"] < 1e-2
    assert cg["loo_pearson"] == pytest.approx(exact["loo_pearson"], abs=1e-2)
    assert identity["spearman_median"] < 0.9
    for row in record["rows"]:
        assert row["seconds"] > 0
        assert all(-1 <= row[name] <= 1 for name in ("loo_pearson", "lds", "spearman_lowest", "spearman_median"))
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]


@pytest.mark.parametrize("wrong", [["--tasks", "letters"], ["--only", "fast"], ["--damping", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, tmp_path):
    code, said = refused("compare_solvers", tmp_path, *wrong)
    assert code == 2
    assert wrong[0] in said
    assert not list(tmp_path.iterdir())


def images_of(folder, count):
    """A small test set in MNIST's format; the images as they were written, and their labels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 3]) + np.array(images.shape, ">i4").tobytes() + images.tobytes())
    )
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 1]) + np.array(labels.shape, ">i4").tobytes() + labels.tobytes())
    )
    return images, labels


def test_without_a_training_set_both_ends_of_the_test_set_are_taken(pictures, tmp_path):
    images, labels = images_of(tmp_path, 30)
    task = pictures.pictures("MNIST", tmp_path, 20, 5)
    assert (len(task.train), len(task.test)) == (20, 5)
    (first, label), (last, other) = task.train[0], task.test[4]
    assert first.shape == (1, 28, 28)
    assert np.allclose((first.numpy()[0] + 1) * 127.5, images[0], atol=1e-3)
    assert np.allclose((last.numpy()[0] + 1) * 127.5, images[29], atol=1e-3)
    assert (int(label), int(other)) == (labels[0], labels[29])
    with pytest.raises(pictures.NoPictures, match=r"no cifar10_jpeg\.npz or cifar-10-batches-py"):
        pictures.pictures("CIFAR-10", tmp_path, 20, 5)


def test_retraining_on_all_samples_gives_the_model_back_and_on_some_another(pictures, tmp_path):
    images_of(tmp_path, 30)
    task = pictures.pictures("MNIST", tmp_path, 20, 5)
    keep = torch.ones(20, dtype=torch.bool)
    state = torch.get_rng_state()
    for one, other in zip(task.model.parameters(), task.retrain(keep).parameters(), strict=True):
        assert torch.equal(one, other)
    keep[3] = False
    assert any(
        not torch.equal(one, other)
        for one, other in zip(task.model.parameters(), task.retrain(keep).parameters(), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
