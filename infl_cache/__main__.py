"""The command line: options in, one of the stages out, errors as one or two lines and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import Namespace

from infl_cache.arguments import parser
from infl_cache.config import read_config_file, short
from infl_cache.disk.configuration import written_by_this_user
from infl_cache.disk.durable import cannot_be_written, require_folder, require_writable, write_atomically
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, DamagedStore, InflCacheError, Interrupted
from infl_cache.maths.load import load_task
from infl_cache.maths.task import Task
from infl_cache.pages import page, page_list
from infl_cache.pipeline import STAGES, Run
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.selecting import Choice, select
from infl_cache.stages.export import export
from infl_cache.stages.figures.writing import require_figures, write_figures
from infl_cache.stages.opening import StageResult, log
from infl_cache.stages.page.choosing import PageOptions
from infl_cache.stages.page.writing import require_page, write_page
from infl_cache.stages.plan import PlanOptions
from infl_cache.stages.rendering import shown
from infl_cache.stages.report import report
from infl_cache.stages.status import status
from infl_cache.stages.suspects import suspects_report
from infl_cache.stages.validate import ValidateOptions
from infl_cache.stages.verify import Verdict, part_of, verify
from infl_cache.trusted import own_task


def entry() -> None:
    """The console script `infl-cache`."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. Errors go to stderr, results to stdout."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    logging.basicConfig(format="note: %(message)s", level=logging.WARNING)
    try:
        given = parser().parse_args([each for each in arguments if each != "--debug"])
        command: Callable[[Namespace], None] = COMMANDS[given.command]
        command(given[given.command])
    except Interrupted as error:
        print(f"infl-cache: {error}\ncarry on with: infl-cache {shlex.join(arguments)}", file=sys.stderr)
        return error.exit_code
    except InflCacheError as error:
        return _failed(error, error.exit_code, debug)
    except argparse.ArgumentError as error:
        return _failed(BadInput(" ".join(str(error.message).split())), BadInput.exit_code, debug)
    except KeyboardInterrupt:
        print(f"infl-cache: stopped at once\ncarry on with: infl-cache {shlex.join(arguments)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except Exception as error:
        return _failed(error, 1, debug, f"unexpected {type(error).__name__}: {error}; --debug shows where")
    return 0


def _failed(error: Exception, code: int, debug: bool, text: str | None = None) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"infl-cache: {text or error}", file=sys.stderr)
    return code


def _prepared(given: Namespace) -> tuple[Run, bool]:
    """The run with options from defaults, then RUN/run.yaml, then --config, then the command line; and --force."""
    own = {key: value for key, value in vars(given).items() if value is not None}
    config = _config(Path(own["config"])) if "config" in own else {}
    common = config.get("task_args") or {}
    if not isinstance(common, dict):
        raise BadInput(f"task-args: expected a mapping, found {common!r}")
    merged = {**config, **own, "task_args": {**common, **own.get("task_args", {})}}
    for name in ("task", "run"):
        if not isinstance(merged.get(name), str):
            raise BadInput(f"{name}: expected --{name} on the command line or {name}: in --config, found none")
    named, arguments = merged.pop("task"), merged.pop("task_args")
    force, path = bool(merged.pop("force", False)), merged.pop("run")
    for name in ("config", "debug"):
        merged.pop(name, None)
    run = Run(path, load_task(named, arguments), **merged)
    run.reference = {"task": _lasting(named), "task_args": arguments}
    return run, force


def _run_stages(names: Sequence[str], given: Namespace) -> None:
    """The named stages, a line for each as it ends; after all of them a short report."""
    kind = given.pop("figures") if "figures" in given else None
    run, force = _prepared(given)
    if list(names) == list(STAGES):
        require_page(RunFolder(run.path))
        if run.task is not None and run.task.render is not None:
            shown(run.task, "test", 0)  # a render that cannot be used is said now, not when all is done
    if kind is not None:
        require_figures(run.path, kind)
    # `run --force` starts everything over at once: no stage then finds another's older options in its way.
    results = run.all(force) if force and len(names) > 1 else (getattr(run, name)(force) for name in names)
    beside: tuple[StageResult, ...] = ()
    for result in results:
        beside = result.beside
        for each in (result, *beside):
            print(_result_line(each), flush=True)
    if list(names) == list(STAGES):
        folder, show = RunFolder(run.path), run.options.resources.progress
        print()
        _say(folder, run.task, PageOptions(), kind=kind, show=show)
    elif beside:
        print(f"\n{run.layer_shares()}")


def _self_influence(given: Namespace) -> None:
    run, force = _prepared(given)
    require_folder(run.path / "report")
    print(_result_line(run.self_influence(force)), flush=True)
    print("\n" + suspects_report(RunFolder(run.path), run.task))


def _config(path: Path) -> dict[str, Any]:
    """Options of a file; the run.yaml of a run folder means that folder, wherever it has been moved."""
    config = read_config_file(path)
    if (path.parent / "manifest.json").exists():
        config["run"] = str(path.parent)
    return config


def _lasting(reference: str) -> str:
    """A task's file with its whole path, so that run.yaml runs again from anywhere."""
    place, colon, name = reference.rpartition(":")
    return f"{Path(place).resolve()}{colon}{name}" if place.endswith(".py") else reference


