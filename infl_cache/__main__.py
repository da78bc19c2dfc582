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
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from infl_cache import __version__
from infl_cache.config import SECTIONS, Resources, option_fields, read_config_file
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput, DamagedStore, InflCacheError, Interrupted
from infl_cache.maths.load import load_task
from infl_cache.maths.task import Task
from infl_cache.pipeline import STAGES, Run
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.export import FORMATS, export
from infl_cache.stages.opening import StageResult
from infl_cache.stages.plan import PlanOptions
from infl_cache.stages.report import report
from infl_cache.stages.status import status
from infl_cache.stages.validate import ValidateOptions
from infl_cache.stages.verify import verify

HELP = {
    "grads": "stage 1: the gradient of every training sample into RUN/grad_z.zarr",
    "stest": "stage 2: s_test of the test samples (all, or those of --test) into RUN/s_test.zarr",
    "influence": "stage 3: the influence matrix RUN/influence.npy and the rankings",
    "run": "the three stages in order, then a short report",
    "plan": "before anything runs: bytes, memory and time of each stage, and what other choices would cost",
    "status": "what is done, what is left, sizes, rates (also while a run is going on)",
    "verify": "compare every byte of the run folder with its ledger; exit 4 if something is damaged",
    "validate": "is it true? retrains without chosen samples, beside what a finished run predicts; into RUN/validate",
    "export": "the finished matrix as json (structure of pytorch_influence_functions) or csv",
    "report": "the most helpful and harmful training samples of some test samples, as a table and a picture",
}
EPILOG = """examples:
  infl-cache run --task scripts/digits.py:digits --run runs/digits
  infl-cache grads --task task.py:cifar --run runs/cifar --device cuda --memory 8GB
  infl-cache stest --task task.py:cifar --run runs/cifar --damping 0.1 --force
  infl-cache run --task task.py:cifar --run runs/cifar --test 0:1000
  infl-cache run --config runs/cifar/run.yaml
  infl-cache plan --task task.py:cifar --run runs/cifar --n-train 10^9 --device h100 --disk 7GB/s
  infl-cache status runs/cifar
  infl-cache validate --task task.py:cifar --run runs/cifar --kind lds --subsets 100
  infl-cache export runs/cifar --format csv --out influence.csv

A stage that was stopped is carried on by the same command. Negative influence = helpful.
exit codes: 0 done, 2 bad input, 3 the run belongs to another task or configuration, 4 corrupt or incomplete
store, 5 disk full, 6 locked by another process, 130/143 interrupted and resumable"""


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


def parser() -> ArgumentParser:
    """The whole command line."""
    top = ArgumentParser(
        prog="infl-cache",
        description="Which training samples made my PyTorch model say this? Influence functions, cached on disk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        version=__version__,
    )
    commands = top.add_subcommands(dest="command", metavar="COMMAND")
    for name in (*STAGES, "run", "plan"):
        commands.add_subcommand(name, _stage_parser(name), help=HELP[name])
    commands.add_subcommand("validate", _validate_parser(), help=HELP["validate"])
    for name in ("status", "verify", "export", "report"):
        commands.add_subcommand(name, _reader_parser(name), help=HELP[name])
    return top


def _stage_parser(name: str) -> ArgumentParser:
    """Options of a stage: all stages take all of them, so that one file serves every stage."""
    made = _task_parser(name, "the run folder; made if missing")
    made.add_argument("--force", action="store_true", help="start this stage, and what hangs on it, over")
    groups = {
        section: made.add_argument_group((kind.__doc__ or "").split(".")[0]) for section, kind in SECTIONS.items()
    }
    for option, section, field in option_fields():
        _add_option(groups[section], option, get_type_hints(SECTIONS[section])[option], field)
    for field in dataclasses.fields(PlanOptions) if name == "plan" else ():
        _add_option(made, field.name, field.type, field)
    return made


