"""How other libraries put unprojected gradients of training samples on disk, each by its own means.

A cache is a function of a workload, an empty folder, and how many samples in batches of which size.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer import Peer
from torch import Tensor, nn
from workloads import Workload


def batches(workload: Workload, count: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `count` training samples in batches."""
    x, y = (tensor[:count] for tensor in workload.train.tensors)
    yield from zip(x.split(size), y.split(size), strict=True)


class _SampleLoss:
    """What TRAK is to differentiate: the loss of one sample."""

    def __init__(self, workload: Workload) -> None:
        self.loss = workload.loss

    def get_output(self, model: nn.Module, weights: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        """The loss at `weights`."""
        return self.loss(torch.func.functional_call(model, (weights, buffers), (x[None],)), y[None])[0]

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> Tensor:
        """The derivative of the loss by what `get_output` gives, which is the loss."""
        return torch.ones(len(batch[-1]), 1)


def trak(workload: Workload, folder: Path, count: int, size: int, half: bool) -> None:
    """TRAK with the projector that does nothing: a memory map, float16 by default."""
    library, projectors = importlib.import_module("trak"), importlib.import_module("trak.projectors")
    for name in ("TRAK", "STORE"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    model = copy.deepcopy(workload.model)
    tracer = library.TRAKer(
        model=model,
        task=_SampleLoss(workload),
        train_set_size=count,
        save_dir=str(folder),
        device="cpu",
        projector=projectors.NoOpProjector(grad_dim=workload.n_params, proj_dim=0, device="cpu"),
        use_half_precision=half,
        logging_level=logging.CRITICAL,
    )
    tracer.load_checkpoint({name: value.clone() for name, value in model.state_dict().items()}, model_id=0)
    for x, y in batches(workload, count, size):
        tracer.featurize((x, y), num_samples=len(x))
    tracer.saver.current_store["grads"].flush()


def pydvl(workload: Workload, folder: Path, count: int, size: int) -> None:
    """pyDVL's gradients through pyDVL's writer of Zarr arrays."""
    base = importlib.import_module("pydvl.influence.torch.base")
    array = importlib.import_module("pydvl.influence.array")
    tools = importlib.import_module("pydvl.influence.torch.util")
    model = copy.deepcopy(workload.model)

    def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return workload.loss(outputs, targets).mean()

    values = {name: value.detach() for name, value in model.named_parameters()}
    provider = base.TorchGradientProvider(model, mean_loss, values)

    def rows() -> Iterator[Tensor]:
        for x, y in batches(workload, count, size):
            yield provider.flat_grads(base.TorchBatch(x, y))

    array.LazyChunkSequence(rows).to_zarr(str(folder / "gradients"), tools.TorchNumpyConverter())


def logix(workload: Workload, folder: Path, count: int, size: int) -> None:
    """LogIX's log of gradients: memory maps in chunks; weights of linear layers and convolutions only."""
    config = folder / "config.yaml"
    config.write_text(json.dumps({"root_dir": str(folder / "log"), "logging": {"flush_threshold": 50_000_000}}))
    run = importlib.import_module("logix").LogIX(project="bench", config=str(config))
    model = copy.deepcopy(workload.model)
    run.watch(model)
    run.setup({"grad": ["log"]})
    run.save(True)
    done = 0
    for x, y in batches(workload, count, size):
        with run(data_id=[str(number) for number in range(done, done + len(x))]):
            model.zero_grad(set_to_none=True)
            workload.loss(model(x), y).sum().backward()
        done += len(x)
    run.finalize()


class AsSequence(nn.Module):
    """An MLP that takes its input for a sequence of one position, as bergson's hooks want it."""

    device = torch.device("cpu")

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (B, D) to outputs (B, C)."""
        outputs: Tensor = self.inner(x[:, None, :])[:, 0]
        return outputs


def bergson(workload: Workload, folder: Path, count: int, size: int) -> None:
    """bergson's index: one float32 memory map; MLPs only."""
    bergson_index(workload, folder, count, size)


def bergson_index(workload: Workload, folder: Path, count: int, size: int) -> tuple[Any, Any]:
    """Write the index; its collector and its configuration, which knows where it lies."""
    if workload.name != "W1":
        raise NotImplementedError("its hooks take sequences, not images")
    library, datasets = importlib.import_module("bergson"), importlib.import_module("datasets")
    model = AsSequence(copy.deepcopy(workload.model))
    config = library.IndexConfig(run_path=str(folder / "index"), include_bias=True)
    collector = library.GradientCollector(
        model=model,
        cfg=config,
        data=datasets.Dataset.from_dict({"input_ids": [[1]] * count, "length": [1] * count}),
        processor=library.GradientProcessor(include_bias=True, projection_dim=None),
    )
    done = 0
    for x, y in batches(workload, count, size):
        with collector.with_batch(None):
            losses = workload.loss(model(x), y)
            losses.sum().backward()
            model.zero_grad(set_to_none=True)
            collector.process_batch(list(range(done, done + len(x))), losses=losses.detach())
        done += len(x)
    collector.teardown()
    return collector, config


PEERS = (
    Peer("trak16", "TRAK, float16", "trak", "traker", partial(trak, half=True)),
    Peer("trak32", "TRAK, float32", "trak", "traker", partial(trak, half=False)),
    Peer("pydvl", "pyDVL", "pydvl", "pyDVL", pydvl),
    Peer("logix", "LogIX (weights only)", "logix", "logix-ai", logix),
    Peer("bergson", "bergson", "bergson", "bergson", bergson),
)
