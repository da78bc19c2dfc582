"""Items made by processes: each has a pipe of its own to this one, and they share no lock.

A process that is killed, by the system when memory runs short, say, may hold a lock or have half a message written at
that moment. Where processes share a queue, as those of torch's loader do, the others then wait for good; and torch
tells of the death by a signal, whose exception comes wherever the main thread just is. Here it is the end of a pipe.

What is left: tensors are asked for through a socket of the process that made them. Where it dies before an item of its
was taken, and has forked a child that lives on, that socket is still open, and is waited for until the child ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import traceback
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import multiprocessing

from infl_cache.errors import BadInput

# What processes may still work on, all together, once nobody waits for them.
LEAVE_SECONDS = 5.0
# How often it is looked whether one is still there: another process may have inherited its end of the pipe.
LOOK_SECONDS = 1.0
TAKEN, LEAVE = "taken", "leave"
REMEDY = "With --workers 0 samples are loaded in this process; what was committed is kept"


class Source(Protocol):
    """What makes an item of a group of indices."""

    def __getitem__(self, group: Sequence[int], /) -> Any: ...


class _Worker(NamedTuple):
    process: Any
    pipe: Any


def items_by_workers(source: Source, groups: Sequence[Sequence[int]], workers: int) -> Generator[Any, None, None]:
    """`source[group]` of each group, in order, made by at most `workers` processes.

    Each makes every `workers`-th item; one waits to be taken while it makes another. They end with the generator: close
    it where it may be left early. An item is handed over as torch does, its tensors moved to shared memory: they must
    be the item's own. The processes start with copies of this one's random generators.

    In place of an item that cannot be made or handed over comes a `BadInput`; one is raised if a process does not
    start or dies, or if an item cannot be taken.
    """
    count, here = min(workers, len(groups)), os.getpid()
    started: list[_Worker] = []
    try:
        for number in range(count):
            started.append(_start(source, groups[number::count], [worker.pipe for worker in started]))
        for number in range(len(groups)):
            yield _next_item(started[number % count])
    finally:
        if os.getpid() == here:  # not in a process that was forked meanwhile and collects its copy
            _end(started)


def _start(source: Source, groups: Sequence[Sequence[int]], others: list[Any]) -> _Worker:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process is ready for it
    try:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=_serve, args=(source, groups, theirs, [*others, ours]), daemon=True)
        process.start()
    except Exception as error:
        raise BadInput(
            f"workers: process {len(others) + 1} could not be started ({error}); fewer --workers, or 0"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()  # from now on the process alone has that end: it closes when the process ends
    return _Worker(process, ours)


def _serve(source: Source, groups: Sequence[Sequence[int]], pipe: Any, others: list[Any]) -> None:
    """In the process: hand over each item; end when nobody takes them any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started us decides what a Ctrl-C means
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(1)  # the threads of a forked process are gone, and other processes have the other cores
    for other in others:
        other.close()
    with contextlib.suppress(EOFError, ConnectionError):
        for number, group in enumerate(groups):
            item = _made(source, group)
            if number and pipe.recv() == LEAVE:
                return
            _hand_over(pipe, item)
        while pipe.recv() != LEAVE:  # what is in shared memory can be had as long as we live
            pass


def _made(source: Source, group: Sequence[int]) -> Any:
    try:
        return source[group]
    except Exception as error:
        lines = traceback.format_exc(limit=-3).rstrip()
        return BadInput(f"workers: samples {group[0]} to {group[-1]} raised {type(error).__name__}: {error}\n{lines}")


def _hand_over(pipe: Any, item: Any) -> None:
    try:
        pipe.send(item)
    except ConnectionError:
        raise
    except Exception as error:
        pipe.send(BadInput(f"workers: an item cannot be handed over by a process ({error}). {REMEDY}"))


def _next_item(worker: _Worker) -> Any:
    process, pipe = worker
    try:
        while not pipe.poll(LOOK_SECONDS):
            if not process.is_alive() and not pipe.poll():
                raise EOFError
        item = pipe.recv()
    except MemoryError:  # as in the process itself: whoever asked goes on with fewer samples
        raise
    except Exception as error:
        if isinstance(error, EOFError | ConnectionError):
            process.join(LOOK_SECONDS)
        raise _missed(process.exitcode, error) from error
    with contextlib.suppress(ConnectionError):  # if it has died since, the next item is missed
        pipe.send(TAKEN)
    return item


def _missed(code: int | None, error: Exception) -> BadInput:
    if code is None:
        return BadInput(
            f"workers: an item could not be taken from a process that loads samples ({type(error).__name__}: {error});"
            f" are as many open files allowed (ulimit -n)? {REMEDY}"
        )
    end = f"signal {-code}; is there memory for so many?" if code < 0 else f"exit code {code}"
    return BadInput(f"workers: a process that loads samples died ({end}). {REMEDY}")


def _end(started: list[_Worker]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for worker in started:
        with contextlib.suppress(OSError):
            worker.pipe.send(LEAVE)
        worker.pipe.close()
    for worker in started:
        worker.process.join(max(0.0, deadline - time.monotonic()))
    for worker in started:
        if worker.process.exitcode is None:
            worker.process.kill()
    for worker in started:
        worker.process.join()
        with contextlib.suppress(ValueError):  # somebody else has taken its exit code: it is thought to run
            worker.process.close()
