"""One HTML file of data, style and code: nothing in it asks the network, and no data is ever markup or code.

The data are JSON in a script element that is not run, with every character escaped that could end it. The policy in the
head allows the one script and the one style sheet of this package, by their digests, and pictures in `data:` addresses.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

# The code of the page, in the order in which it is put together.
SCRIPTS = ("elements.js", "data.js", "charts.js", "cards.js", "overview.js", "tests.js", "trains.js", "main.js")
STYLE, FRAME = "page.css", "page.html"
# The characters of JSON text that mean something to HTML, as JSON's own escapes.
ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def assembled(content: Mapping[str, Any]) -> bytes:
    """The whole file, in ASCII."""
    script, style = code(), asset(STYLE)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:;"
        " base-uri 'none'; form-action 'none'"
    )
    parts, rest = [], asset(FRAME)
    # What was put in is never looked at again: data may hold any of these marks.
    for place, text in (("POLICY", policy), ("STYLE", style), ("DATA", as_json(content)), ("SCRIPT", script)):
        before, _, rest = rest.partition(f"%{place}%")
        parts += [before, text]
    return "".join([*parts, rest]).encode("ascii")


def as_json(content: Any) -> str:
    r"""JSON in ASCII that is safe within a script element; NaN and Inf become null.

    >>> as_json({"</script>": [float("nan"), np.float64(0.5)]})
    '{"\\u003c/script\\u003e":[null,0.5]}'
    """
    text = json.dumps(_plain(content), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in ESCAPES.items():
        text = text.replace(character, escape)
    return text


def _plain(value: Any) -> Any:
    """Without arrays, NumPy's numbers, NaN and Inf."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def code() -> str:
    """The page's code: its files in one function, in strict mode."""
    return '(function () {\n"use strict";\n' + "\n".join(asset(name) for name in SCRIPTS) + "\n})();"


@cache
def asset(name: str) -> str:
    """A file of the folder `html`."""
    return (resources.files("infl_cache.stages.page") / "html" / name).read_text(encoding="ascii")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
