"""The page in a real browser: it opens alone, shows what it holds, and nothing in it runs that is data."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from infl_cache import Run, Task
from infl_cache.stages.page.assembly import asset
from tests.tasks import Samples, cross_entropy

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason="needs chromium and its driver")

ALONE = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
HOSTILE = (
    "</script><script>window.ran = 1</script>", "<img src=x onerror='window.ran = 2'>", "<svg/onload=window.ran=3>",
    "<!-- <script >", "</script a", "\"'><b id=injected>", "javascript:window.ran=4",
    "\u2028\u202e %SCRIPT% \U0001f600",
)  # fmt: skip
N_TRAIN, N_TEST = 24, 12

# Of the text in view the pairs of colours whose contrast is too low: WCAG's relative luminance, 4.5 for text.
CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgb(colour) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(colour) {
  const [r, g, b] = colour.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = rgb(getComputedStyle(at).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return rgb(getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "#121212" : "#ffffff");
}
const low = [];
let looked = 0;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length || element.closest(".unseen, script, title")) continue;
  const style = getComputedStyle(element), isSvg = element instanceof SVGElement;
  const [a, b] = [luminance(rgb(isSvg ? style.fill : style.color)), luminance(behind(element))].sort((x, y) => y - x);
  looked += 1;
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push([element.tagName, element.className, element.textContent.slice(0, 30)]);
}
return [looked, low];
"""


