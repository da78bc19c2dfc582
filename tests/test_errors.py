"""The errors and what the command line makes of them."""

import inspect
import signal

import pytest

from infl_cache import errors
from infl_cache.errors import InflCacheError, Interrupted

CODES = {
    "BadInput": 2,
    "ForeignRun": 3,
    "DamagedStore": 4,
    "IncompleteStore": 4,
    "DiskFull": 5,
    "Locked": 6,
}


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_each_error_has_its_exit_code_and_keeps_its_message(name, code):
    error = getattr(errors, name)("expected a, found b")
    assert isinstance(error, InflCacheError)
    assert error.exit_code == code
    assert str(error) == "expected a, found b"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_exits_like_the_signal(signum, code):
    error = Interrupted("stopped", signum)
    assert isinstance(error, InflCacheError)
    assert not isinstance(error, KeyboardInterrupt)
    assert error.exit_code == code
    assert str(error) == "stopped"


def test_every_error_of_the_module_is_listed_here():
    classes = {name for name, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)}
    assert classes == {*CODES, "InflCacheError", "Interrupted"}


def test_no_error_but_success_exits_with_zero():
    assert InflCacheError("x").exit_code == 1
