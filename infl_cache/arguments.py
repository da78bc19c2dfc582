"""The options of each command, and what its help says: one parser with a sub-parser for each."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ActionYesNo, ArgumentParser

from infl_cache import __version__
from infl_cache.config import SECTIONS, Resources, option_fields
from infl_cache.pipeline import STAGES
from infl_cache.stages.chosen import EFFECTS
from infl_cache.stages.chosen import FORMATS as ID_FORMATS
from infl_cache.stages.export import ALL, FORMATS
from infl_cache.stages.figures.canvas import FORMATS as FIGURE_FORMATS
from infl_cache.stages.page.choosing import PageOptions
from infl_cache.stages.plan import PlanOptions
from infl_cache.stages.validate import ValidateOptions

HELP = {
    "help": "the pages of the manual, or one of them",
    "grads": "stage 1: the gradient of every training sample into RUN/grad_z.zarr",
    "stest": "stage 2: s_test of the test samples (all, or those of --test) into RUN/s_test.zarr",
    "influence": "stage 3: the influence matrix RUN/influence.npy and the rankings",
    "run": "the three stages in order, then the report",
    "self-influence": "which training samples are probably mislabelled: needs stage 1 alone",
    "plan": "before anything runs: bytes, memory and time of each stage, and what other choices would cost",
    "status": "what is done, what is left, sizes, rates (also while a run is going on)",
    "verify": "compare the run folder with its ledger, every byte or a --sample; exit 4 if something is damaged",
    "validate": "is it true? retrains without chosen samples, beside what a finished run predicts; into RUN/validate",
    "export": "the finished matrix as json (structure of pytorch_influence_functions), csv or parquet",
    "select": "the most helpful or harmful training samples as a file of ids, to retrain with them or without",
    "report": "what a finished run found: a table, and a page for the browser (RUN/report/index.html)",
}
NOTES = """A stage that was stopped is carried on by the same command. Negative influence = helpful.
exit codes: 0 done, 2 bad input, 3 the run belongs to another task or configuration, 4 corrupt or incomplete
store, 5 disk full, 6 locked by another process, 130/143 interrupted and resumable"""
EPILOG = f"""examples:
  infl-cache run --task scripts/digits.py:digits --run runs/digits
  infl-cache grads --task task.py:cifar --run runs/cifar --device cuda --memory 8GB
  infl-cache stest --task task.py:cifar --run runs/cifar --damping 0.1 --force
  infl-cache run --task task.py:cifar --run runs/cifar --test 0:1000
  infl-cache run --config runs/cifar/run.yaml
  infl-cache plan --task task.py:cifar --run runs/cifar --n-train 10^9 --device h100 --disk 7GB/s
  infl-cache status runs/cifar
  infl-cache verify runs/cifar --sample 5%
  infl-cache validate --task task.py:cifar --run runs/cifar --kind lds --subsets 100
  infl-cache report runs/cifar
  infl-cache export runs/cifar --format csv --out influence.csv
  infl-cache select runs/cifar --effect harmful --k 50 --out harmful.txt
  infl-cache help solvers

{NOTES}"""

# The commands of the overview by what they are for.
GROUPS = {
    "beforehand": ("plan",),
    "compute; each goes on from what is there": ("run", "grads", "stest", "influence", "self-influence"),
    "is it done, whole, true": ("status", "verify", "validate"),
    "read": ("report", "export", "select", "help"),
}

# What the help of a command ends with, before the rest.
EXAMPLES = {
    "export": """examples:
  infl-cache export runs/cifar --format json --out influences.json
  infl-cache export runs/cifar --format csv --top-k 20
  infl-cache export runs/cifar --format parquet --top-k all --out influences.parquet
""",
    "report": """examples:
  infl-cache report runs/cifar
  infl-cache report runs/cifar --tests 0,5,100:120 --neighbours 12
  infl-cache report runs/cifar --task task.py:cifar --figures svg
""",
    "select": """examples:
  infl-cache select runs/cifar --effect harmful --k 50 --out harmful.txt
  infl-cache select runs/cifar --effect harmful --k 50 --keep --out clean.npy
  infl-cache select runs/cifar --effect helpful --label 3
  infl-cache select runs/cifar --effect both --test 0,5:8 --format json --out strongest.json
  infl-cache select runs/cifar --self-influence --k 100 --out suspects.txt

Retrain with it:
  ids = numpy.loadtxt("harmful.txt", dtype=int)
  data = infl_cache.Run("runs/cifar", task).subset_without(ids)
  # or, of what --keep wrote: torch.utils.data.Subset(train, numpy.load("clean.npy").tolist())
