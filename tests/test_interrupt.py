"""The first signal is a flag, the second is at once, and nothing of it outlasts the stage."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infl_cache import errors
from infl_cache.errors import Interrupted
from infl_cache.interrupt import SIGNALS, stop_between_blocks

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


class AtOnce(BaseException):
    """What the handlers of these tests raise: a signal that had its usual effect."""


@pytest.fixture(autouse=True)
def handlers():
    """Handlers that were there before the stage, and that no signal of a test can end the test run with."""

    def at_once(signum, frame):
        raise AtOnce(signum)

    before = {each: signal.signal(each, at_once) for each, _ in CODES}
    yield dict.fromkeys(before, at_once)
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize(("signum", "code"), CODES)
def test_the_first_signal_is_told_at_the_next_check_and_not_before(signum, code):
    reached = []

    def stage():
        with stop_between_blocks() as check:
            check()
            os.kill(os.getpid(), signum)
            reached.append("the block in flight is finished")
            check()
            reached.append("never")

    with pytest.raises(Interrupted, match=signal.Signals(signum).name) as stopped:
        stage()
    assert reached == ["the block in flight is finished"]
    assert stopped.value.exit_code == code


def test_a_stage_without_a_signal_is_never_stopped():
    with stop_between_blocks() as check:
        for _ in range(3):
            check()


@pytest.mark.parametrize("leave", ["normally", "by an error", "by the interruption"])
def test_the_handlers_are_put_back(handlers, leave):
    try:
        with stop_between_blocks() as check:
            assert all(signal.getsignal(each) != handlers[each] for each in SIGNALS)
            if leave == "by an error":
                raise ZeroDivisionError
            if leave == "by the interruption":
                os.kill(os.getpid(), signal.SIGINT)
                check()
    except (ZeroDivisionError, Interrupted):
        pass
    assert {each: signal.getsignal(each) for each in SIGNALS} == handlers


@pytest.mark.parametrize("second", SIGNALS)
def test_after_the_first_signal_the_second_has_its_usual_effect(handlers, second):
    with stop_between_blocks() as check:
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(second) == handlers[second]
        with pytest.raises(AtOnce):
            os.kill(os.getpid(), second)
        with pytest.raises(Interrupted):
            check()


def test_a_signal_that_no_check_has_read_is_not_lost():
    with pytest.raises(Interrupted), stop_between_blocks():
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_of_the_stage_is_not_hidden_by_a_signal():
    def stage():
        with stop_between_blocks():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stage()


CHILD = """
import sys, types
root = types.ModuleType("infl_cache")  # the package root imports torch, which a signal does not need
root.__path__ = [sys.argv[1]]
sys.modules["infl_cache"] = root
from infl_cache.interrupt import stop_between_blocks
with stop_between_blocks():
    print("ready", flush=True)
    while True:
        try:
            line = sys.stdin.readline()
        finally:
            print("back", flush=True)
        print("still here", flush=True)
"""


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize(("second", "returncode"), [(signal.SIGINT, (-2, 1, 130)), (signal.SIGTERM, (-15,))])
def test_the_second_signal_ends_the_process_at_once(first, second, returncode):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen([sys.executable, "-c", CHILD, Path(errors.__file__).parent], text=True, **pipes)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(first)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "back\n"
        assert child.stdout.readline() == "still here\n"
        child.send_signal(second)
        assert child.wait(timeout=10) in returncode
    finally:
        child.kill()
        child.communicate()


def test_outside_the_main_thread_nothing_is_installed_and_nothing_raised(handlers):
    seen = []

    def stage():
        with stop_between_blocks() as check:
            check()
            seen.append({each: signal.getsignal(each) for each in SIGNALS})

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert seen == [handlers]
