"""Every command and every code block of the README is run, in the order in which they stand there."""

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infl_cache.__main__ import main
from infl_cache.config import option_fields

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
# What would call this test again, or make an environment inside one, is only shown by make, not run.
SHOWN = {"make test"}


def commands():
    return [line for kind, text in BLOCKS if kind == "sh" for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a user has after cloning, with this interpreter's environment in place of `.venv`."""
    here = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "scripts", here / "scripts")
    (here / "installed").touch()
    return here


def run(line, here):
    """Exit code and output of one line, as in a shell; `infl-cache` itself without starting a process."""
    words = shlex.split(line)
    if words[0] == "infl-cache":
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(words[1:]), out.getvalue() + err.getvalue()
    assert words[0] == "make"
    dry = ["-n"] if line in SHOWN else []
    words = ["make", *dry, f"BIN={Path(sys.executable).parent}", "STAMP=installed", *words[1:]]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_command_works_and_the_outputs_are_there(clone):
    lines = commands()
    assert len(lines) >= 15
    for line in lines:
        code, output = run(line, clone)
        assert code == 0, f"{line}\n{output}"
        if line == "make influence":
            assert "test sample" in output
            assert "harmful" in output
            assert (clone / "runs/digits/report/influence.png").read_bytes()[:4] == b"\x89PNG"
            assert np.load(clone / "runs/digits/influence.npy", mmap_mode="r").shape == (297, 1500)
    assert (clone / "influences.json").exists()
    (layout,) = [text for kind, text in BLOCKS if not kind]
    named = {line.removeprefix("RUN/").split()[0].rstrip("/") for line in layout.splitlines()}
    assert {p.name for p in (clone / "runs/digits").iterdir()} >= named


def test_the_python_example_runs_and_finds_wrong_labels(tmp_path):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = int(re.search(r"(\d+) of 25 wrong labels", done.stdout)[1])
    assert found >= 10, "chance would find one"
    assert len(code.splitlines()) < 45


def test_every_option_is_in_the_table():
    flags = [
        f"--{'no-' if field.default is True else ''}{name.replace('_', '-')}`"
        for name, _, field in option_fields()
        if name != "progress"
    ]
    assert [flag for flag in flags if flag not in README] == []
    assert "--no-progress" in README


def test_make_alone_prints_help_and_lists_every_target():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=False)
    for target in ("grads", "stest", "influence", "status", "report", "export", "test", "check", "bench", "clean"):
        assert re.search(rf"^  {target} ", done.stdout, re.MULTILINE), target


def test_make_bench_runs_the_scripts_that_are_there():
    words = ["make", "-n", "bench", "STAMP=LICENSE"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    scripts = re.findall(r"scripts/\S+\.py", done.stdout)
    names = ("grads", "store", "stest", "influence", "job")
    assert scripts == [f"scripts/bench_{name}.py" for name in names]
    assert all((ROOT / script).is_file() for script in scripts)
