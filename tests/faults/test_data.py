"""What user's data and code may do: draw anew, raise, die, run out of memory, give NaN; and what becomes of the run."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from infl_cache import Run
from infl_cache.__main__ import main
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, ForeignRun, InflCacheError
from infl_cache.maths.frozen import Frozen
from tests.faults import times
from tests.faults.data import N_TEST, N_TRAIN, Listed, changed, contents, die, loss, small_task

OPTIONS = {"solver": "exact", "damping": 0.1, "progress": False, "block_rows": 6, "test_block_rows": 2, "batch_size": 3}
# Of the batches that a model was given.
SIZES = []


class Augmented(Listed):
    """Noise of the three global generators is added to each sample."""

    def __getitem__(self, index):
        noise = torch.rand(4).double() + float(np.random.rand()) + random.random()  # noqa: NPY002
        inputs, target = super().__getitem__(index)
        return inputs + 0.1 * noise, target


class OwnGenerator(Listed):
    """It draws from a generator of its own."""

    def __init__(self, *given):
        super().__init__(*given)
        self.generator = np.random.default_rng(0)

    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return inputs + self.generator.random(), target


class Shuffled(Listed):
    """Another sample at each access."""

    def __getitem__(self, index):
        return super().__getitem__(random.randrange(len(self)))


class AlwaysDropping(nn.Module):
    """Dropout that eval mode does not switch off."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, inputs):
        return self.linear(nn.functional.dropout(inputs, 0.5, training=True))


