"""Other libraries' influences, where they are installed: scores with what they keep, and whole jobs.

A scorer is prepared outside the clock and gives a function of nothing to scores (tests, samples); a job is a function
of a workload, an empty folder, and how many training samples, each by the library's own means.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import Peer, silent
from peer_caches import AsSequence, batches, bergson_index
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload

DAMPING = 0.01
# One recursion for every LiSSA: steps, training samples of a step, and the scale that divides each.
DEPTH, SAMPLE_BATCH, SCALE = 100, 64, 100.0
FIT_BATCH, TRAIN_BATCH = 256, 16

Score = Callable[[], Any]


def sets(workload: Workload, count: int) -> tuple[TensorDataset, TensorDataset]:
    """The first `count` training samples, and all test samples."""
    return TensorDataset(*(tensor[:count] for tensor in workload.train.tensors)), workload.test


def mean_loss(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over a batch of the workload's loss."""
    return lambda outputs, targets: workload.loss(outputs, targets).mean()


# ---- kronfluence


def analyzer(workload: Workload, folder: Path) -> Any:
    """kronfluence's analyzer of a copy of the model."""
    library = importlib.import_module("kronfluence.analyzer")
    base = importlib.import_module("kronfluence.task").Task

    class Classification(base):  # type: ignore[misc, valid-type]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, targets = batch
            outputs = model(inputs)
            if sample:
                targets = torch.multinomial(outputs.detach().softmax(-1), 1).flatten()
            return workload.loss(outputs, targets).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return workload.loss(model(batch[0]), batch[1]).sum()

    model = library.prepare_model(copy.deepcopy(workload.model), Classification())
    return library.Analyzer(
        analysis_name="bench", model=model, task=Classification(), output_dir=str(folder), disable_tqdm=True,
        log_level=logging.CRITICAL,
    )  # fmt: skip


def fitted_analyzer(workload: Workload, folder: Path, count: int) -> Any:
    """kronfluence's EK-FAC of the training samples, fitted."""
    made, options = analyzer(workload, folder), importlib.import_module("kronfluence.arguments")
    made.fit_all_factors(
        factors_name="ekfac", dataset=sets(workload, count)[0], per_device_batch_size=FIT_BATCH,
        factor_args=options.FactorArguments(strategy="ekfac"), overwrite_output_dir=True,
    )  # fmt: skip
    return made


def pairwise(made: Any, workload: Workload, count: int) -> Any:
    """kronfluence's scores: training gradients are computed again."""
    options = importlib.import_module("kronfluence.arguments")
    train, test = sets(workload, count)
    made.compute_pairwise_scores(
        scores_name="scores", factors_name="ekfac", query_dataset=test, train_dataset=train,
        per_device_query_batch_size=len(test), per_device_train_batch_size=FIT_BATCH,
        score_args=options.ScoreArguments(damping_factor=DAMPING), overwrite_output_dir=True,
    )  # fmt: skip
    return made.load_pairwise_scores("scores")["all_modules"]


def kronfluence_job(workload: Workload, folder: Path, count: int) -> Any:
    """EK-FAC fitted, then all pairs."""
    return pairwise(fitted_analyzer(workload, folder, count), workload, count)


def kronfluence_scorer(workload: Workload, folder: Path, count: int) -> Score:
    """All pairs, EK-FAC fitted beforehand; the inverse applied to the test samples is part of the call."""
    made = fitted_analyzer(workload, folder, count)

    def score() -> Any:
        with silent():
            return pairwise(made, workload, count)

    return score


# ---- pyDVL


def pydvl_model(workload: Workload, count: int, depth: int | None) -> Any:
    """pyDVL's LiSSA of so many steps, or its EK-FAC with the true diagonal, fitted."""
    library, model = importlib.import_module("pydvl.influence.torch"), copy.deepcopy(workload.model)
    size = FIT_BATCH
    if depth is not None:
        size = SAMPLE_BATCH
        made = library.LissaInfluence(
            model, mean_loss(workload), regularization=DAMPING, maxiter=depth, scale=SCALE, rtol=0.0,
            warn_on_max_iteration=False,
        )  # fmt: skip
    else:
        made = library.EkfacInfluence(model, update_diagonal=True, hessian_regularization=DAMPING)
    return made.fit(DataLoader(sets(workload, count)[0], batch_size=size))