def reviews():
    """Texts with labels, some of them hostile; two words decide."""
    torch.manual_seed(0)
    samples = []
    for index in range(N_TRAIN + N_TEST):
        text = f"{HOSTILE[index % len(HOSTILE)]} number {index} {'fine' if index % 2 else 'poor'}"
        samples.append({"text": text, "x": torch.randn(3) + index % 2, "y": index % 2})
    model = torch.nn.Linear(3, 2)
    return Task(
        model=model, train=Samples(samples[:N_TRAIN]), test=Samples(samples[N_TRAIN:]), loss=cross_entropy,
        collate=lambda batch: (torch.stack([each["x"] for each in batch]), torch.tensor([each["y"] for each in batch])),
        classes=["<i>poor</i></script>", "fine\"'"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Path and content of a page with hostile names everywhere, one test sample left out of it."""
    run = Run(
        tmp_path_factory.mktemp("page") / "<b>run",
        reviews(),
        damping=0.1,
        solver="exact",
        progress=False,
        by_layer=True,
    )
    run.all()
    path = run.report(tests=range(N_TEST - 1), neighbours=3)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return path, json.loads(text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser of its own, with a log of its console and of what it asks the network for."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for each in (*ALONE, f"--user-data-dir={profile}", "--window-size=1200,900"):
        options.add_argument(each)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    try:
        yield made
    finally:
        made.quit()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def opened(browser, page):
    """A function that opens a part of the page, afresh, in a colour scheme and a width."""

    def go(part="", scheme="light", width=1200):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get("about:blank")
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(f"{page[0].as_uri()}#{part}")
        return browser

    return go


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
    return browser.execute_script(script, selector)


def hrefs(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.getAttribute('href'))"
    return browser.execute_script(script, selector)


def click(browser, selector):
    browser.find_element("css selector", selector).click()


def keys(browser, text):
    browser.switch_to.active_element.send_keys(text)


def address(browser):
    return browser.execute_script("return location.hash")


def settled(browser):
    """Once events of the address have come."""
    browser.execute_async_script("const done = arguments[0]; setTimeout(() => requestAnimationFrame(() => done()), 30)")


def test_no_digit_before_the_point_is_made_up(browser):
    numbers = [452600.5, -1234.5, 999.96, 12.345, 0.0012345, 1e-4, 2.5e7, 0]
    script = asset("elements.js") + "\nreturn arguments[0].map((each) => number(each));"
    found = browser.execute_script(script, numbers)
    assert found == ["452601", "-1235", "1000", "12.3", "0.00123", "1.00e-4", "2.50e+7", "0"]


@pytest.mark.parametrize("part", ["", "tests", "trains", "test-3", "train-5", "test-99", "nonsense"])
def test_it_opens_without_an_error_and_asks_the_network_for_nothing(opened, part):
    browser = opened(part)
    assert texts(browser, "h1") != []
    assert browser.get_log("browser") == []
    asked = [json.loads(each["message"])["message"] for each in browser.get_log("performance")]
    urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("data:", "file:"))] == []
    assert [url for url in urls if url.startswith("file:") and "index.html" not in url] == []


@pytest.mark.parametrize("part", ["", "tests", "trains", "test-3", "train-5"])
def test_hostile_texts_and_names_are_text(opened, page, part):
    browser = opened(part)
    found = browser.execute_script("return [window.ran, document.getElementById('injected'), document.scripts.length]")
    assert found == [None, None, 2]
    assert texts(browser, "main b, main i:not(.bar i), main img") == []
    if part == "test-3":
        assert page[1]["samples"]["test"]["3"]["text"] in texts(browser, ".large .quote")
        assert "<i>poor</i></script>" in "".join(texts(browser, ".asked dd")) + "".join(texts(browser, ".card p"))


def test_injected_markup_would_not_run_either(opened):
    browser = opened("tests")
    browser.execute_script(
        "document.getElementById('main').innerHTML = \"<img src=x onerror='window.ran=9'><b id=b></b>\""
    )
    settled(browser)
    assert browser.execute_script("return [window.ran, document.getElementById('b') !== null]") == [None, True]


def test_a_click_on_a_test_sample_shows_its_neighbours_and_theirs(opened, page):
    browser = opened("tests")
    click(browser, "a.row[href='#test-4']")
    settled(browser)
    test = next(each for each in page[1]["tests"] if each["id"] == 4)
    for end in ("helpful", "harmful"):
        assert hrefs(browser, f"section[aria-labelledby={end}] a") == [f"#train-{i}" for i, _ in test[end]]
        shown = texts(browser, f"section[aria-labelledby={end}] p.{end}")
        assert [float(each) for each in shown] == pytest.approx([value for _, value in test[end]], rel=5e-3)
    train = test["helpful"][0][0]
    click(browser, f"a[href='#train-{train}']")
    settled(browser)
    assert texts(browser, "h1") == [f"Training sample {train}"]
    helped = page[1]["trains"][str(train)]["helps"]
    there = [f"#test-{i}" for i, _ in helped if i != N_TEST - 1]
    assert hrefs(browser, ".ends section:first-child .card a") == there
    browser.back()
    settled(browser)
    assert texts(browser, "h1") == ["Test sample 4"]


def test_search_filters_and_sorting(opened, page):
    browser, tests = opened("tests"), page[1]["tests"]

    def rows():
        return [int(each) for each in texts(browser, "a.row")]

    assert rows() == [each["id"] for each in sorted(tests, key=lambda each: -each["loss"])]
    click(browser, "#sort-id")
    assert rows() == list(range(N_TEST - 1))
    assert browser.switch_to.active_element.get_attribute("id") == "sort-id"
    click(browser, "#sort-id")
    assert rows() == list(range(N_TEST - 1))[::-1]
    click(browser, "#wrong")
    wrong = [each["id"] for each in tests if each["label"] != each["said"]]
    assert sorted(rows()) == wrong
    assert 0 < len(wrong) < len(tests)
    assert texts(browser, "#count") == [f"{len(wrong)} of {len(tests)} test samples"]
    click(browser, "#wrong")
    browser.find_element("css selector", "#search").send_keys("NUMBER 27 fi")
    assert rows() == [3]
    browser.find_element("css selector", "#search").clear()
    browser.execute_script(
        "const s = document.getElementById('search'); s.value = ''; s.dispatchEvent(new Event('input'));"
        "const l = document.getElementById('label'); l.value = '1'; l.dispatchEvent(new Event('change'));"
        "const m = document.getElementById('loss'); m.value = arguments[0]; m.dispatchEvent(new Event('input'))",
        "0.5",
    )
    assert sorted(rows()) == [each["id"] for each in tests if each["label"] == 1 and each["loss"] >= 0.5]


def test_suspects_come_in_their_order_and_all_that_are_shown_can_be_listed(opened, page):
    browser, data = opened("trains"), page[1]
    assert [int(each) for each in texts(browser, "a.row")] == data["suspects"]["ids"]
    assert "Most harmful on average" in texts(browser, "#count")[0]
    browser.execute_script(
        "const w = document.getElementById('which'); w.value = 'all'; w.dispatchEvent(new Event('change'))"
    )
    click(browser, "#sort-loss")
    losses = [data["trains"][each]["loss"] for each in texts(browser, "a.row")]
    assert losses == sorted((each["loss"] for each in data["trains"].values()), reverse=True)


def test_keys_alone_suffice(opened, page):
    browser = opened("tests")
    first, second = [int(each) for each in texts(browser, "a.row")[:2]]
    keys(browser, "j")
    keys(browser, "j")
    assert browser.switch_to.active_element.text == str(second)
    keys(browser, "k")
    assert browser.switch_to.active_element.text == str(first)
    outline = (
        "const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth) >= 2]"
    )
    assert browser.execute_script(outline) == ["solid", True]
    keys(browser, "\ue007")  # enter
    settled(browser)
    assert address(browser) == f"#test-{first}"
    keys(browser, "\ue014")  # arrow right
    settled(browser)
    assert address(browser) == f"#test-{second}"
    keys(browser, "k")
    settled(browser)
    assert address(browser) == f"#test-{first}"
    keys(browser, "u")
    settled(browser)
    assert (address(browser), browser.switch_to.active_element.text) == ("#tests", str(first))
    keys(browser, "/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    keys(browser, "j")
    assert browser.switch_to.active_element.get_attribute("value") == "j"
    browser.get("about:blank")
    browser.get(f"{page[0].as_uri()}#train-2")
    keys(browser, "/")
    settled(browser)
    assert (address(browser), browser.switch_to.active_element.get_attribute("id")) == ("#tests", "search")


def test_the_tab_key_goes_through_links_and_fields_in_order(opened):
    browser = opened("tests")
    seen = []
    for _ in range(9):
        keys(browser, "\ue004")
        active = browser.switch_to.active_element
        seen.append(active.get_attribute("id") or active.get_dom_attribute("href"))
    assert seen == ["skip", "#overview", "#tests", "#trains", "scheme", "search", "label", "predicted", "loss"]


NAMELESS = """
const named = (each) => each.textContent.trim() || each.getAttribute("aria-label") || each.hasAttribute("alt") ||
  (each.labels && each.labels.length);
return [...document.querySelectorAll("a, button, input, select, svg, img")].filter((each) => !named(each)).length;
"""


def test_everything_that_is_worked_with_has_a_name(opened):
    for part in ("", "tests", "trains", "test-3"):
        assert opened(part).execute_script(NAMELESS) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(opened, scheme):
    for part in ("overview", "tests", "trains", "test-3", "train-5"):
        browser = opened(part, scheme)
        browser.execute_script("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        looked, low = browser.execute_script(CONTRAST)
        # A training sample is near few test samples.
        assert looked > (10 if part == "train-5" else 20)
        assert low == []
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    click(browser, "#scheme")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    assert browser.execute_script(CONTRAST)[1] == []


@pytest.mark.parametrize("width", [360, 400, 1600])
def test_nothing_is_wider_than_the_window(opened, width):
    for part in ("overview", "tests", "trains", "test-3", "train-5"):
        browser = opened(part, width=width)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
