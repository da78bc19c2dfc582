import numpy as np
import pytest
import torch

from infl_cache import BadInput, DamagedStore, ForeignRun, Run, Task
from infl_cache.maths.capture import capture
from infl_cache.stages import blocks as stage
from tests import tasks
from tests.tasks import TASKS, Samples, classified, normal
from tests.twins import gradient_rows

QUIET = {"progress": False}


@pytest.mark.parametrize("form", ["auto", "dense"])
@pytest.mark.parametrize("name", sorted(TASKS))
def test_stored_rows_equal_a_loop_of_autograd(name, form, tmp_path):
    task = TASKS[name]()
    run = Run(tmp_path / "run", task, form=form, block_rows=4, batch_size=3, **QUIET)
    run.grads()
    expected = gradient_rows(task, range(len(task.train))).numpy()
    assert np.abs(run.grad_z(slice(None)) - expected).max() <= 1e-12 * np.abs(expected).max()
    assert np.array_equal(run.grad_z([7, 2]), run.grad_z(slice(None))[[7, 2]])
    assert np.array_equal(run.grad_z(3), run.grad_z([3])[0])


def test_linear_layers_are_stored_as_factors_where_that_is_smaller_and_as_one_array_with_form_dense(tmp_path):
    task = classified(
        tasks.built(lambda: torch.nn.Linear(40, 30), torch.float32), normal(14, 40).float(), 10, classes=30
    )
    factored, dense = Run(tmp_path / "a", task, **QUIET), Run(tmp_path / "b", task, form="dense", **QUIET)
    factored.grads(), dense.grads()
    root = (tmp_path / "a" / "grad_z.zarr").glob("*/*/zarr.json")
    assert {p.parent.name for p in root} == {"input", "output_grad"}
    assert not (tmp_path / "a" / "grad_z.zarr" / "dense").exists()
    zarr = pytest.importorskip("zarr")
    rows = zarr.open_group(tmp_path / "b" / "grad_z.zarr", mode="r")["dense"][:]
    assert rows.shape == (10, 1230)
    assert np.allclose(rows, factored.grad_z(slice(None)), rtol=1e-5, atol=1e-7)


def test_a_finished_stage_computes_nothing_again(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET)
    assert run.grads().computed == 10

    def forbidden(*_, **__):
        raise AssertionError("a finished stage captured gradients")

    monkeypatch.setattr(stage, "capture", forbidden)
    assert run.grads().computed == 0


def test_a_stage_stopped_by_an_error_keeps_its_blocks_and_does_the_rest(tmp_path, monkeypatch):
    seen = []

    def failing(task, forms, batch, measure=False):
        if len(seen) == 2:
            raise RuntimeError("the lights went out")
        seen.append(list(batch.indices))
        return capture(task, forms, batch, measure)

    monkeypatch.setattr(stage, "capture", failing)
    with pytest.raises(RuntimeError, match="lights"):
        Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET).grads()
    monkeypatch.setattr(stage, "capture", capture)
    assert Run(tmp_path / "run", tasks.mlp(), **QUIET).grads().computed == 2
    Run(tmp_path / "calm", tasks.mlp(), block_rows=4, **QUIET).grads()
    for file in sorted((tmp_path / "calm" / "grad_z.zarr").rglob("*")):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "run" / file.relative_to(tmp_path / "calm")).read_bytes()


def test_results_do_not_depend_on_block_batch_or_workers(tmp_path):
    task = tasks.attention(torch.float32, n_train=23)
    first = Run(tmp_path / "a", task, **QUIET)
    first.grads()
    rows = first.grad_z(slice(None))
    for number, options in enumerate(
        ({"block_rows": 5}, {"batch_size": 1}, {"block_rows": 7, "batch_size": 3, "workers": 2})
    ):
        other = Run(tmp_path / f"b{number}", task, **options, **QUIET)
        other.grads()
        assert np.linalg.norm(other.grad_z(slice(None)) - rows) <= 1e-6 * np.linalg.norm(rows)


def test_loss_target_and_digest_are_kept_per_sample(tmp_path):
    task = tasks.mlp()
    run = Run(tmp_path / "run", task, **QUIET)
    run.grads()
    block = run.folder.store("grads").read_block(run.folder.stage_blocks("grads")[0], ["loss", "target", "digest"])
    batch = task.collate([task.train[i] for i in range(10)])
    assert np.allclose(block["loss"], task.loss(task.model.eval()(batch[0]), batch[1]).detach())
    assert np.array_equal(block["target"], batch[1])
    assert len(set(block["digest"].tolist())) == 10


def test_a_gradient_that_is_not_finite_stops_the_stage_and_is_named(tmp_path):
    task = tasks.logistic()
    task.train.tensors[0][6] = torch.inf
    with pytest.raises(BadInput, match=r"NaN or Inf at train samples 6; .*--nonfinite skip"):
        Run(tmp_path / "run", task, block_rows=4, **QUIET).grads()
    run = Run(tmp_path / "run", task, nonfinite="skip", block_rows=4, damping=0.1, **QUIET)
    assert run.grads().computed == 6  # the first block was committed before the stop
    assert run.folder.records("grads")[1].bad_rows == (6,)


