"""Work in a thread behind the loop: in order, bounded, errors at once, nothing lost on leaving."""

import subprocess
import sys
import threading
import time

import pytest

from infl_cache.stages.behind import Behind


def test_items_are_worked_on_in_order_and_all_are_done_on_leaving():
    done = []
    with Behind(lambda item: (time.sleep(0.002), done.append(item))) as behind:
        for number in range(20):
            behind.put(number)
    assert done == list(range(20))


@pytest.mark.parametrize("waiting", [1, 3])
def test_no_more_than_the_allowed_items_wait(waiting):
    started, go = [], threading.Event()

    def work(item):
        started.append(item)
        go.wait(5)

    with Behind(work, waiting) as behind:
        put = []

        def fill():
            for number in range(waiting + 3):
                behind.put(number)
                put.append(number)

        filler = threading.Thread(target=fill)
        filler.start()
        time.sleep(0.3)
        assert started == [0]
        assert len(put) == waiting + 1
        go.set()
        filler.join()
    assert started == list(range(waiting + 3))


def test_an_error_comes_out_of_a_following_put_and_ends_the_work():
    done = []

    def work(item):
        if item == 2:
            raise OSError("the disk went away")
        done.append(item)

    put = []

    def loop():
        with Behind(work) as behind:
            for number in range(1000):
                behind.put(number)
                put.append(number)
                time.sleep(0.001)

    with pytest.raises(OSError, match="went away"):
        loop()
    assert done == [0, 1]
    assert len(put) < 20
    assert threading.active_count() == len(threading.enumerate())


def test_an_error_of_the_last_item_comes_out_on_leaving():
    def work(item):
        time.sleep(0.01)
        raise ValueError(item)

    with pytest.raises(ValueError, match="7"), Behind(work) as behind:
        behind.put(7)


def test_leaving_by_an_exception_finishes_what_was_put_and_ends_the_thread():
    done = []

    def stopped():
        with Behind(lambda item: (time.sleep(0.01), done.append(item)), 5) as behind:
            for number in range(4):
                behind.put(number)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert done == [0, 1, 2, 3]
    assert not any(thread.name == "infl_cache-writer" for thread in threading.enumerate())


def test_a_blocked_put_is_released_when_the_work_fails():
    go = threading.Event()

    def work(item):
        go.wait(5)
        raise RuntimeError("broken")

    def loop():
        with Behind(work) as behind:
            threading.Timer(0.2, go.set).start()
            for number in range(5):
                behind.put(number)

    started = time.perf_counter()
    with pytest.raises(RuntimeError, match="broken"):
        loop()
    assert time.perf_counter() - started < 3


# A second Ctrl-C raises wherever the main thread just is.
STORM = """
import random, signal
from infl_cache.stages.behind import Behind

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
moments = random.Random(0)
for _ in range(300):
    try:
        with Behind(lambda item: None) as behind:
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(5e-5, 6e-4))
            while True:
                behind.put(0)
    except KeyboardInterrupt:
        pass
"""


def test_an_exception_of_a_signal_at_any_moment_leaves_nothing_locked():
    subprocess.run([sys.executable, "-c", STORM], check=True, timeout=60)
