"""The pages of the manual, Markdown files that lie beside this module: `infl-cache help PAGE` prints one as it is."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable

from infl_cache.config import short
from infl_cache.errors import BadInput


def page_titles() -> dict[str, str]:
    """The first line of each page by its name, in the order of the alphabet.

    >>> page_titles()["plan"]
    'Before anything runs: plan'
    """
    files = {each.name.removesuffix(".md"): each for each in _files() if each.name.endswith(".md")}
    return {name: files[name].read_text("utf-8").partition("\n")[0].lstrip("# ") for name in sorted(files)}


def page(name: str) -> str:
    r"""The text of a page; `BadInput` with the list of pages where there is none of that name.

    >>> page("plan").splitlines()[0]
    '# Before anything runs: plan'
    """
    if name not in page_titles():
        raise BadInput(f"page: expected one of these, found {short(name)}\n{page_list()}")
    return resources.files(__name__).joinpath(f"{name}.md").read_text("utf-8").rstrip("\n")


def page_list() -> str:
    """The names of the pages and their titles, a line each."""
    return "\n".join(f"  {name:12s}  {title}" for name, title in page_titles().items())


def _files() -> list[Traversable]:
    return list(resources.files(__name__).iterdir())
