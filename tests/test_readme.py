"""Every command and every code block of the README and of the pages is run, in the order in which they stand there."""

import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from infl_cache import errors
from infl_cache.__main__ import main
from infl_cache.arguments import GROUPS, HELP, parser
from infl_cache.config import option_fields
from infl_cache.pages import page, page_titles

pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
# Retrainings: some are enough to see that a command works.
OFTEN, FEWER = ("--points", "--subsets"), {"40": "6", "20": "3", "8": "3"}
# Its blocks need a model and loaders; tests/ptif/test_migration.py runs them.
MIGRATION = "infl_cache/pages/migration.md"
PAGES = [f"infl_cache/pages/{name}.md" for name in page_titles()]
DOCUMENTS = ["README.md", *PAGES, "scripts/README.md", "CONTRIBUTING.md"]
# What would call this test again, take minutes or make an environment inside one, is only shown by make, not run.
SHOWN = {"make test", "make check", "make faults", "make bench"}


def blocks(document):
    """The kind and the text of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(document):
    return [line for kind, text in blocks(document) if kind == "sh" for line in text.strip().splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what a user has after cloning, with this interpreter's environment in place of `.venv`."""
    here = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "scripts", here / "scripts")
    (here / "installed").touch()
    return here


@pytest.fixture
def with_demo(clone):
    """The clone after `make influence`, which the README has run, or is run here."""
    if not (clone / "runs/digits/influence.npy").exists():
        assert run("infl-cache run --task scripts/digits.py:digits --run runs/digits", clone)[0] == 0
    return clone


def run(line, here):
    """Exit code and output of one line, as in a shell; `infl-cache` itself without starting a process."""
    words = [FEWER.get(word, word) if before in OFTEN else word
             for before, word in pairwise(["", *shlex.split(line)])]  # fmt: skip
    if words[0] == "infl-cache":
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return main(words[1:]), out.getvalue() + err.getvalue()
    assert words[0] in ("make", "cp", "git")
    if words[0] == "make":
        dry = ["-n"] if line in SHOWN else []
        words = ["make", *dry, f"BIN={Path(sys.executable).parent}", "STAMP=installed", *words[1:]]
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_every_command_of_the_readme_works_and_the_outputs_are_there(clone):
    lines = commands("README.md")
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


@pytest.mark.parametrize("document", [*PAGES, "CONTRIBUTING.md"])
def test_every_command_and_block_of_a_page_works(with_demo, document):
    for kind, text in blocks(document):
        for line in text.strip().splitlines() if kind == "sh" else ():
            code, output = run(line, with_demo)
            assert code == 0, f"{line}\n{output}"
        if kind == "python" and document != MIGRATION:
            with contextlib.chdir(with_demo), contextlib.redirect_stdout(io.StringIO()):
                exec(compile(text, document, "exec"), {"__name__": "page"})


def test_the_layout_of_the_run_folder_is_what_a_run_has(with_demo):
    (layout,) = [text for kind, text in blocks("infl_cache/pages/run-folder.md") if not kind]
    named = {line.removeprefix("RUN/").split()[0].rstrip("/") for line in layout.splitlines()}
    later = {"self_influence.zarr", "self_influence.npz", "influence_by_layer.npy", "by_layer.npz", "validate"}
    found = {path.name for path in (with_demo / "runs/digits").iterdir()}
    assert found | later >= named
    if "self_influence.npz" in found:  # the page about it has been run
        assert found >= named


def test_the_python_example_runs_and_finds_wrong_labels(tmp_path):
    (code,) = [text for kind, text in blocks("README.md") if kind == "python"]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = int(re.search(r"(\d+) of 25 wrong labels", done.stdout)[1])
    assert found >= 10, "chance would find one"
    lines = code.splitlines()
    assert len(lines) < 45
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(each)) for each in ("task =", "run.all()"))
    assert 1 + last - first + 1 == 9, "as the README says"
    assert "nine of these lines are new" in README


def test_the_examples_are_called_as_the_command_line_allows():
    lines = commands("scripts/README.md")
    assert len(lines) >= 5
    for line in lines:
        parser().parse_args(shlex.split(line)[1:])
        assert (ROOT / re.search(r"--task (\S+\.py):", line)[1]).is_file()


def test_every_option_is_in_the_table():
    flags = [
        f"--{'no-' if field.default is True else ''}{name.replace('_', '-')}`"
        for name, _, field in option_fields()
        if name != "progress"
    ]
    assert [flag for flag in flags if flag not in README] == []
    assert "--no-progress" in README


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) < 400
    assert [name for name in HELP if f"`{name}`" not in README] == []
    assert [page for page in PAGES if f"({page})" not in README] == []


def anchors(text):
    """The names by which the headings of a Markdown text are linked to."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_a_link_that_leads_nowhere_would_be_found():
    assert anchors("# A b: c\n```\n# no\n```\n## How right it is") == {"a-b-c", "how-right-it-is"}


def raised():
    """Every error that is raised on purpose: its class and what it says, values left out."""

    def words(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        parts = node.values if isinstance(node, ast.JoinedStr) else ()
        return "".join(words(part) if not isinstance(part, ast.FormattedValue) else "\0" for part in parts)

    for path in sorted((ROOT / "infl_cache").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                if hasattr(errors, node.func.id):
                    yield getattr(errors, node.func.id), words(node.args[0])
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                yield errors.BadInput, str(node.value.value)  # messages that are kept in a name


def test_every_message_on_the_page_of_errors_is_said_with_that_exit_code():
    codes, said, looked_at = set(), list(raised()), 0
    for line in page("errors").splitlines():
        if line.startswith("## "):
            codes = {int(code) for code in re.findall(r"\d+", line.partition(":")[0])}
        for part in re.findall(r"`([^`]+)`", line.split(" | ")[0]) if codes and line.startswith("| `") else ():
            fitting = {130 if kind is errors.Interrupted else kind.exit_code for kind, text in said if part in text}
            assert fitting & codes, part
            looked_at += 1
    assert looked_at > 60


def test_help_prints_the_list_and_each_page_as_it_is(capsys):
    assert main(["help"]) == 0
    listed = capsys.readouterr().out
    for name, title in page_titles().items():
        assert f"  {name} " in listed
        assert title in listed
        assert main(["help", name]) == 0
        assert capsys.readouterr().out == (ROOT / f"infl_cache/pages/{name}.md").read_text()
    assert main(["help", "nothing"]) == 2
    refused = capsys.readouterr().err
    assert "page: expected one of these, found 'nothing'" in refused
    assert "  solvers " in refused


def test_the_overview_has_every_command_once_and_the_pages_ship_with_the_package(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name in HELP:
        assert len(re.findall(rf"^ +{name} ", shown, re.MULTILINE)) == 1, name
    assert {name for names in GROUPS.values() for name in names} <= set(HELP)
    assert "infl_cache.pages = *.md" in (ROOT / "setup.cfg").read_text()


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
