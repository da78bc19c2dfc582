"""Progress is shown to people and to nobody else."""

import io
import types

import pytest
from tqdm import tqdm

from infl_cache import progress as progress_module
from infl_cache.progress import human_bytes, human_seconds, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screens(monkeypatch):
    """`screens(file)` makes `file` the stderr that progress sees."""

    def show_on(file):
        monkeypatch.setattr(progress_module, "sys", types.SimpleNamespace(stderr=file))
        return file

    return show_on


@pytest.fixture
def terminal(screens, monkeypatch):
    """A stderr that is looked at, and a bar that is shown from the start."""
    screen = screens(Terminal())
    monkeypatch.setattr(progress_module, "tqdm", lambda **options: tqdm(**{**options, "delay": 0, "mininterval": 0}))
    return screen


def test_a_bar_shows_name_counts_bytes_and_note(terminal):
    with progress("grads", total=400, done=100, unit="row") as bar:
        bar.advance(150, 2_500_000)
        bar.advance(50, 500_000, "residual 1e-3")
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("grads")
    for shown in ("75%", "300/400", "row/s", "3.0 MB, residual 1e-3"):
        assert shown in last


def test_a_note_is_shown_without_bytes_too(terminal):
    with progress("stest", total=2) as bar:
        bar.advance(1, note="iteration 7")
    assert "iteration 7" in terminal.getvalue()


@pytest.mark.parametrize("show", [True, False])
def test_nothing_is_written_where_nobody_looks_or_nobody_wants_it(terminal, screens, show):
    screen = screens(io.StringIO()) if show else terminal
    with progress("grads", total=4, show=show) as bar:
        bar.advance(4, 100, "note")
    assert screen.getvalue() == ""


def test_short_work_shows_no_bar(screens):
    screen = screens(Terminal())
    with progress("grads", total=4) as bar:
        bar.advance(3)
    assert "grads" not in screen.getvalue()


def test_an_error_goes_through_the_bar(terminal):
    with pytest.raises(ZeroDivisionError), progress("grads", total=4):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123_456, "123 kB"),
        (5 * 10**9, "5.0 GB"),
        (2.5e12, "2.5 TB"),
        (1.5e18, "1,500.0 PB"),
        (999_999, "1.0 MB"),
        (999_950_000, "1.0 GB"),
    ],
)
def test_bytes_for_people(n, text):
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.9, "59.9 s"),
        (60, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (90_000, "25 h 00 min"),
        (59.97, "1 min 00 s"),
    ],
)
def test_seconds_for_people(seconds, text):
    assert human_seconds(seconds) == text
