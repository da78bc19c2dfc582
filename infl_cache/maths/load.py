"""The user's task by its name: `path/to/file.py:function` or `package.module:function`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infl_cache.config import short
from infl_cache.errors import BadInput
from infl_cache.maths.task import Task, blaming

# Characters of a reference: what is longer is no name, and nobody wants to read it again in a message.
LONGEST = 2000


def load_task(reference: str, arguments: Mapping[str, Any] | None = None) -> Task:
    r"""The task that `path/to/file.py:function` or `package.module:function` returns, called with `arguments`.

    Raises `BadInput` if there is no such file or function, if it fails, or returns something else.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "mine.py")
    >>> _ = file.write_text(
    ...     "import torch\nfrom infl_cache import Task\n\n"
    ...     "def line(n=3):\n"
    ...     "    data = torch.utils.data.TensorDataset(torch.ones(n, 1), torch.ones(n, 1))\n"
    ...     "    loss = lambda outputs, targets: (outputs - targets).square().sum(1)\n"
    ...     "    return Task(model=torch.nn.Linear(1, 1), train=data, test=data, loss=loss)\n"
    ... )
    >>> len(load_task(f"{file}:line", {"n": 5}).train)
    5
    """
    place, colon, name = str(reference).rpartition(":")
    if not colon or not name.isidentifier() or len(str(reference)) > LONGEST:
        raise BadInput(f"task: expected path/to/file.py:function or package.module:function, found {short(reference)}")
    function = getattr(_load_module(place), name, None)
    if not callable(function):
        raise BadInput(f"task: expected a function {name} in {place}, found none")
    given = dict(arguments or {})
    try:
        inspect.signature(function).bind(**given)
    except TypeError as error:
        raise BadInput(f"task: {reference} cannot be called with {given}: {error}") from error
    with blaming(f"task: {reference}"):
        task = function(**given)
    if not isinstance(task, Task):
        raise BadInput(f"task: expected {reference} to return an infl_cache.Task, found {type(task).__name__}")
    return task


def _load_module(place: str) -> Any:
    if not place.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        with blaming(f"task: module {place}"):
            try:
                return importlib.import_module(place)
            except ModuleNotFoundError as error:
                if error.name is not None and f"{place}.".startswith(f"{error.name}."):
                    raise BadInput(
                        f"task: expected a Python module, found none called {error.name}; is it on PYTHONPATH, or did"
                        " you mean path/to/file.py:function?"
                    ) from None
                raise
    # `os.path` answers for names that no file can have, too.
    path = Path(os.path.realpath(place)) if "\0" not in place else Path()
    if not os.path.isfile(path):
        raise BadInput(f"task: expected a Python file, found none at {place}")
    # Its neighbours can be imported, and its classes pickled for worker processes, as if it had been run.
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"task: {place} cannot be loaded as a Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        with blaming(f"task: {place}"):
            spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[path.stem]
        else:
            sys.modules[path.stem] = before
        raise
    return module
