"""What is done, what is left, how large and how fast: read from ledger and manifest alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infl_cache.disk.ledger import array_bytes
from infl_cache.disk.run import RunFolder
from infl_cache.disk.tiles import FOLDER, bytes_of_tiles
from infl_cache.errors import BadInput, DamagedStore
from infl_cache.progress import human_bytes, human_seconds
from infl_cache.stages.blocks import some
from infl_cache.stages.keeping import kept_line
from infl_cache.stages.layers import layers_details
from infl_cache.stages.rankings import has_matrix
from infl_cache.stages.rounding import rounding_line
from infl_cache.stages.selection import as_text, count_of_tests, held_tests
from infl_cache.stages.suspects import CERTIFICATE, column
from infl_cache.stages.tiles import matrix_tests, solved

ORDER = ("grads", "stest", "influence")
# Shown where they were begun.
BESIDE = ("by_layer", "self_influence")
SOLVED = ("stest", "self_influence")
TILED = ("influence", "by_layer")


@dataclass(frozen=True)
class StageStatus:
    """One stage: blocks and rows done of all, bytes on disk, seconds of work, rows a second, seconds left."""

    stage: str
    blocks_done: int
    blocks: int
    rows_done: int
    rows: int
    n_bytes: int
    seconds: float
    rate: float
    eta: float
    details: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return self.blocks > 0 and self.blocks_done == self.blocks


@dataclass(frozen=True)
class Status:
    """The state of a run folder."""

    path: str
    stages: tuple[StageStatus, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}"]
        for each in self.stages:
            if not each.blocks:
                lines.append(f"  {each.stage:10s} not begun")
                continue
            left = f", {human_seconds(each.eta)} left" if each.rate else ""
            state = "done" if each.complete else f"{each.blocks_done / each.blocks:.0%}{left}"
            unit, name = "tiles" if each.stage in TILED else "rows", each.stage.replace("_", "-")
            lines.append(
                f"  {name:10s} {each.rows_done:,} of {each.rows:,} {unit} ({state}), {human_bytes(each.n_bytes)},"
                f" {human_seconds(each.seconds)}, {each.rate:,.1f} {unit}/s"
            )
            lines += [f"             {key}: {value}" for key, value in each.details.items()]
        return "\n".join(lines)


def status(folder: RunFolder) -> Status:
    """The state of a run folder; `BadInput` if it is none."""
    if not folder.exists:
        raise BadInput(f"{folder.path}: expected a run folder, found no manifest.json there")
    shown = (*ORDER, *(stage for stage in BESIDE if stage in folder.manifest.stages))
    return Status(str(folder.path), tuple(_stage_status(folder, stage) for stage in shown))


def _stage_status(folder: RunFolder, stage: str) -> StageStatus:
    if stage not in folder.manifest.stages:
        return StageStatus(stage, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, {})
    records = folder.records(stage)
    every = folder.stage_blocks(stage)
    rows_done = sum(record.stop - record.start - len(record.bad_rows) for record in records.values())
    rows = sum(block.rows for block in every)
    seconds = sum(record.seconds for record in records.values())
    rate = rows_done / seconds if seconds else 0.0
    details: dict[str, Any] = {}
    samples = folder.samples(stage) if stage not in TILED else np.array([], np.int64)
    bad = sorted(int(samples[row]) for record in records.values() for row in record.bad_rows)
    if bad:
        details["not finite"] = f"{len(bad)} rows: {', '.join(map(str, bad[:8]))}{', ...' if len(bad) > 8 else ''}"
    if records and len(records) < len(every):
        last = max(record.committed for record in records.values())
        details["last commit"] = f"{human_seconds(max(0.0, time.time() - last))} ago"
    if stage == "grads":
        details.update(_grads_details(folder, array_bytes(records.values()), rows_done))
    if stage == "influence" and "product_error" in folder.plan("influence"):
        details["products"] = f"bfloat16: {rounding_line(folder.plan('influence')['product_error'])}"
    if stage == "influence" and "rounding" in folder.plan("influence"):
        details["rounding"] = rounding_line(folder.plan("influence")["rounding"])
    if stage in SOLVED:
        details.update(_system_details(folder, stage))
    if stage == "self_influence" and len(records) == len(every):
        found = {name: column(folder, name) for name in CERTIFICATE}
        details.update(_certificates(folder.samples(stage), found))
    if stage == "stest":
        details.update(_stest_details(folder, bool(records)))
        if n_bytes := bytes_of_tiles(folder.path / FOLDER):
            details["Gram matrix"] = f"{human_bytes(n_bytes)} in {FOLDER}, kept for more test samples; may be removed"
    if stage == "influence" and "stest" in folder.manifest.stages:
        details["test samples"] = _tests_line(folder, matrix_tests(folder))
        if not has_matrix(folder):
            details["matrix"] = "not kept (--no-matrix), only the rankings"
    if stage == "by_layer":
        details.update(layers_details(folder))
    return StageStatus(
        stage, len(records), len(every), rows_done, rows, array_bytes(records.values()), seconds, rate,
        (rows - rows_done) / rate if rate else 0.0, details,
    )  # fmt: skip


def _forms_in_words(forms: Mapping[str, Any]) -> list[str]:
    """How many layers have which form; older versions knew fewer."""
    try:
        others = [f"{len(forms[kind])} {words}" for kind, words in
                  (("spread", "parameters copied"), ("alone", "modules alone")) if forms.get(kind)]  # fmt: skip
        others += [f"{len(forms['mapped'])} parameters by {forms['engine']} of the model"] if forms["mapped"] else []
        return [f"{len(forms['factored'])} layers factored", f"{len(forms['expanded'])} multiplied out", *others]
    except (KeyError, TypeError) as error:
        raise DamagedStore(f"the plan of grads: expected the forms of its layers, found others ({error!r})") from error


def _grads_details(folder: RunFolder, n_bytes: int, rows_done: int) -> dict[str, Any]:
    forms = folder.plan("grads")["forms"]
    n_params = int((folder.manifest.task or {}).get("n_params", 0))
    counts = _forms_in_words(forms)
    details = {"forms": ", ".join(counts)}
    identity = folder.manifest.stages["grads"]["identity"]
    if not identity.get("cache", True):  # older versions kept the gradients always
        return {**details, "gradients": "not kept, computed again by stage 3 (--no-cache)"}
    if "rounding" in folder.plan("grads"):
        details["rounding"] = (
            f"{identity['dtype']}: {rounding_line(folder.plan('grads')['rounding'])}, with gradients in place of s_test"
        )
    if n_bytes and n_params:
        plain = 4 * n_params * rows_done
        details["size"] = f"{plain / n_bytes:,.1f} times smaller than plain float32 rows ({human_bytes(plain)})"
    return details


def _system_details(folder: RunFolder, stage: str) -> dict[str, Any]:
    identity, plan = folder.manifest.stages[stage]["identity"], folder.plan(stage)
    details = {"system": _system_line(identity, plan)}
    if "spectrum" in plan:
        found = plan["spectrum"]
        details["spectrum"] = (
            f"eigenvalues from about {found['smallest']:.1e} to {found['largest']:.1e}, mean {found['mean']:.1e}"
            f" ({found['steps']} Lanczos steps, {found['samples']:,} training samples)"
        )
    return details


def _stest_details(folder: RunFolder, begun: bool) -> dict[str, Any]:
    details: dict[str, Any] = {"test samples": _tests_line(folder, held_tests(folder))}
    if (measure := folder.plan("stest").get("measure", "loss")) != "loss":
        details["measure"] = str(measure)
    if line := kept_line(folder):
        details["iteration"] = line
    return {**details, **_certificates(*solved(folder))} if begun else details


def _system_line(identity: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """The system that is solved, with what `auto` was resolved to."""
    if identity["solver"] == "identity":
        return "none: plain products of gradients"
    damping = plan.get("damping", identity["damping"])
    chosen = " (chosen)" if identity["damping"] == "auto" else ""
    kind = plan.get("curvature", identity["curvature"])
    return f"{kind} + {damping if isinstance(damping, str) else f'{damping:.3g}'} I{chosen} by {identity['solver']}"


def _tests_line(folder: RunFolder, tests: NDArray[np.int64]) -> str:
    """How many test samples of how many, and which."""
    n_test = count_of_tests(folder)
    text = as_text(tests, n_test)
    return f"{len(tests):,} of {n_test:,}: {text if len(text) <= 60 else text[:57] + '...'}"


def _certificates(samples: NDArray[np.int64], found: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """How well the systems were solved: the distribution of the true relative residuals, and who is over."""
    residual, converged = found["residual"].astype(float), found["converged"].astype(bool)
    iterations = found["iterations"].astype(int)
    finite, details = np.isfinite(residual), {}
    if finite.any():
        low, median, most, high = np.quantile(residual[finite], [0, 0.5, 0.9, 1], method="inverted_cdf")
        details["residual"] = f"smallest {low:.1e}, median {median:.1e}, 90 % up to {most:.1e}, largest {high:.1e}"
    details["iterations"] = f"median {np.median(iterations):.0f}, most {iterations.max()}"
    over = samples[finite & ~converged]
    named = f"; over the tolerance {len(over)}: {some(over.tolist())}" if len(over) else ""
    details["converged"] = f"{int(converged.sum())} of {len(converged)}{named}"
    return details
