"""The task that a run's own `run.yaml` names: code that a command runs only where this user wrote that file."""

from __future__ import annotations

import shlex

from infl_cache.config import read_config_file, short
from infl_cache.disk.configuration import written_by_this_user
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, ForeignRun
from infl_cache.maths.load import load_task
from infl_cache.maths.task import Task
from infl_cache.stages.same import check_same_task


def own_task(folder: RunFolder) -> tuple[Task | None, str]:
    """The task that a run's own run.yaml names, if this user wrote that file; else none, and why there is none."""
    config, remedy = folder.path / "run.yaml", f"infl-cache report {shlex.quote(str(folder.path))} --task"
    if not config.exists():
        return None, f"No samples are shown: the run has no run.yaml that names its task; {remedy} FILE.py:FUNCTION"
    named = read_config_file(config).get("task")
    if not isinstance(named, str):
        return None, f"No samples are shown: run.yaml names no task; {remedy} FILE.py:FUNCTION shows them"
    if not written_by_this_user(config):
        return None, (
            f"No samples are shown: run.yaml names the code of the task ({short(named)}), but is not as you wrote it on"
            f" this machine; if you trust it: {remedy} {shlex.quote(named)}"
        )
    try:
        task = load_task(named, read_config_file(config).get("task_args") or {})
        check_same_task(folder, task)
    except (BadInput, ForeignRun) as error:
        why = str(error).splitlines()[0]
        return None, f"No samples are shown: the task of run.yaml cannot be used ({why}); {remedy} FILE.py:FUNCTION"
    return task, ""
