"""Blocks that are made again because they were damaged: the claim on them goes first, and it is written down."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from infl_cache.disk.manifest import Identity, differences
from infl_cache.errors import ForeignRun
from infl_cache.stages.opening import Opened

# What a plan says of blocks whose making again was begun: until they are done they are missing.
REPAIRING = "repairing"


def claim_again(run: Opened, stage: str, identity: Identity, damaged: Collection[int]) -> set[int]:
    """Forget these blocks of a stage; return them and those that a repair which was stopped has yet to make again.

    Raises `ForeignRun`, with nothing touched, unless the stage was made from this task and identity.
    """
    folder = run.folder
    entry = folder.manifest.stages[stage]
    found = differences(folder.manifest.task or {}, run.task_identity) + differences(entry["identity"], identity)
    if found:
        raise ForeignRun(
            f"{folder.path} belongs to another task or configuration: {'; '.join(found)}."
            f" Repair it with those that {stage} was made with"
        )
    wanted = {*damaged, *still_missing(run.folder.plan(stage), folder.records(stage))}
    if wanted:
        folder.remember(stage, **{REPAIRING: sorted(wanted)})
        folder.forget(stage, wanted)
    return wanted


def chosen(block: int, only: Collection[int] | None) -> bool:
    """Whether a block is to be done: with `only` one of these."""
    return only is None or block in only


def still_missing(plan: dict[str, Any], done: Collection[int]) -> list[int]:
    """Blocks that a repair of the stage was to make again, and that are not done."""
    return [int(block) for block in plan.get(REPAIRING, ()) if block not in done]


def settle(run: Opened, stage: str) -> None:
    """Nothing of the stage is left to be made again: the plan is what it was before."""
    plan = run.folder.plan(stage)
    if REPAIRING in plan and not still_missing(plan, run.folder.records(stage)):
        del plan[REPAIRING]
        run.folder.remember(stage)
