"""Children to be killed: forked from a server that has imported everything and computed nothing.

So they start at once and may use threads.
"""

import importlib
import multiprocessing
import os
import signal
import time

import pytest  # noqa: F401

import infl_cache  # noqa: F401

# What torch imports at its first product: a second's work in every child that does it by itself.
importlib.import_module("torch._dynamo")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def started(target, *arguments):
    """A child that calls `target(*arguments)`."""
    child = CONTEXT.Process(target=target, args=arguments)
    child.start()
    return child


def wait_for_lines(child, log, count):
    """Until the file `log` has so many lines, or the child has ended."""
    while child.exitcode is None and (not log.exists() or log.read_bytes().count(b"\n") < count):
        time.sleep(0.001)


def killed(child):
    """Whether a child that may still be running was killed; it has ended in any case, and not by an error."""
    if child.exitcode is None:
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def note(log, text):
    """Append a line at once, whatever happens next."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)