def pydvl_scores(calculator: Any, factors: Sequence[Tensor], workload: Workload, folder: Path, count: int) -> Any:
    """Scores from factors into a Zarr array; training gradients are computed again."""
    converter = importlib.import_module("pydvl.influence.torch.util").TorchNumpyConverter()
    loader = DataLoader(sets(workload, count)[0], batch_size=TRAIN_BATCH)
    lazy = calculator.influences_from_factors(factors, loader)
    return lazy.to_zarr(str(folder / "scores"), converter, return_stored=True, overwrite=True)


def pydvl_job(workload: Workload, folder: Path, count: int, depth: int | None) -> Any:
    """Fit, factors of the test samples into a Zarr array, then scores from them into another."""
    influence = importlib.import_module("pydvl.influence")
    converter = importlib.import_module("pydvl.influence.torch.util").TorchNumpyConverter()
    calculator = influence.SequentialInfluenceCalculator(pydvl_model(workload, count, depth))
    tests = DataLoader(workload.test, batch_size=len(workload.test))
    kept = calculator.influence_factors(tests).to_zarr(str(folder / "factors"), converter, return_stored=True)
    return pydvl_scores(calculator, [torch.from_numpy(np.asarray(kept[:]))], workload, folder, count)[:]


def pydvl_scorer(workload: Workload, folder: Path, count: int) -> Score:
    """Scores from factors that are in memory."""
    influence = importlib.import_module("pydvl.influence")
    calculator = influence.SequentialInfluenceCalculator(pydvl_model(workload, count, 1))
    factors = torch.randn(len(workload.test), workload.n_params, generator=torch.Generator().manual_seed(0))

    def score() -> Any:
        with silent():
            return pydvl_scores(calculator, [factors], workload, folder, count)[:]

    return score


# ---- LogIX


def logix_run(workload: Workload, folder: Path, rank: int) -> tuple[Any, nn.Module]:
    """LogIX, watching a copy of the model."""
    options = {
        "root_dir": str(folder / "log"),
        "logging": {"flush_threshold": 50_000_000},
        "lora": {"init": "random", "rank": rank},
    }
    (folder / "config.yaml").write_text(json.dumps(options))
    run = importlib.import_module("logix").LogIX(project="bench", config=str(folder / "config.yaml"))
    model = copy.deepcopy(workload.model)
    run.watch(model)
    return run, model


def logged(run: Any, model: nn.Module, workload: Workload, data: Sequence[tuple[Tensor, Tensor]], name: str) -> None:
    """Forward and backward of all batches under LogIX's eyes."""
    done = 0
    for x, y in data:
        with run(data_id=[f"{name}{number}" for number in range(done, done + len(x))]):
            model.zero_grad(set_to_none=True)
            workload.loss(model(x), y).sum().backward()
        done += len(x)


def logix_scores(run: Any, model: nn.Module, workload: Workload, size: int, damping: float | None) -> Score:
    """All scores from LogIX's log; without a damping, plain products of gradients."""
    run.save(False)
    loader = run.build_log_dataloader(batch_size=size)
    run.setup({"grad": ["log"]})
    run.eval()
    logged(run, model, workload, [workload.test.tensors], "test")
    log = run.get_log(copy=True)
    options: dict[str, Any] = {"precondition": False} if damping is None else {"damping": damping}

    def score() -> Any:
        with silent():
            return run.influence.compute_influence_all(log, loader, **options)["influence"]

    return score


def logix_job(workload: Workload, folder: Path, count: int, lora: str, hessian: str, rank: int, size: int) -> Any:
    """Gradients (projected, if `lora` says so) logged and kept, then scores from the log."""
    run, model = logix_run(workload, folder, rank)
    for _ in importlib.import_module("logix").LogIXScheduler(run, lora=lora, hessian=hessian, save="grad"):
        logged(run, model, workload, list(batches(workload, count, size)), "train")
        run.finalize()
    return logix_scores(run, model, workload, size, DAMPING)()


def logix_scorer(workload: Workload, folder: Path, count: int) -> Score:
    """Plain products with the log of unprojected gradients, weights only."""
    run, model = logix_run(workload, folder, rank=64)
    run.setup({"grad": ["log"]})
    run.save(True)
    logged(run, model, workload, list(batches(workload, count, TRAIN_BATCH)), "train")
    run.finalize()
    return logix_scores(run, model, workload, TRAIN_BATCH, None)


# ---- bergson, captum, TRAK


def bergson_scorer(workload: Workload, folder: Path, count: int) -> Score:
    """Products with bergson's index, which has been read into memory."""
    collector, config = bergson_index(workload, folder, count, TRAIN_BATCH)
    library = importlib.import_module("bergson")
    held = library.Attributor(Path(config.partial_run_path), device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: int(np.prod(shape)) for name, shape in collector.shapes().items()}
    asked = {name: torch.randn(len(workload.test), size, generator=generator) for name, size in shapes.items()}

    def score() -> Any:
        with silent():
            return held.search(asked, None)

    return score


