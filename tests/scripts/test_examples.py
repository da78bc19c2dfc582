"""Every example runs by the command it names, on small files made here, and what it says of the data is true."""

import ast
import contextlib
import gzip
import io
import pickle
import shlex

import numpy as np
import pytest
import torch

from infl_cache import Run, load_task
from infl_cache.__main__ import main
from tests.scripts.running import ROOT

EXAMPLES = ("digits", "cifar10", "mnist", "sentiment", "diabetes", "capitals")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in, where scripts import one another."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(line):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(shlex.split(line)) == 0
    return out.getvalue()


def finished(example, options="", **arguments):
    """The run of an example from its command line, and its task; the task is the same each time it is loaded."""
    task = f"{ROOT / 'scripts' / example}.py:{example}"
    words = " ".join(f"--task-args.{name} {value}" for name, value in arguments.items())
    out = called(f"run --task {task} --run runs/{example} --no-progress {words} {options}")
    assert "test sample" in out
    loaded = load_task(task, arguments)
    return Run(f"runs/{example}", loaded, progress=False), loaded


def suspects(run, count):
    """The training samples of largest self-influence; the task of the command line is the one loaded here, too."""
    run.self_influence()
    return set(run.suspects(count).ids.tolist())


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_it_is_run(name):
    text = (ROOT / "scripts" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    lines = ast.get_docstring(ast.parse(text)).splitlines()
    assert any(line.startswith(f"infl-cache run --task scripts/{name}.py:{name} ") for line in lines)


def test_sentiment_finds_the_labels_that_were_turned(here):
    run, task = finished("sentiment", "--test 0:3 --solver fisher", epochs=20)
    import sentiment

    wrong = set(sentiment.turned())
    assert len(wrong) == 20
    assert len(suspects(run, 20) & wrong) >= 8, "chance would find one"
    texts, _ = sentiment.sentences(500)
    assert [task.render(task.train[i]) for i in range(5)] == texts[:5]
    with torch.no_grad():
        said = task.model(torch.stack([words for words, _ in task.test])).argmax(1)
    assert (said == torch.tensor([int(label) for _, label in task.test])).float().mean() > 0.8


def test_diabetes_tells_what_leaving_a_patient_out_does(here):
    run, task = finished("diabetes", "--test 0:6 --solver exact --damping 1e-4")
    assert list(task.render(task.train[0]))[:3] == ["age", "sex", "bmi"]
    found = run.validate(test=[0, 3, 5], points=10)
    assert found.pearson > 0.99
    large = abs(found.actual) > 1e-4
    assert large.sum() >= 10
    assert (np.sign(found.actual) == np.sign(found.predicted))[large].all()


def test_diabetes_has_a_network_too(here):
    run, task = finished("diabetes", "--test 0:3 --solver fisher", width=4)
    assert sum(each.numel() for each in task.model.parameters()) == 49
    assert np.isfinite(run.scores()[:3]).all()


def test_capitals_says_where_a_fact_was_read(here):
    run, task = finished("capitals")
    assert task.render(task.test[0]) == "the capital of peru is lima"
    for k in range(8):
        assert run.helpful(k, k=1).ids[0] in (2 * k, 2 * k + 1)
    both = [set(run.helpful(k, k=2).ids.tolist()) == {2 * k, 2 * k + 1} for k in range(8)]
    assert sum(both) >= 5


def patterned(count, shape, classes, seed):
    """Bytes of a pattern for each class with noise, and the labels."""
    kinds = np.random.default_rng(7).integers(0, 256, (classes, *shape))
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return np.clip(kinds[labels] * 0.5 + random.integers(0, 128, (count, *shape)), 0, 255).astype(np.uint8), labels


def with_wrong(labels, wrong, classes):
    turned = labels.copy()
    turned[wrong] = (turned[wrong] + 1) % classes
    return turned.astype(np.uint8)


def write_idx(file, values):
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    file.write_bytes(gzip.compress(head + values.tobytes()))


def test_mnist_with_nothing_but_its_test_files(here):
    images, labels = patterned(100, (28, 28), 4, 1)
    wrong = [5, 30, 57]
    write_idx(here / "t10k-images-idx3-ubyte.gz", images)
    write_idx(here / "t10k-labels-idx1-ubyte.gz", with_wrong(labels, wrong, 4))
    run, task = finished("mnist", "--solver fisher", data=here, n_train=80, n_test=10, epochs=4)
    assert (len(task.train), len(task.test)) == (80, 10)
    assert int(task.test[9][1]) == labels[99]
    assert suspects(run, 6) >= set(wrong)
    write_idx(here / "train-images-idx3-ubyte.gz", images[:30])
    write_idx(here / "train-labels-idx1-ubyte.gz", labels[:30].astype(np.uint8))
    import image_files

    assert np.array_equal(image_files.mnist(here, "train", 30)[0][:, 0], images[:30])
    assert np.array_equal(image_files.mnist(here, "test", 7)[0][:, 0], images[:7])
    with pytest.raises(image_files.NoPictures, match=r"expected 31 images and labels in .*, found 30"):
        image_files.mnist(here, "train", 31)


def test_cifar10_in_its_binary_version(here):
    train, test = patterned(60, (3, 32, 32), 3, 1), patterned(6, (3, 32, 32), 3, 2)
    wrong = [4, 21]
    for name, images, labels in (
        ("data_batch_1", train[0][:40], with_wrong(train[1], wrong, 3)[:40]),
        ("data_batch_2", train[0][40:], train[1][40:]),
        ("test_batch", *test),
    ):
        rows = np.concatenate((labels[:, None].astype(np.uint8), images.reshape(len(images), -1)), 1)
        (here / f"{name}.bin").write_bytes(rows.tobytes())
    sizes = {"data": here, "n_train": 60, "n_test": 6, "epochs": 6, "width": 4}
    run, task = finished("cifar10", "--solver fisher", **sizes)
    assert np.allclose((task.train[50][0].numpy() + 1) * 127.5, train[0][50], atol=1e-3)
    assert suspects(run, 6) >= set(wrong)
    (kept,) = (here / "runs/weights").iterdir()
    kept.unlink()
    again = load_task(f"{ROOT / 'scripts/cifar10.py'}:cifar10", sizes).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar10_of_the_version_for_python_is_read_without_running_it(scripts, tmp_path, protocol):
    images, labels = patterned(12, (3, 32, 32), 10, 3)
    batch = {b"batch_label": b"training batch 1 of 5", b"labels": labels.tolist(), b"data": images.reshape(12, -1)}
    batch[b"filenames"] = [b"a.png"] * 12
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol))
    files = scripts("image_files")
    for split in ("train", "test"):
        found = files.cifar10(tmp_path, split, 12)
        assert np.array_equal(found[0], images)
        assert np.array_equal(found[1], labels)
    with pytest.raises(files.NoPictures, match=r"expected data_batch_1\.bin or data_batch_1 in .*, found neither"):
        files.cifar10(tmp_path / "cifar-10-batches-py" / "x", "train", 1)


def test_weights_are_made_once_and_belong_to_their_data_and_settings(scripts, here):
    training = scripts("training")
    data = torch.utils.data.TensorDataset(torch.arange(6.0)[:, None], torch.arange(6.0)[:, None])

    def weights(epochs, samples=data):
        def loss(model, batch):
            return (model(batch[0]) - batch[1]).square().mean()

        return training.trained(lambda: torch.nn.Linear(1, 1), samples, loss, epochs, keep="line").weight

    first = weights(3)
    (file,) = (here / "runs/weights").iterdir()
    before = file.stat().st_mtime_ns
    assert torch.equal(first, weights(3))
    assert file.stat().st_mtime_ns == before
    assert not torch.equal(first, weights(4))
    other = torch.utils.data.TensorDataset(torch.arange(6.0)[:, None], torch.ones(6, 1))
    assert not torch.equal(first, weights(3, other))
    assert len(list((here / "runs/weights").iterdir())) == 3
