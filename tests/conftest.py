"""What all tests share: one thread for each process, the same seeds, and the longest files first."""

import builtins
import os
import random
import tempfile

import numpy as np
import pytest
import torch

# Small sums gain nothing from threads, several processes lose by them, and on one thread a sum has one order.
# Children take it from here.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The key by which run.yaml is marked: not that of whoever runs the tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="infl_cache-state-")

# Where files are given out to processes, none of these is to be begun last and waited for alone.
LONGEST = (
    "test_readme.py", "test_kills.py", "test_memory.py", "test_compare_solvers.py", "test_bench_stest.py",
    "test_bench_grads.py",
)  # fmt: skip


def pytest_runtest_setup():
    """Whichever tests ran before in this process, a model that is made anew has the same weights."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def uninstalled(monkeypatch):
    """A function that makes imports of a package fail, as where it is not installed."""
    original = builtins.__import__

    def uninstall(package):
        def without(name, *rest):
            if name.partition(".")[0] == package:
                raise ImportError
            return original(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)

    return uninstall
