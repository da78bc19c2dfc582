"""What tests of the page share."""

import pytest


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """The picture beside the page, which takes longer than it, is tested elsewhere."""
    monkeypatch.setattr("infl_cache.stages.report.draw", lambda *_: None)
