"""Scripts run as a user runs them, and, where they refuse what they were asked, without starting a process."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ran(script, folder, *arguments):
    """A script in a process of its own, in `folder`."""
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


def refused(script, folder, *arguments):
    """The exit code with which a script refuses arguments, and what it says."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.syspath_prepend(ROOT / "scripts")
        patch.chdir(folder)
        main = importlib.import_module(script).main
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
    return left.value.code, said.getvalue()
