"""What `verify` found damaged is made again by the stages themselves, and nothing else is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from infl_cache.config import Options, SelectionOptions
from infl_cache.disk.codecs import planned_codec
from infl_cache.disk.durable import remove
from infl_cache.disk.growth import restore_metadata
from infl_cache.disk.inside import leads_out
from infl_cache.disk.layout import chunk_keys
from infl_cache.disk.manifest import differences
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.errors import BadInput, DamagedStore, ForeignRun, IncompleteStore
from infl_cache.maths.task import Task
from infl_cache.stages.again import settle
from infl_cache.stages.by_layer import by_layer
from infl_cache.stages.checks import Fault
from infl_cache.stages.grads import grads
from infl_cache.stages.influence import influence
from infl_cache.stages.opening import Opened, StageResult, log, opened
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.self_influence import begun_with, self_influence
from infl_cache.stages.stest import stest
from infl_cache.stages.verify import LEDGER, MANIFEST, MATRICES, STORES, Verdict, verify

# By whom each stage's blocks are made, parents first, and which stage makes the single files.
ORDER = ("grads", "stest", "influence", "by_layer", "self_influence")
MAKERS = {"rankings": "influence", "layer_shares": "by_layer", "self_ranking": "self_influence"}

STAGES: dict[str, Callable[..., StageResult]] = {"grads": grads, "stest": stest, "influence": influence}


def repaired(folder: RunFolder, task: Task, options: Options, sample: float | None = None) -> Verdict:
    """Make the damaged blocks of a run again, all else left as it is; what is wrong after that, found by `verify`.

    A block is forgotten before it is made again. A repair that was stopped is carried on.
    Raises `ForeignRun` for another task or other options than the run's, `DamagedStore` without a ledger.
    """
    if not folder.exists:
        raise BadInput(f"{folder.path}: expected a run folder, found no manifest.json there")
    if not (folder.path / LEDGER).is_file():
        raise DamagedStore(
            f"{folder.path / LEDGER}: expected the ledger of what is done, found no file; restore it, or run the stages"
            " again"
        )
    show = options.resources.progress
    with opened(folder, task, _as_begun(folder, options)) as run:
        if found := differences(folder.manifest.task or {}, run.task_identity):
            raise ForeignRun(
                f"{folder.path} belongs to another task: {'; '.join(found)}; repair it with its own --task"
            )
        faults = verify(folder, sample, show).faults
        _restore_metadata(folder, faults)
        for stage, blocks in _to_make(folder, faults).items():
            _make_again(run, stage, blocks)
        for stage in folder.manifest.stages:  # a repair may have been stopped before it could
            settle(run, stage)
    return verify(RunFolder(folder.path), sample, show)


def _as_begun(folder: RunFolder, options: Options) -> Options:
    """The options, so that they ask for nothing that is not there: no other test samples, no other kind of matrix."""
    selection = SelectionOptions(measure=options.selection.measure)
    kept = dataclasses.replace(options.influence, matrix=has_matrix(folder))
    return dataclasses.replace(options, selection=selection, influence=kept)


def _restore_metadata(folder: RunFolder, faults: tuple[Fault, ...]) -> None:
    """Write damaged `zarr.json` files once more, from the layout in the manifest."""
    for stage in STORES:
        if not any(
            fault.stage == stage and fault.block is None and fault.file not in (LEDGER, MANIFEST) for fault in faults
        ):
            continue
        plan = folder.plan(stage)
        codec = planned_codec(plan, False, folder.path, stage)
        failed = [f"{OUTPUTS[stage][0]}: its codec is not in the manifest"]
        if codec is not None:
            failed = restore_metadata(folder.path, OUTPUTS[stage][0], plan, codec)
        for name in failed:
            log.warning(f"{name}: cannot be repaired, what this version of zarr writes is not what was recorded")


def _to_make(folder: RunFolder, faults: tuple[Fault, ...]) -> dict[str, set[int]]:
    """The blocks that are to be made again, by stage; a stage without any makes its single file again."""
    found: dict[str, set[int]] = {}
    for fault in faults:
        if fault.stage in MAKERS:
            found.setdefault(MAKERS[fault.stage], set())
        elif fault.block is not None:
            found.setdefault(fault.stage, set()).add(fault.block)
        elif fault.stage in MATRICES and fault.file not in (LEDGER, MANIFEST):  # the whole file
            found.setdefault(fault.stage, set()).update(folder.records(fault.stage))
    for single, maker in MAKERS.items():  # a repair may have been stopped after the last block
        if _finished(folder, maker) and not _finished(folder, single):
            found.setdefault(maker, set())
    return {stage: found[stage] for stage in ORDER if stage in found}


def _finished(folder: RunFolder, stage: str) -> bool:
    return stage in folder.manifest.stages and len(folder.records(stage)) == len(folder.stage_blocks(stage))


def _clear_the_way(folder: RunFolder, stage: str, blocks: set[int]) -> None:
    """Remove folders that have the name of a chunk file of these blocks."""
    names = [
        f"{OUTPUTS[stage][0]}/{layout.path}/{key}"
        for block in folder.stage_blocks(stage) if block.index in blocks
        for layout in folder.array_layouts(stage)
        for key in chunk_keys(layout, block)
    ]  # fmt: skip
    remove(folder.path / name for name in names if not leads_out(name) and (folder.path / name).is_dir())


def _make_again(run: Opened, stage: str, blocks: set[int]) -> None:
    """By the stage itself; what it refuses stays as it is, and the reason is said."""
    folder = run.folder
    if stage in STORES:
        _clear_the_way(folder, stage, blocks)
    try:
        if stage == "self_influence":
            self_influence(dataclasses.replace(run, options=begun_with(folder, run.options, {})), only=blocks)
        elif stage == "by_layer":
            by_layer(run, blocks)
        else:
            STAGES[stage](run, only=blocks)
    except (DamagedStore, IncompleteStore) as error:
        log.warning(f"{stage} cannot be repaired: {error}")
