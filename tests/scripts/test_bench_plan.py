"""The script's options."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_plan.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


def test_it_refuses_what_it_does_not_know(tmp_path):
    done = bench(tmp_path, "--workloads", "W4")
    assert done.returncode == 2
    assert "--workloads" in done.stderr