""",
}


def parser() -> ArgumentParser:
    """The whole command line."""
    top = ArgumentParser(
        prog="infl-cache",
        usage="infl-cache [-h] [--version] COMMAND ...",
        description="Which training samples made my PyTorch model say this? Influence functions, cached on disk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        version=__version__,
    )
    commands = top.add_subcommands(
        dest="command", metavar="COMMAND", title="commands", description=_overview(), help=argparse.SUPPRESS
    )
    for name in (*STAGES, "run", "self-influence", "plan"):
        commands.add_subcommand(name, _stage_parser(name))
    commands.add_subcommand("validate", _validate_parser())
    for name in ("status", "verify", "export", "select", "report"):
        commands.add_subcommand(name, _reader_parser(name))
    commands.add_subcommand("help", _help_parser())
    return top


def _overview() -> str:
    """The commands by what they are for, a line each."""
    grouped = [name for names in GROUPS.values() for name in names]
    groups = {**GROUPS, "more": tuple(name for name in HELP if name not in grouped)}
    lines = ["infl-cache COMMAND --help tells more of each."]
    for title, names in groups.items():
        lines += ["", f"{title}:"] * bool(names)
        for name in names:
            text = f"  {name:15s} {HELP[name]}"
            lines += textwrap.wrap(text, 110, subsequent_indent=" " * 18, break_on_hyphens=False)
    return "\n".join(lines)


def _stage_parser(name: str) -> ArgumentParser:
    """Options of a stage: all stages take all of them, so that one file serves every stage."""
    made = _task_parser(name, "the run folder; made if missing")
    made.add_argument("--force", action="store_true", help="start this stage, and what hangs on it, over")
    groups = {
        section: made.add_argument_group((kind.__doc__ or "").split(".")[0]) for section, kind in SECTIONS.items()
    }
    for option, section, field in option_fields():
        _add_option(groups[section], option, get_type_hints(SECTIONS[section])[option], field)
    if name == "run":
        _add_figures(made)
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
        made.add_argument(
            "--top-k", type=int | str | None,
            help=f"length of the rankings, or {ALL}, in parquet every pair (default: all in json, else 100)",
        )  # fmt: skip
    if name == "select":
        _add_choice(made)
    if name == "verify":
        made.add_argument("--sample", type=str | None, help="read the contents of a random part only: 5%% or 0.05")
        made.add_argument("--json", type=str | None, help="a file for the report in JSON; - for stdout")
        made.add_argument("--repair", action="store_true", help="make again what is damaged, and nothing else")
    if name in ("report", "verify"):
        why = "the task whose samples are shown" if name == "report" else "the task of --repair"
        made.add_argument(
            "--task", type=str | None, help=f"{why}, if not that of RUN/run.yaml: path/to/file.py:function"
        )
        made.add_argument("--task-args", type=dict[str, Any] | None, help="arguments of the function")
    if name == "report":
        _add_figures(made)
        made.add_argument("--page", action=ActionYesNo(no_prefix="no-"), default=True, help="write the page (default)")
        for field in dataclasses.fields(PageOptions):
            _add_option(made, field.name, get_type_hints(PageOptions)[field.name], field)
        made.add_argument("--no-progress", action="store_true", help="no bars")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def _help_parser() -> ArgumentParser:
    made = _plain_parser("help", "[PAGE]")
    made.add_argument("page", type=str | None, nargs="?", help="its name; without one, the list of pages")
    made.add_argument("--debug", action="store_true", help="show tracebacks")
    return made


def _add_figures(made: ArgumentParser) -> None:
    """Whether a report draws all that there is."""
    made.add_argument(
        "--figures", type=str | None,
        help=f"draw all that the run has the numbers for into RUN/report/figures: one of {', '.join(FIGURE_FORMATS)}",
    )  # fmt: skip


def _add_choice(made: ArgumentParser) -> None:
    """Which training samples `select` takes, and where their ids go."""
    made.add_argument(
        "--effect", type=str | None, help=f"one of {', '.join(EFFECTS)}: the largest of either sign (default: harmful)"
    )
    made.add_argument("--k", type=int, default=50, help="how many (default: 50)")
    made.add_argument("--test", type=str | None, help="on these test samples, as of stest (default: all, on average)")
    made.add_argument("--label", type=int | None, help="on the test samples of this class, on average")
    made.add_argument("--self-influence", action="store_true", help="those of largest self-influence: the suspects")
    made.add_argument("--keep", action="store_true", help="write all training samples but these")
    made.add_argument("--out", type=str | None, help="the file to write (default: ids on stdout, one a line)")
    made.add_argument("--format", type=str | None, help=f"one of {', '.join(ID_FORMATS)} (default: as --out ends)")


def _plain_parser(name: str, usage: str) -> ArgumentParser:
    return ArgumentParser(
        usage=f"infl-cache {name} {usage}",
        description=HELP[name],
        epilog=f"{EXAMPLES[name]}\n{NOTES}" if name in EXAMPLES else EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
