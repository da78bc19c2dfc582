"""`infl-cache select`: which training samples are asked for, in words and as ids, and where the ids go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from infl_cache.config import short
from infl_cache.disk.sweep import refuse_own_files
from infl_cache.errors import BadInput
from infl_cache.pipeline import Run
from infl_cache.stages import chosen
from infl_cache.stages.opening import log
from infl_cache.stages.selection import count_of_tests, parse_tests


@dataclass(frozen=True)
class Choice:
    """The k training samples of an effect (harmful if not said) on test samples or a class, or of self-influence.

    `keep` turns it round: all training samples but these.
    """

    k: int
    effect: str | None = None
    test: str | None = None
    label: int | None = None
    self_influence: bool = False
    keep: bool = False


def select(path: Path, choice: Choice, out: Path | None = None, kind: str | None = None) -> str:
    """What there is to print: the ids, one a line, or, once they are in the file `out`, what that file holds.

    Raises `BadInput` for a choice that cannot be meant and, before any work, for a file that cannot be written.
    """
    if out is None and kind not in (None, "txt"):
        raise BadInput(f"out: expected a file for the format {short(kind)}, found none; --out FILE")
    run = Run(path)
    n_train = int(run.folder.plan("grads")["n_rows"])
    if out is not None:
        refuse_own_files(path, out)
    # It makes the folder that is missing: after whatever else can be refused at once.
    written_as = chosen.require_file(out, kind) if out is not None else "txt"
    ids, what = _asked(run, choice)
    if choice.keep:
        what = f"all but the {len(ids):,} {what}"
        ids = chosen.others(ids, n_train)
        if not len(ids):
            raise BadInput(f"k: expected fewer than the {n_train:,} training samples with --keep, found {choice.k}")
    if out is None:
        return chosen.as_lines(ids)
    chosen.write_ids(out, ids, written_as)
    return f"{out}: {len(ids):,} of {n_train:,} training samples, {what if choice.keep else f'the {what}'}\n"


def _asked(run: Run, choice: Choice) -> tuple[chosen.Ids, str]:
    """The training samples that are asked for, and what they are in words."""
    if choice.self_influence:
        if (choice.effect, choice.test, choice.label) != (None, None, None):
            raise BadInput("self-influence: expected neither --effect, --test nor --label with it, found one of them")
        return run.suspects(choice.k).ids, "of largest self-influence"
    effect, over = choice.effect or "harmful", "all test samples"
    test: int | list[int] | None = None
    if choice.test is not None:
        tests = parse_tests(choice.test, count_of_tests(run.folder))
        test, over = (tests if len(tests) > 1 else tests[0]), f"test samples {choice.test}"
    if choice.label is not None:
        over = f"the test samples of class {choice.label}"
    words = "most influential" if effect == "both" else f"most {effect}"
    found = run.most_influential(choice.k, effect, test, choice.label).ids
    if len(found) < choice.k:
        does = "influential" if effect == "both" else effect
        log.warning(
            f"k: {len(found):,} of the {choice.k:,} asked for are there: no other training sample is {does} on {over}"
        )
    return found, f"{words} on {over}"
