"""What tests of the scripts share."""

import importlib

import pytest

from tests.scripts.running import ROOT


@pytest.fixture
def scripts(monkeypatch):
    """A function that imports a script."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module
