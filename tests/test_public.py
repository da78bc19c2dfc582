"""What the package offers is described: every public name has a docstring with an example, and `make test` runs it."""

import inspect
import re

import pytest

import infl_cache
from infl_cache import Run

METHODS = [name for name, _ in inspect.getmembers(Run) if not name.startswith("_")]


@pytest.mark.parametrize("name", infl_cache.__all__)
def test_a_public_name_has_a_docstring_of_its_own_with_an_example(name):
    found = getattr(infl_cache, name)
    assert found.__doc__, name
    assert ">>> " in found.__doc__
    assert found.__doc__ not in {base.__doc__ for base in getattr(found, "__mro__", ())[1:]}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_run_has_a_docstring_and_is_called_in_an_example(name):
    text = inspect.getdoc(getattr(Run, name))
    assert text
    assert re.search(rf"^\s*(>>>|\.\.\.) .*\brun\.{name}\b", f"{Run.__doc__}\n{text}", re.MULTILINE), name