def _task_parser(name: str, run: str) -> ArgumentParser:
    """What every command that computes with a task takes."""
    made = _plain_parser(name, "--task TASK --run RUN [options]")
    made.add_argument("--task", type=str | None, help="path/to/file.py:function or package.module:function")
    made.add_argument("--run", type=str | None, help=run)
    made.add_argument(
        "--task-args", type=dict[str, Any] | None, help="arguments of the function: --task-args.NAME VALUE"
    )
    made.add_argument("--config", type=str | None, help="a YAML or TOML file of options, e.g. RUN/run.yaml")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def _validate_parser() -> ArgumentParser:
    """Its own options, and those that say where and with how much to compute."""
    made = _task_parser("validate", "the run folder, with a finished matrix")
    for kind, fields in ((ValidateOptions, None), (Resources, ("device", "memory", "progress"))):
        group = made.add_argument_group((kind.__doc__ or "").split(".")[0])
        for field in dataclasses.fields(kind):
            if fields is None or field.name in fields:
                _add_option(group, field.name, get_type_hints(kind)[field.name], field)
    return made


def _add_option(group: Any, option: str, hint: Any, field: dataclasses.Field[Any]) -> None:
    """One option of `config`; the value itself is checked there, in the same words as for Python and files."""
    flag, text = "--" + option.replace("_", "-"), field.metadata["help"]
    if field.default is not None:
        text += f" (default: {field.default})"
    if hint is bool:
        group.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=None, help=text)
        return
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    metavar = "{" + ",".join(choices) + "}" if choices else option.upper()
    group.add_argument(flag, type=str, default=None, help=text, metavar=metavar)


def _reader_parser(name: str) -> ArgumentParser:
    """Commands that only read a run folder."""
    made = _plain_parser(name, "RUN [options]")
    made.add_argument("run", type=str, help="the run folder")
    if name == "export":
        made.add_argument("--format", type=str, default="json", help=f"one of {', '.join(FORMATS)} (default: json)")
        made.add_argument("--out", type=str | None, help="the file to write (default: RUN/export/influence.FORMAT)")
        made.add_argument("--top-k", type=int | None, help="length of the rankings (default: all in json, 100 in csv)")
    if name == "report":
        made.add_argument("--task", type=str | None, help="the task, to draw its samples: path/to/file.py:function")
        made.add_argument("--task-args", type=dict[str, Any] | None, help="arguments of the function")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def _plain_parser(name: str, usage: str) -> ArgumentParser:
    return ArgumentParser(
        usage=f"infl-cache {name} {usage}",
        description=HELP[name],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )


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
    run, force = _prepared(given)
    # `run --force` starts everything over at once: no stage then finds another's older options in its way.
    results = run.all(force) if force and len(names) > 1 else (getattr(run, name)(force) for name in names)
    for result in results:
        print(_result_line(result), flush=True)
    if list(names) == list(STAGES):
        print("\n" + report(RunFolder(run.path), run.task))


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
    return f"{result.stage:10s} {done}, {human_bytes(result.n_bytes)} on disk, {human_seconds(result.seconds)}"


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
    folder = RunFolder(Path(given.run))
    faults = verify(folder)
    if faults:
        more = f"\n{len(faults)} files are damaged; restore them, or start their stage over with --force"
        raise DamagedStore("\n".join(faults) + more)
    print(f"{folder.path}: everything is as it was committed")


def _export(given: Namespace) -> None:
    out = Path(given.out) if given.out else None
    print(export(RunFolder(Path(given.run)), given.format, out, given["top_k"]))


def _report(given: Namespace) -> None:
    task: Task | None = load_task(given.task, given["task_args"] or {}) if given.task else None
    print(report(RunFolder(Path(given.run)), task))


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    **{name: (lambda given, name=name: _run_stages([name], given)) for name in STAGES},  # type: ignore[misc]
    "run": lambda given: _run_stages(list(STAGES), given),
    "plan": _plan,
    "validate": _validate,
    "status": _status,
    "verify": _verify,
    "export": _export,
    "report": _report,
}


if __name__ == "__main__":
    entry()
