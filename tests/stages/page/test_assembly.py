"""The one file: data that cannot run, a policy that lets nothing else run, everything in the package."""

import base64
import configparser
import hashlib
import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from infl_cache.stages.page.assembly import FRAME, SCRIPTS, STYLE, as_json, assembled, asset
from tests.scripts.running import ROOT

HOSTILE = (
    "</script><script>document.title='run'</script>", "<!--<script>", "]]>", "%SCRIPT% %DATA% %STYLE% %POLICY%",
    '"\'`${1}\\', "\u2028\u2029\u202e\x00\x1b\x7f", "\ud800", "\U0001f600 \u00e9", "&lt;&#60;", "javascript:alert(1)",
)  # fmt: skip


class Page(HTMLParser):
    """The elements of a page, their attributes, and the text of each script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.pieces, self.within = [], {}, None
        self.feed(text)
        self.close()
        self.texts = [(self.elements[at], "".join(pieces)) for at, pieces in self.pieces.items()]

    def handle_starttag(self, tag, attributes):
        self.within = len(self.elements) if tag in ("script", "style") else None
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.within = None

    def handle_data(self, text):
        if self.within is not None:
            self.pieces.setdefault(self.within, []).append(text)


def data_of(page):
    page = Page(page.decode("ascii"))
    ((_, text),) = [each for each in page.texts if each[0][1].get("id") == "data"]
    return json.loads(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_the_data_say_they_are_data(text):
    content = {"run": text, text: [text, {"text": text}]}
    page = assembled(content)
    assert data_of(page) == content
    assert [tag for tag, _ in Page(page.decode()).elements] == [tag for tag, _ in Page(assembled({}).decode()).elements]


def test_the_policy_allows_this_script_and_this_style_alone():
    page = Page(assembled({"a": HOSTILE}).decode())
    policy = next(each["content"] for tag, each in page.elements if each.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert allowed["img-src"] == "data:"
    for place, tag in (("script-src", "script"), ("style-src", "style")):
        ((_, text),) = [each for each in page.texts if each[0][0] == tag and "id" not in each[0][1]]
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[place] == f"'sha256-{digest}'"


def test_nothing_leads_out_of_the_page_and_no_data_become_markup():
    text = re.sub(r'"http://www.w3.org/2000/svg"', "", assembled({}).decode())
    assert not re.search(r"https?:|url\(|@import|src=|fetch\(|XMLHttpRequest|import\(", text)
    code = "".join(asset(name) for name in SCRIPTS)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser", code)


def test_numbers_that_json_has_not_become_null():
    assert json.loads(as_json([float("nan"), float("inf"), -0.5])) == [None, None, -0.5]


def test_every_file_of_the_page_is_in_the_package_and_used():
    folder = resources.files("infl_cache.stages.page") / "html"
    names = sorted(each.name for each in folder.iterdir())
    assert names == sorted([*SCRIPTS, STYLE, FRAME])
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["options.package_data"]["infl_cache.stages.page"] == "html/*"
    assert max(Path(str(folder / name)).read_text().count("\n") for name in names) <= 300