@pytest.mark.parametrize("index", [0, 13, 26, 39])
def test_a_changed_sample_is_noticed_and_named_on_resuming(index, tmp_path):
    task = tasks.logistic(n_train=40)
    Run(tmp_path / "run", task, block_rows=10, **QUIET).grads()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    task.train.tensors[0][index, 0] += 1e-3
    with pytest.raises(ForeignRun, match=rf"train\[{index}\]|train: expected"):
        Run(tmp_path / "run", task, **QUIET).grads()
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_other_weights_options_or_loss_are_refused_field_by_field(tmp_path):
    Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()
    other = tasks.mlp()
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-6
    with pytest.raises(ForeignRun, match=r"weights: expected '\w+', found '\w+'\. Use another --run"):
        Run(tmp_path / "run", other, **QUIET).grads()
    with pytest.raises(ForeignRun, match=r"form: expected 'auto', found 'dense'"):
        Run(tmp_path / "run", tasks.mlp(), form="dense", **QUIET).grads()
    with pytest.raises(ForeignRun, match="loss: expected"):
        Run(
            tmp_path / "run", tasks.mlp(loss=lambda outputs, targets: tasks.cross_entropy(outputs, targets) * 2)
        ).grads()


def test_batch_workers_memory_and_device_are_not_identity(tmp_path):
    Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET).grads()
    again = Run(
        tmp_path / "run", tasks.mlp(), batch_size=2, workers=1, memory="1GB", device="cpu", block_rows=5, **QUIET
    )
    assert again.grads().computed == 0


def test_force_starts_over_with_other_options(tmp_path):
    Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()
    run = Run(tmp_path / "run", tasks.mlp(), form="dense", **QUIET)
    assert run.grads(force=True).computed == 10
    assert (tmp_path / "run" / "grad_z.zarr" / "dense").is_dir()


@pytest.mark.parametrize("damage", ["truncate", "delete", "flip the checksum"])
def test_a_damaged_chunk_stops_the_stage_and_is_named(damage, tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET)
    run.grads()
    file = tmp_path / "run" / "grad_z.zarr" / "loss" / "c.1"
    data = file.read_bytes()
    file.unlink()
    if damage != "delete":
        file.write_bytes(data[:5] if damage == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedStore, match=r"loss/c\.1 \(rows 4 to 7\): expected \d+ bytes"):
        Run(tmp_path / "run", tasks.mlp(), **QUIET).grads()


def test_a_layer_without_a_rule_is_reported_once(tmp_path, caplog):
    result = Run(tmp_path / "run", tasks.reused(), **QUIET).grads()
    assert any("inner" in note and "vmap" in note for note in result.notes)
    assert "inner" in caplog.text


def test_refused_data_leave_no_trace(tmp_path):
    class Noisy(Samples):
        def __getitem__(self, index):
            return torch.randn(5), 0

    with pytest.raises(BadInput, match=r"train\[0\]: expected the same sample each time"):
        Run(tmp_path / "run", tasks.logistic(train=Noisy([0] * 5)), **QUIET).grads()
    assert [p.name for p in (tmp_path / "run").glob("*") if not p.name.startswith(".lock")] == []
    Run(tmp_path / "run", tasks.logistic(), **QUIET).grads()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("chapter 1")
    with pytest.raises(BadInput, match="expected a run folder or an empty one, found other files"):
        Run(tmp_path, tasks.mlp(), **QUIET).grads()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


class Bag(torch.nn.Module):
    """The sum over the real positions of padded sequences."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = torch.nn.Linear(20, 30), torch.nn.Linear(30, 3)

    def forward(self, x):
        real = (x.abs().sum(-1, keepdim=True) > 0).to(x.dtype)
        return self.head((torch.tanh(self.inner(x)) * real).sum(1))


def bag_of(lengths):
    samples = [(normal(length, 20, seed=i), torch.tensor(i % 3)) for i, length in enumerate(lengths)]

    def collate(samples):
        return torch.nn.utils.rnn.pad_sequence([x for x, _ in samples], True), torch.stack([y for _, y in samples])

    model = tasks.built(Bag, torch.float64)
    return Task(
        model=model, train=Samples(samples), test=Samples(samples[:2]), loss=tasks.cross_entropy, collate=collate
    )


def test_samples_of_different_lengths_are_stored_as_rows(tmp_path):
    task = bag_of([3, 5, 2, 4] * 10)
    run = Run(tmp_path / "run", task, batch_size=3, **QUIET)
    assert "layer 'inner' sees samples of different lengths" in " ".join(run.grads().notes)
    expected = gradient_rows(task, range(40)).numpy()
    assert np.abs(run.grad_z(slice(None)) - expected).max() <= 1e-12 * np.abs(expected).max()


def test_a_longer_sample_than_all_that_were_tried_is_named(tmp_path):
    task = bag_of([3] * 50 + [5] + [3] * 39)
    with pytest.raises(BadInput, match=r"layer 'inner': .* at samples 50 to 50; pad to one length .* --form dense"):
        Run(tmp_path / "run", task, batch_size=1, **QUIET).grads()
