"""Items made by processes: in order, and whatever becomes of a process it is said, never waited for."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from torch import multiprocessing

from infl_cache import BadInput
from infl_cache.maths import workers
from infl_cache.maths.workers import items_by_workers


class Doubled:
    """Twice the numbers of a group, as a tensor; `meanwhile(group)` is called in the process that makes it."""

    def __init__(self, meanwhile=lambda group: None):
        self.meanwhile = meanwhile

    def __getitem__(self, group):
        self.meanwhile(group)
        return 2 * torch.tensor(group)


def groups_of(count):
    return [[number, number + 1] for number in range(count)]


def taken(source, groups, count=2, between=lambda number: None):
    """All items as lists; `between` is called after each."""
    found = []
    for item in items_by_workers(source, groups, count):
        found.append(item.tolist())
        between(len(found))
    return found


def ends(process):
    """Whether it ends soon."""
    return process in psutil.wait_procs([process], timeout=20)[0] or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_items_come_in_the_order_of_their_groups(count):
    groups = groups_of(7)
    assert taken(Doubled(), groups, count) == [[2 * number for number in group] for group in groups]
    assert not multiprocessing.active_children()


def test_each_process_has_one_item_ready_and_another_made(tmp_path):
    made = []

    def between(number):
        # The next of this process is handed over, the one after it made, by the other process as well.
        wanted, until = min(12, number + 4), time.perf_counter() + 20
        while len(list(tmp_path.iterdir())) < wanted and time.perf_counter() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        made.append(len(list(tmp_path.iterdir())) - number)

    taken(Doubled(lambda group: (tmp_path / str(group[0])).touch()), groups_of(12), between=between)
    assert made == [4] * 8 + [3, 2, 1, 0]


@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_a_death_is_said_when_the_next_item_of_it_is_asked_for(which):
    def kill(number):
        if number == 1:
            for child in [multiprocessing.active_children()[one] for one in which]:
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.2)

    with pytest.raises(BadInput, match=r"a process that loads samples died.*signal 9.*--workers 0"):
        taken(Doubled(), groups_of(5000), between=kill)
    assert not multiprocessing.active_children()


def test_an_exit_is_said_with_its_code():
    with pytest.raises(BadInput, match=r"died.*exit code 3"):
        taken(Doubled(lambda group: group[0] == 4 and os._exit(3)), groups_of(9))


def test_deaths_at_any_moment_are_said_and_never_waited_for():
    moments, said = random.Random(0), 0
    for _ in range(60):
        at = time.perf_counter() + moments.uniform(0, 0.01)

        def kill(number, at=at):
            if time.perf_counter() > at:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)

        with pytest.raises(BadInput, match="workers: "):
            taken(Doubled(), groups_of(5000), between=kill)
        said += 1
    assert said == 60


def test_an_item_that_cannot_be_handed_over_is_said():
    class Unpicklable:
        def __getitem__(self, group):
            return lambda: group

    [item] = items_by_workers(Unpicklable(), [[0]], 1)
    assert isinstance(item, BadInput)
    assert "cannot be handed over" in str(item)


def test_left_early_the_processes_end(monkeypatch):
    monkeypatch.setattr(workers, "LEAVE_SECONDS", 1.0)
    # All but the first wait for good at their second item: they are waited for together.
    items = items_by_workers(Doubled(lambda group: time.sleep(100 if 5 < group[0] < 20 else 0)), groups_of(40), 5)
    next(items)
    assert len(multiprocessing.active_children()) == 5
    time.sleep(0.1)
    started = time.perf_counter()
    items.close()
    assert time.perf_counter() - started < 3.5
    assert not multiprocessing.active_children()


def test_what_cannot_be_taken_is_said():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    Odd.__qualname__ = "Odd"
    globals()["Odd"] = Odd

    class Gives:
        def __getitem__(self, group):
            return Odd(1, 2)

    with pytest.raises(BadInput, match=r"could not be taken.*TypeError.*--workers 0"):
        list(items_by_workers(Gives(), [[0], [1]], 2))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError, ZeroDivisionError])
def test_an_exception_of_the_source_is_handed_over_with_its_traceback(error):
    def fail(group):
        raise error("the source's own")

    [item] = items_by_workers(Doubled(fail), [[7]], 1)
    assert isinstance(item, BadInput)
    assert f"{error.__name__}: the source's own" in str(item)
    assert "Traceback" in str(item)


def test_a_process_that_cannot_be_started_is_said_and_the_others_end(monkeypatch):
    start = workers._start

    class Full:
        def __init__(self, **given):
            raise BlockingIOError("no more processes")

    def second_fails(source, groups, others):
        if others:
            monkeypatch.setattr(multiprocessing, "Process", Full)
        return start(source, groups, others)

    monkeypatch.setattr(workers, "_start", second_fails)
    with pytest.raises(BadInput, match=r"process 2 could not be started.*no more processes"):
        taken(Doubled(), groups_of(6))
    assert not multiprocessing.active_children()


def test_processes_end_at_once_though_others_have_inherited_their_pipes():
    first, second = (items_by_workers(Doubled(), groups_of(40), 2) for _ in range(2))
    next(first), next(second)
    started = time.perf_counter()
    first.close()
    second.close()
    assert time.perf_counter() - started < 4
    assert not multiprocessing.active_children()


def fork_a_child_and_die(group):
    if group[0] == 4:
        time.sleep(1)  # until its tensors were taken, which are to be had of itself alone
        if os.fork() == 0:
            time.sleep(15)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_is_said_though_a_child_of_the_process_lives():
    started = time.perf_counter()
    with pytest.raises(BadInput, match=r"died.*signal 9"):
        taken(Doubled(fork_a_child_and_die), groups_of(9))
    assert time.perf_counter() - started < 10


IGNORED = """
import signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
from infl_cache.maths.workers import items_by_workers

class Source:
    def __getitem__(self, group):
        return group

print(list(items_by_workers(Source(), [[number] for number in range(6)], 2)))
"""


def test_ended_children_that_the_system_forgets_at_once_are_no_error():
    done = subprocess.run([sys.executable, "-c", IGNORED], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[[0], [1], [2], [3], [4], [5]]\n", "")


def test_a_copy_of_them_in_a_forked_process_ends_nothing():
    items = items_by_workers(Doubled(), groups_of(6), 2)
    found = [next(items)]
    child = os.fork()
    if child == 0:
        try:
            items.close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found.extend(items)
    assert len(found) == 6


def test_a_ctrl_c_is_left_to_whoever_started_them():
    def interrupt(number):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGINT)

    for _ in range(20):
        assert len(taken(Doubled(), groups_of(6), 3, between=interrupt)) == 6


def test_loading_draws_nothing_from_the_random_generators():
    before = torch.get_rng_state(), random.getstate()
    taken(Doubled(), groups_of(6))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


ORPHANS = """
import sys, time
from torch import multiprocessing
from infl_cache.maths.workers import items_by_workers

class Source:
    def __getitem__(self, group):
        return [0] * 100_000

items = items_by_workers(Source(), [[number] for number in range(1000)], 3)
next(items)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(100)
"""


def test_the_processes_of_a_killed_process_end_with_it():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    children = [psutil.Process(int(number)) for number in parent.stdout.readline().split()]
    assert len(children) == 3
    parent.kill()
    parent.communicate(timeout=20)
    assert all(ends(child) for child in children)