def bergson_job(workload: Workload, folder: Path, count: int) -> Any:
    """The index, then products of the test gradients with it; no curvature at all."""
    _, config = bergson_index(workload, folder, count, TRAIN_BATCH)
    library = importlib.import_module("bergson")
    held = library.Attributor(Path(config.partial_run_path), device="cpu", dtype=torch.float32)
    model = AsSequence(copy.deepcopy(workload.model))
    x, y = workload.test.tensors
    with held.trace(model, None) as found:
        workload.loss(model(x), y).sum().backward()
    return found.scores


def captum_job(workload: Workload, folder: Path, count: int, space: int) -> Any:
    """Arnoldi's influence function, the Hessian of 200 samples; its defaults have a space of 200 dimensions."""
    module = importlib.import_module("captum.influence._core.arnoldi_influence_function")
    train, _ = sets(workload, count)
    model = copy.deepcopy(workload.model)
    checkpoint = folder / "weights.pt"
    torch.save(model.state_dict(), checkpoint)
    some = TensorDataset(*(tensor[:200] for tensor in train.tensors))
    made = module.ArnoldiInfluenceFunction(
        model, train, str(checkpoint), loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=TRAIN_BATCH,
        hessian_dataset=DataLoader(some, batch_size=200), sample_wise_grads_per_batch=True,
        projection_dim=min(50, space), arnoldi_dim=space, hessian_reg=1e-3,
    )  # fmt: skip
    return made.influence(workload.test.tensors)


def trak_job(workload: Workload, folder: Path, count: int, size: int, batch: int) -> Any:
    """TRAK with one checkpoint: random projections of gradients, float32."""
    for name in ("TRAK", "STORE"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    model = copy.deepcopy(workload.model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tracer = importlib.import_module("trak").TRAKer(
        model=model, task="image_classification", train_set_size=count, save_dir=str(folder), device="cpu",
        use_half_precision=False, logging_level=logging.CRITICAL, proj_dim=size,
    )  # fmt: skip
    tracer.load_checkpoint(weights, model_id=0)
    for x, y in batches(workload, count, batch):
        tracer.featurize((x, y), num_samples=len(x))
    tracer.finalize_features()
    tests = len(workload.test)
    tracer.start_scoring_checkpoint(exp_name="bench", checkpoint=weights, model_id=0, num_targets=tests)
    tracer.score(workload.test.tensors, num_samples=tests)
    return tracer.finalize_scores("bench")


SCORERS = (
    Peer("kronfluence", "kronfluence, gradients again", "kronfluence", "kronfluence", kronfluence_scorer, 2000),
    Peer("pydvl", "pyDVL, gradients again", "pydvl", "pyDVL", pydvl_scorer, 512),
    Peer("logix", "LogIX, from its log", "logix", "logix-ai", logix_scorer, 256),
    Peer("bergson", "bergson, index in memory", "bergson", "bergson", bergson_scorer, 512),
)


def jobs(depth: int) -> tuple[Peer, ...]:
    """Whole jobs; a recursion takes so many steps, Arnoldi's space has at most twice as many dimensions."""
    return (
        Peer("pydvl-lissa", "pyDVL, LiSSA", "pydvl", "pyDVL", partial(pydvl_job, depth=depth)),
        Peer("pydvl-ekfac", "pyDVL, EK-FAC", "pydvl", "pyDVL", partial(pydvl_job, depth=None)),
        Peer("kronfluence-ekfac", "kronfluence, EK-FAC", "kronfluence", "kronfluence", kronfluence_job),
        Peer("captum-arnoldi", "captum, Arnoldi", "captum", "captum", partial(captum_job, space=min(200, 2 * depth))),
        Peer("trak-512", "TRAK, 512 projections", "trak", "traker", partial(trak_job, size=512, batch=500)),
        Peer("trak-2048", "TRAK, 2,048 projections", "trak", "traker", partial(trak_job, size=2048, batch=1000)),
        Peer("logix-32", "LogIX, rank 32, raw", "logix", "logix-ai",
             partial(logix_job, lora="random", hessian="raw", rank=32, size=64)),
        Peer("logix-kfac", "LogIX, unprojected, K-FAC", "logix", "logix-ai",
             partial(logix_job, lora="none", hessian="kfac", rank=64, size=16), 512),
        Peer("bergson-dot", "bergson, no curvature", "bergson", "bergson", bergson_job),
    )  # fmt: skip