def _result_line(result: StageResult) -> str:
    done = "nothing left to do" if not result.computed else f"{result.computed:,} of {result.rows:,} rows computed"
    name = result.stage.replace("_", "-")
    return f"{name:10s} {done}, {human_bytes(result.n_bytes)} on disk, {human_seconds(result.seconds)}"


def _validate(given: Namespace) -> None:
    own = {field.name for field in dataclasses.fields(ValidateOptions)}
    asked = {name: value for name, value in vars(given).items() if name in own and value is not None}
    for name in own:
        given.pop(name)
    run, _ = _prepared(given)
    found = run.validate(**asked)
    print(found)
    print(f"\nall figures and points: {run.path / 'validate' / found.kind}.json")
    if found.picture is not None:
        print(f"scatter plot: {found.picture}")


def _plan(given: Namespace) -> None:
    own = {name: given.pop(name) for name in ("device", *get_type_hints(PlanOptions))}
    made = _prepared(given)[0].plan(**{name: value for name, value in own.items() if value is not None})
    print(made)
    made.require_room()


def _status(given: Namespace) -> None:
    print(status(RunFolder(Path(given.run))))


def _verify(given: Namespace) -> None:
    sample, target = part_of(given.sample) if given.sample is not None else None, given.json
    if target not in (None, "-"):
        require_writable(Path(target))
    found = (
        _to_repair(given).verify(sample, repair=True) if given.repair else verify(RunFolder(Path(given.run)), sample)
    )
    if target == "-":
        print(found.as_json(), end="")
    elif target is not None:
        write_atomically(Path(target), found.as_json().encode())
    if not found.sound:
        raise DamagedStore(f"{found}\n{_remedy(found, given.repair)}")
    if target != "-":
        print(found)


def _remedy(found: Verdict, repaired: bool) -> str:
    count = f"{len(found.faults):,} faults" if len(found.faults) > 1 else "1 fault"
    if repaired:
        return f"{count} left that cannot be repaired; restore the files, or start their stage over with --force"
    return f"{count}; infl-cache verify {shlex.quote(found.path)} --repair makes again what is damaged"


def _to_repair(given: Namespace) -> Run:
    """The run with the task and the options that it was made with, as `run --config RUN/run.yaml` has them."""
    config = Path(given.run) / "run.yaml"
    if not (Path(given.run) / "manifest.json").exists():
        raise BadInput(f"{given.run}: expected a run folder, found no manifest.json there")
    own = {name: given[name] for name in ("task", "task_args") if given[name]}
    if config.exists():
        if "task" not in own and not written_by_this_user(config):
            named = str(read_config_file(config).get("task"))
            raise BadInput(
                f"{config}: names the code of the task ({short(named)}), but is not as you wrote it on this machine; if"
                f" you trust it: infl-cache verify {shlex.quote(given.run)} --repair --task {shlex.quote(named)}"
            )
        own["config"] = str(config)
    return _prepared(Namespace(**own, run=given.run))[0]  # type: ignore[no-untyped-call]


def _export(given: Namespace) -> None:
    out = Path(given.out) if given.out else None
    print(export(RunFolder(Path(given.run)), given.format, out, given["top_k"]))


def _select(given: Namespace) -> None:
    choice = Choice(**{field.name: given[field.name] for field in dataclasses.fields(Choice)})
    print(select(Path(given.run), choice, Path(given.out) if given.out else None, given.format), end="")


def _report(given: Namespace) -> None:
    folder, page = RunFolder(Path(given.run)), None
    asked = {each.name: given[each.name] for each in dataclasses.fields(PageOptions) if given[each.name] is not None}
    if asked and not given.page:
        raise BadInput(f"no-page: expected no options of the page with it, found {', '.join(asked)}")
    if given["task_args"] and not given.task:
        raise BadInput("task-args: expected --task with them, found none")
    if given.task is None and given.figures is None and cannot_be_written(folder.path):
        log.warning(f"{folder.path} is read-only or another's: the table alone, without page and pictures")
        _say(folder, None, None)
        return
    if given.page:
        page = PageOptions.resolve(asked)
        require_page(folder)
    if given.figures is not None:
        require_figures(folder.path, given.figures)
    named = load_task(given.task, given["task_args"] or {}) if given.task else None
    task, note = (named, "") if named is not None else own_task(folder)
    if note:
        log.warning(note)
    _say(folder, task, page, note, given.figures, not given.no_progress)


def _say(
    folder: RunFolder, task: Task | None, page: PageOptions | None, note: str = "", kind: str | None = None,
    show: bool = True,
) -> None:  # fmt: skip
    """Print the report: its table first, the path of the page last."""
    print(report(folder, task))
    if kind is not None:
        print(f"\n{write_figures(folder, task, kind, show)}")
    if page is not None:
        print(f"\n{write_page(folder, task, page, note, show)}")


def _help(given: Namespace) -> None:
    print(page(given.page) if given.page is not None else f"pages, each by infl-cache help PAGE:\n{page_list()}")


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    **{name: (lambda given, name=name: _run_stages([name], given)) for name in STAGES},  # type: ignore[misc]
    "run": lambda given: _run_stages(list(STAGES), given),
    "self-influence": _self_influence,
    "plan": _plan,
    "validate": _validate,
    "status": _status,
    "verify": _verify,
    "export": _export,
    "select": _select,
    "report": _report,
    "help": _help,
}


if __name__ == "__main__":
    entry()
