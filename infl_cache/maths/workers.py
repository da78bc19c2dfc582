"""Items made by processes: each has a pipe of its own to this one, and they share no lock.

A process that is killed, by the system when memory runs short, say, may hold a lock or have half a message written at
that moment. Where processes share a queue, as those of torch's loader do, the others then wait for good; and torch
tells of the death by a signal, whose exception comes wherever the main thread just is. Here it is the end of a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import multiprocessing

from infl_cache.errors import BadInput

# What a process may still work on once nobody waits for it.
LEAVE_SECONDS = 5.0
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
    it where it may be left early. An item is handed over as torch does, its tensors in shared memory.

    Raises `BadInput` if a process dies, or if an item cannot be handed over.
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
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(source, groups, theirs, [*others, ours]), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process is ready for it
    try:
        process.start()
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
            item = source[group]
            if number:
                pipe.recv()  # the one before was taken
            _hand_over(pipe, item)
        while True:  # what is in shared memory can be had as long as we live
            pipe.recv()


def _hand_over(pipe: Any, item: Any) -> None:
    try:
        pipe.send(item)
    except ConnectionError:
        raise
    except Exception as error:
        pipe.send(BadInput(f"workers: an item cannot be handed over by a process ({error}). {REMEDY}"))


def _next_item(worker: _Worker) -> Any:
    try:
        item = worker.pipe.recv()
        with contextlib.suppress(ConnectionError):  # if it has died since, the next item is missed
            worker.pipe.send(None)
        return item
    except (EOFError, OSError) as error:
        worker.process.join(1)
        code = worker.process.exitcode
        if code is None:
            raise BadInput(
                f"workers: an item could not be taken from a process that loads samples ({error}). {REMEDY}"
            ) from error
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise BadInput(
            f"workers: a process that loads samples died ({end}); is there memory for so many? {REMEDY}"
        ) from error


def _end(started: list[_Worker]) -> None:
    for worker in started:
        worker.pipe.close()
    for worker in started:
        worker.process.join(LEAVE_SECONDS)
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        worker.process.close()
