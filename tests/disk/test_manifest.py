"""Identity on disk: what is written comes back, what is damaged or foreign is said."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.disk.manifest import FORMAT, Manifest, differences, fingerprint
from infl_cache.errors import DamagedStore, ForeignRun

TASK = {"weights": "aa11", "n_train": 10}
STAGES = {"grads": {"identity": {"damping": 0.1}, "fingerprint": "ff", "plan": {"n_rows": 10, "block_rows": 4}}}
GOOD = {"format": FORMAT, "task": TASK, "stages": STAGES}
values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
identities = st.dictionaries(st.text(), values, max_size=6)
# Facts of names that no plan checks.
plans = st.dictionaries(st.text().map("_{}".format), values, max_size=6)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "manifest.json"


@given(identities, st.dictionaries(st.text(), st.tuples(identities, plans), max_size=3))
@settings(deadline=None)
def test_what_is_written_is_read_again(tmp_path_factory, task, stages):
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    written = Manifest(
        task,
        {name: {"identity": each, "fingerprint": "", "plan": plan} for name, (each, plan) in stages.items()},
    )
    written.write(path)
    assert Manifest.read(path) == written


def test_no_file_is_an_empty_manifest(path):
    assert Manifest.read(path) == Manifest(None, {})


def test_the_file_is_plain_json_that_says_its_format(path):
    Manifest(TASK, STAGES).write(path)
    content = json.loads(path.read_text())
    assert content == {**GOOD, "checksum": content["checksum"]}


@pytest.mark.parametrize("edit", [('"aa11"', '"aa12"'), ('"block_rows": 4', '"block_rows": 5')])
def test_an_edited_manifest_is_damaged(path, edit):
    Manifest(TASK, STAGES).write(path)
    assert edit[0] in path.read_text()
    path.write_text(path.read_text().replace(*edit))
    with pytest.raises(DamagedStore, match="found an edited one; restore it"):
        Manifest.read(path)


@pytest.mark.parametrize("cut", [0, 1, 0.5, -2])
def test_a_truncated_manifest_is_damaged(path, cut):
    Manifest(TASK, STAGES).write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut) if isinstance(cut, float) else cut])
    with pytest.raises(DamagedStore, match=r"manifest\.json: expected a manifest, found"):
        Manifest.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "7",
        "[" * 100_000,
        '{"a": ' * 100_000,
        "\ufeff{}",
        json.dumps({"format": FORMAT}),
        json.dumps({"format": FORMAT, "task": TASK}),
        json.dumps({**GOOD, "stages": []}),
        json.dumps({**GOOD, "stages": {"grads": None}}),
        json.dumps({**GOOD, "stages": {"grads": {}}}),
        json.dumps({**GOOD, "stages": {"grads": {"identity": {}}}}),
        json.dumps({**GOOD, "stages": {"grads": {"identity": {}, "plan": []}}}),
        json.dumps({**GOOD, "stages": {"grads": {"identity": {}, "plan": {}}}}),
        json.dumps({**GOOD, "task": "weights"}),
        json.dumps({**GOOD, "task": [1]}),
    ],
    ids=lambda text: text[:40],
)
def test_json_that_is_no_manifest_is_damaged(path, text):
    path.write_text(text)
    with pytest.raises(DamagedStore, match=r"manifest\.json: expected a manifest, found"):
        Manifest.read(path)


def test_bytes_that_are_no_text_are_damaged(path):
    path.write_bytes(b'{"format": 1, "task": "\xff\xfe"}')
    with pytest.raises(DamagedStore, match=r"manifest\.json"):
        Manifest.read(path)


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None])
def test_another_format_is_named_and_not_touched(path, found):
    text = json.dumps({**GOOD, "format": found})
    path.write_text(text)
    with pytest.raises(ForeignRun, match=f"expected format {FORMAT}, found format {found!r}; use the version"):
        Manifest.read(path)
    assert path.read_text() == text


@given(identities, identities)
@settings(deadline=None)
def test_the_differences_are_every_field_that_differs_and_no_other(expected, found):
    keys = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
    lines = differences(expected, found)
    assert len(lines) == len(keys)
    for key in keys:
        assert f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}" in lines


def test_a_field_that_only_one_side_has_is_a_difference():
    assert differences({"solver": "cg"}, {}) == ["solver: expected 'cg', found None"]
    assert differences({}, {"solver": "cg"}) == ["solver: expected None, found 'cg'"]


def test_the_fingerprint_depends_on_the_values_and_not_on_their_order():
    made = fingerprint({"a": 1, "b": "x"})
    assert fingerprint({"b": "x", "a": 1}) == made
    assert fingerprint({"a": 2, "b": "x"}) != made
    assert fingerprint({"a": "1", "b": "x"}) != made
    assert fingerprint({"a": 1}) != made
    assert len(made) == 32
