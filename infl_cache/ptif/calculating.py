r"""The two modes: influences of all training samples on the test samples that the config asks for.

.. math:: influence[j][i] = -\frac1n s_{test}(z_j) \cdot \nabla L(z_i), \qquad
          s_{test}(z) = (C + damp\, I)^{-1} \nabla L(z)

(Koh & Liang 2017, Eq. 2, over n). Both are the same numbers; they differ in what stays on the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from infl_cache.config import Options
from infl_cache.disk.durable import remove
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, ForeignRun
from infl_cache.maths.task import Task
from infl_cache.pipeline import Run
from infl_cache.ptif.config import Config
from infl_cache.ptif.journal import logged_to
from infl_cache.ptif.loaders import Loss, asked_tests, batch_of, task_of
from infl_cache.ptif.readjust import adjusted, saved_steps
from infl_cache.ptif.results import Outcome, results_of
from infl_cache.ptif.saving import ResultFiles
from infl_cache.stages.columns import stored_column
from infl_cache.stages.opening import looked_at, task_identity, test_identity
from infl_cache.stages.selection import as_text

log = logging.getLogger("infl_cache")

Given = Mapping[str, Any] | Config


def calc_influences(
    config: Given, model: nn.Module, train_loader: Any, test_loader: Any, *, loss: Loss | None = None, **task: Any
) -> Outcome:
    """The mode that `config["calc_method"]` names: `calc_img_wise` or `calc_all_grad_then_test`."""
    modes = {"img_wise": calc_img_wise, "all_grad_then_test": calc_all_grad_then_test}
    mode = modes[Config.from_dict(config).calc_method]
    return mode(config, model, train_loader, test_loader, loss=loss, **task)


def calc_img_wise(
    config: Given, model: nn.Module, train_loader: Any, test_loader: Any, *, loss: Loss | None = None, **task: Any
) -> Outcome:
    r"""Influences of every training sample on the chosen test samples; nothing stays on the disk but the JSON.

    The training gradients are not stored but computed once more for the products. While it computes, s_test and the
    finished rows are in a hidden folder in `outdir`: killed, it goes on from there when it is called again.

    Args:
        config: a `Config`, or a dict as from `get_default_config`.
        model: trained; used in eval mode and put back.
        train_loader, test_loader: their data sets are taken by index, with their `collate_fn`; ids never change with
            shuffling. The batch size decides no result.
        loss: `loss(outputs, targets) -> (B,)`, one value a sample; the cross entropy if None.
        task: further fields of `infl_cache.Task`: `parameters`, `weight_decay`, `forward`, `targets`, `measure`, ...

    Returns:
        influences: `{test id: {"label", "num_in_dataset", "time_calc_influence_s", "influence", "harmful",
            "helpful"}}`; the ids are text as in JSON; `influence[i]` is of training sample i, negative if helpful.
        harmful, helpful: ids of all training samples by their average over these test samples, the strongest first.

    The same goes to `outdir/influence_results_START_NUM.json`. What is there of the same task and config is read.
    Raises `infl_cache.errors`: `ForeignRun` if other results are there under this name.

    Example:
        >>> import tempfile, torch
        >>> from infl_cache.ptif import calc_img_wise, get_default_config
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3); y = (x.sum(1) > 0).long()
        >>> loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
        >>> config = get_default_config()
        >>> config["outdir"], config["test_sample_num"], config["damp"] = tempfile.mkdtemp(), 1, 0.1
        >>> influences, harmful, helpful = calc_img_wise(config, torch.nn.Linear(3, 2), loader, loader)
        >>> [entry["label"] for entry in influences.values()], len(helpful)
        ([0, 1], 20)
        >>> first = influences["0"]
        >>> first["influence"][first["helpful"][0]] == min(first["influence"]) < 0
        True
    """
    return _calculated(Config.from_dict(config), (model, train_loader, test_loader, loss, task), stored=False)


def calc_all_grad_then_test(
    config: Given, model: nn.Module, train_loader: Any, test_loader: Any, *, loss: Loss | None = None, **task: Any
) -> Outcome:
    """All training gradients to the disk, then all s_test, then the influences from both; as `calc_img_wise` else.

    They stay in the run folder `config["save_pth"]` (`outdir/run` if None), which `infl_cache.Run` and the command
    `infl-cache` open. Killed, it goes on where it was; asked for other test samples, it computes only those.
    """
    return _calculated(Config.from_dict(config), (model, train_loader, test_loader, loss, task), stored=True)


def _calculated(config: Config, given: tuple[Any, Any, Any, Any, dict[str, Any]], stored: bool) -> Outcome:
    files = ResultFiles.of(config)
    with logged_to(config.log_filename):
        model, train_loader, test_loader, loss, fields = given
        task = task_of(model, train_loader, test_loader, loss, **fields)
        tests = asked_tests(config, task)
        path = _run_folder(config, files) if stored else files.work
        # A solver that is made of stored gradients needs them; in the mode without a store they go in the end.
        kept = stored or "fisher" in (config.solver, config.curvature)
        text = as_text(tests, len(task.test))
        options = {**config.run_options(batch_of(train_loader)), "cache": kept, "test": text}
        identity = {**_identity(path, task, options), **config.numbers(), "tests": text}
        found = None if config.force else files.read(identity)
        if found is not None and not stored:
            log.info(f"{files.results}: read, it is of this task and config")
            return found
        chosen = adjusted(config, RunFolder(path), task, Options.resolve(options))
        run = Run(path, task, **{**options, "scale": chosen.scale})
        _compute(run, config, stored)
        if found is not None:
            log.info(f"{files.results}: read, it is of this task and config")
            return found
        outcome = results_of(run, tests)
        files.write(outcome[0], {**_about(run, config, tests, chosen.facts), "identity": identity,
                                 "harmful": outcome[1], "helpful": outcome[2]})  # fmt: skip
        if not stored:
            remove([files.work])
        log.info(f"influences on {len(tests):,} test samples are in {files.results}")
        return outcome


def _run_folder(config: Config, files: ResultFiles) -> Path:
    return Path(config.save_pth) if config.save_pth is not None else files.results.parent / "run"


def _identity(path: Path, task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the results depend on of model and data."""
    with looked_at(RunFolder(path), task, Options.resolve(options)) as run:
        return {**task_identity(run.task, run.parameters), **test_identity(run.task)}