class OverTheBatch(nn.Module):
    """What a sample gives depends on the others of its batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, inputs):
        return self.linear(inputs - inputs.mean(0))


def over(kind, name="train"):
    """The small task with its data of another kind."""
    data = getattr(small_task(), name)
    return small_task(**{name: kind(data.inputs, data.targets)})


REFUSED = {
    "augmented": (lambda: over(Augmented), r"train\[\d+\]: .*--freeze-augmentation"),
    "test augmented": (lambda: over(Augmented, "test"), r"test\[\d+\]: .*--freeze-augmentation"),
    "shuffled": (lambda: over(Shuffled), r"train\[\d+\]: .*--freeze-augmentation"),
    "dropout": (lambda: small_task(model=AlwaysDropping()), r"train\[\d+\]: .*dropout"),
    "the batch": (lambda: small_task(model=OverTheBatch()), r"train\[\d+\]: .*depend on the other samples"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_data_and_models_that_change_are_refused_with_the_sample_and_leave_no_trace(what, tmp_path):
    make, named = REFUSED[what]
    with pytest.raises(BadInput, match=named):
        Run(tmp_path / "run", make(), **OPTIONS).all()
    stores = [path.name for path in (tmp_path / "run").glob("*.zarr")]
    assert stores == (["grad_z.zarr"] if what == "test augmented" else [])


def iterable():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    return Stream()


@pytest.mark.parametrize("make", [iterable, lambda: iter(range(3)), lambda: torch.utils.data.DataLoader([1, 2])])
@pytest.mark.parametrize("name", ["train", "test"])
def test_what_is_not_addressed_by_index_is_refused(make, name):
    with pytest.raises(BadInput, match=rf"{name}: expected"):
        small_task(**{name: make()})


def test_frozen_augmentation_runs_resumes_and_is_told_apart(tmp_path, caplog):
    task = small_task(**{name: getattr(over(Augmented, name), name) for name in ("train", "test")})
    options = {**OPTIONS, "freeze_augmentation": True}
    run = Run(tmp_path / "run", task, **options)
    run.all()
    assert caplog.text.count("augmentation is frozen") == 1
    assert [result.computed for result in Run(run.path, task, **options, check_data="full").all()] == [0, 0, 0]
    with_workers = Run(tmp_path / "workers", task, **{**options, "workers": 2, "batch_size": 2})
    with_workers.all()
    np.testing.assert_allclose(with_workers.scores(), run.scores(), rtol=1e-12)
    # What was drawn is what is explained: the same numbers from data that hold these draws.
    held = {}
    for name in ("train", "test"):
        samples = [Frozen(getattr(task, name), name)[index] for index in range(len(getattr(task, name)))]
        held[name] = Listed(torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))
    plain = Run(tmp_path / "plain", small_task(**held), **OPTIONS)
    plain.all()
    np.testing.assert_array_equal(plain.scores(), run.scores())
    before = contents(run.path)
    with pytest.raises((ForeignRun, BadInput)):
        Run(run.path, small_task(), **OPTIONS).stest()
    with pytest.raises(BadInput, match="--freeze-augmentation"):
        Run(run.path, task, **{**OPTIONS, "freeze_augmentation": False}).stest()
    assert contents(run.path) == before
    assert Run(run.path, task).helpful(0, 1).ids.shape == (1,)  # it knows by itself that they are frozen
    with pytest.raises(BadInput, match="generators of its own"):
        Run(tmp_path / "own", over(OwnGenerator), **options).grads()


ARMED = "INFL_CACHE_TEST_ARMED"


@pytest.fixture
def armed(monkeypatch):
    """Once what a stage tries beforehand is over the environment names it; call it to have that end."""

    def names(door):
        original = getattr(RunFolder, door)

        def opened(self, stage, *given):
            if (stage == "stest") == (door == "commit"):
                monkeypatch.setenv(ARMED, stage)
            return original(self, stage, *given)

        monkeypatch.setattr(RunFolder, door, opened)

    names("begin_store")
    names("commit")
    return lambda: monkeypatch.undo()


def raising(name):
    """The small task whose part `name` raises at a sample of the third block once a block is there."""
    stage, place = ("stest", 5) if name == "measure" else ("grads", 14)
    base = small_task()
    mark = (base.test if name == "measure" else base.train).inputs[place]

    def fail():
        if os.environ.get(ARMED) == stage:
            raise ZeroDivisionError("the user's own")

    def unless_marked(inputs, value):
        if any(torch.equal(row, mark) for row in inputs):
            fail()
        return value

    def batches(changes):
        return {"targets": lambda batch: batch, "loss": lambda out, batch: loss(out, batch[1]), **changes}

    made = {
        "dataset": {"train": changed(base.train, at={place: fail})},
        "collate": {"collate": lambda samples: unless_marked([x for x, _ in samples], default_collate(samples))},
        "forward": {"forward": lambda model, batch: unless_marked(batch[0], model(batch[0]))},
        "loss": batches({"loss": lambda out, batch: unless_marked(batch[0], loss(out, batch[1]))}),
        "measure": batches({"measure": lambda out, batch: unless_marked(batch[0], loss(out, batch[1]))}),
    }
    return small_task(**made[name]), stage, place


@pytest.mark.parametrize("name", ["dataset", "collate", "forward", "loss", "measure"])
def test_an_exception_of_the_users_code_is_one_message_with_sample_and_traceback(name, armed, tmp_path):
    task, stage, place = raising(name)
    run = Run(tmp_path / "run", task, **OPTIONS)
    with pytest.raises(BadInput) as found:
        run.all()
    said, size = str(found.value), 2 if name == "measure" else 3
    assert "ZeroDivisionError: the user's own" in said
    assert said.count("Traceback") == (0 if name == "collate" else 1)
    first = place - place % size
    assert (f"[{place}]" if name == "dataset" else f"samples {first} to {first + size - 1}") in said
    assert len(run.folder.done(stage)) == 2
    armed()  # the user mends it
    assert run.all()[0].computed == (0 if name == "measure" else N_TRAIN - 12)
    calm = Run(tmp_path / "calm", small_task(), **OPTIONS)
    calm.all()
    np.testing.assert_array_equal(run.scores(), calm.scores())


@pytest.mark.parametrize("place", [0, 13, N_TRAIN - 1][: times(2, 3)])
def test_a_worker_process_that_dies_is_said_and_the_run_goes_on_without(place, tmp_path):
    task = small_task(train=changed(small_task().train, at={place: die}))
    run = Run(tmp_path / "run", task, **OPTIONS, workers=2)
    with pytest.raises(BadInput, match="a process that loads samples died"):
        run.grads()
    before = len(run.folder.done("grads"))
    assert before <= place // OPTIONS["block_rows"]
    again = Run(run.path, task, **OPTIONS)
    assert again.grads().computed == N_TRAIN - before * OPTIONS["block_rows"]
    calm = Run(tmp_path / "calm", small_task(), **OPTIONS)
    calm.grads()
    np.testing.assert_array_equal(again.grad_z(slice(None)), calm.grad_z(slice(None)))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_goes_on_with_half_the_batch_and_the_same_numbers(kind, armed, tmp_path, caplog):
    def forward(model, batch):
        SIZES.append(len(batch[0]))
        if os.environ.get(ARMED) and len(batch[0]) > 2:
            raise kind("out of memory, it is said")
        return model(batch[0])

    run = Run(tmp_path / "run", small_task(forward=forward), **{**OPTIONS, "batch_size": 6})
    run.grads()
    assert SIZES[-1] == 1
    assert "out of memory, going on with batches of 3 samples" in caplog.text
    assert "going on with batches of 1 samples" in caplog.text
    armed()
    calm = Run(tmp_path / "calm", small_task(forward=forward), **{**OPTIONS, "batch_size": 6})
    calm.grads()
    np.testing.assert_allclose(run.grad_z(slice(None)), calm.grad_z(slice(None)), rtol=1e-13, atol=1e-16)


def with_nonfinite(where):
    """The small task where some samples give NaN or Inf."""
    base = small_task()
    if where == "measure":
        mark = base.test.inputs[3]

        def measure(outputs, batch):
            found = loss(outputs, batch[1])
            return found * torch.where((batch[0] == mark).all(1), torch.inf, 1.0)

        return small_task(
            targets=lambda batch: batch, loss=lambda out, batch: loss(out, batch[1]), measure=measure
        )  # fmt: skip
    inputs = base.train.inputs.clone()
    inputs[[4, 17]] = torch.nan if where == "gradient" else torch.inf
    return small_task(train=Listed(inputs, base.train.targets))


@pytest.mark.parametrize("where", ["gradient", "loss", "measure"])
def test_what_is_not_finite_stops_with_its_samples_or_is_left_out(where, tmp_path, capsys):
    run = Run(tmp_path / "run", with_nonfinite(where), **OPTIONS)
    with pytest.raises(InflCacheError, match="test samples 3" if where == "measure" else "train samples 4"):
        run.all()
    run = Run(run.path, with_nonfinite(where), **OPTIONS, nonfinite="skip", by_layer=True)
    run.all()
    scores = run.scores()
    bad = np.zeros((N_TEST, N_TRAIN), bool)
    if where == "measure":
        bad[3] = True
    else:
        bad[:, [4, 17]] = True
    np.testing.assert_array_equal(np.isnan(scores), bad)
    np.testing.assert_array_equal(np.isnan(next(iter(run.by_layer().values()))), bad)
    kept = {0, 1, 2, 4, 5} if where == "measure" else set(range(N_TEST))
    for test in kept:
        ranked = {*run.helpful(test, N_TRAIN).ids.tolist(), *run.harmful(test, N_TRAIN).ids.tolist()}
        assert ranked == set(range(N_TRAIN)) - (set() if where == "measure" else {4, 17})
    if where != "measure":
        run.self_influence()
        assert not {4, 17} & set(run.suspects(N_TRAIN).ids.tolist())
    assert main(["status", str(run.path)]) == 0
    assert "finite" in capsys.readouterr().out
    assert main(["verify", str(run.path)]) == 0