def _compute(run: Run, config: Config, stored: bool) -> None:
    """The three stages; what is there of another task or config is refused, or begun anew where it is nobody's."""
    try:
        run.grads()
        run.stest(force=config.force)
        run.influence(force=config.force)
    except ForeignRun as error:
        if stored and not config.force:
            raise ForeignRun(
                f"{error}\nhere that is another config['save_pth'] or ['outdir'], or config['force'] = True"
            ) from error
        log.info(f"{run.path}: begun anew, it was of another task or config")
        if not stored:
            remove([run.path])
        run.all(force=stored)
    except BadInput:
        if not stored and not run.folder.done("grads"):
            remove([run.path])
        raise


def _about(run: Run, config: Config, tests: list[int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """How the results were found, for the file beside them."""
    wanted = {name: stored_column(run.folder, "stest", name)[tests] for name in ("residual", "iterations", "converged")}
    plan = run.folder.plan("stest")
    over = [test for test, fine in zip(tests, wanted["converged"], strict=True) if fine != 1]
    return {
        "config": config.to_dict(),
        "system": {"solver": config.solver, "curvature": plan.get("curvature"), "damping": plan.get("damping")},
        "lissa": {**facts, **saved_steps(config, wanted["iterations"])},
        "residual_largest": float(wanted["residual"].max()),
        "not_converged": over,
    }
