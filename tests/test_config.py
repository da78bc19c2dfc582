"""Options: each is checked by name and survives every form it is kept in; no file runs code or eats the memory."""

import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache import errors
from infl_cache.config import MAX_CONFIG_BYTES, SECTIONS, Options, option_fields, parse_size, read_config_file
from infl_cache.errors import BadInput

HINTS = {name: get_type_hints(SECTIONS[section])[name] for name, section, _ in option_fields()}
FIELDS = {name: field for name, _, field in option_fields()}


def kind(name):
    """The type of an option without its None and without words that may take a number's place."""
    hint = HINTS[name]
    if get_origin(hint) is Literal:
        return hint
    choices = [each for each in get_args(hint) if each is not type(None)]
    return next((each for each in choices if isinstance(each, type)), choices[0] if choices else hint)


def optional(name):
    return type(None) in get_args(HINTS[name])


def allowed(name):
    """A strategy for every value that an option takes."""
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    if get_origin(kind(name)) is Literal:
        values = st.sampled_from(get_args(kind(name)))
    else:
        values = {
            bool: st.booleans(),
            str: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
            int: st.integers(low, 2**53 if high is None else high),
            float: st.floats(low, high, allow_nan=False, allow_infinity=False),
        }[kind(name)]
        values = values | st.sampled_from(words(name)) if words(name) else values
    return st.none() | values if optional(name) else values


def words(name):
    """What may be given in place of a number."""
    return [
        word
        for each in get_args(HINTS[name])
        if get_origin(each) is Literal and each is not kind(name)
        for word in get_args(each)
    ]


def contradictory(given):
    return given.get("by_layer", False) and not given.get("matrix", True)


options = (
    st.fixed_dictionaries({}, optional={name: allowed(name) for name in HINTS})
    .filter(lambda given: not contradictory(given))
    .map(Options.resolve)
)


def wrong_types(name):
    if get_origin(kind(name)) is Literal:
        return ["nonsense", "", 7, True, ["auto"], {}]
    wrong = {
        bool: ["yes", 1, 0, []],
        str: [7, True, ["cpu"]],
        int: ["many", 1.5, 2.0, True, [1], {}],
        float: ["much", True, [0.1], {}],
    }[kind(name)]
    return [each for each in wrong if not (name == "memory" and isinstance(each, float))]


def out_of_range(name):
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    values = [kind(name)(low) - 1] if low is not None else []
    values += [kind(name)(high) + 1] if high is not None else []
    return values + ([math.nan, math.inf, -math.inf] if kind(name) is float else [])


def refused(name, value):
    with pytest.raises(BadInput) as refusal:
        Options.resolve({name: value})
    return str(refusal.value)


def test_every_option_has_a_help_text_and_a_different_name():
    names = [name for name, _, _ in option_fields()]
    assert len(names) == len(set(names)) == len(HINTS)
    assert all(field.metadata["help"] for field in FIELDS.values())


def test_nothing_given_is_the_defaults():
    assert Options.resolve({}) == Options()
    assert Options.resolve(Options().flat()) == Options()


def test_every_default_is_itself_allowed():
    for name, field in FIELDS.items():
        assert Options.resolve({name: field.default}).flat()[name] == field.default


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in HINTS for value in wrong_types(name)], ids=lambda each: str(each)[:20]
)
def test_a_wrong_type_is_refused_with_the_option_the_value_and_what_is_allowed(name, value):
    message = refused(name, value)
    assert message.startswith(f"{name.replace('_', '-')}: expected ")
    assert message.endswith(f", found {value!r}")
    if get_origin(kind(name)) is Literal:
        assert all(choice in message for choice in get_args(kind(name)))
    elif name != "memory":
        assert kind(name).__name__ in message


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in HINTS for value in out_of_range(name)], ids=lambda each: str(each)
)
def test_a_value_out_of_range_is_refused_with_the_option_the_value_and_the_range(name, value):
    message = refused(name, value)
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    assert message.startswith(f"{name.replace('_', '-')}: expected a finite number ")
    assert (f"at least {low}" if high is None else f"from {low} to {high}") in message
    assert message.endswith(f", found {value!r}")


@pytest.mark.parametrize("name", [name for name in HINTS if not optional(name)])
def test_none_is_refused_where_there_is_no_default_to_choose(name):
    assert "found None" in refused(name, None)


@pytest.mark.parametrize("name", HINTS)
def test_a_misspelt_option_is_refused_with_the_one_that_was_meant(name):
    misspelt = name[:-1] + "qq"
    assert refused(misspelt, 1).startswith(f"unknown option '{misspelt}'; did you mean ")


def test_an_option_like_no_other_is_refused_with_all_there_are():
    message = refused("zzzzzz", 1)
    assert "unknown option 'zzzzzz'; known: " in message
    assert all(name in message for name in HINTS)


ABSURD = {
    "10^400": 10**400,
    "-10^400": -(10**400),
    "more digits than Python prints": 16**5000,
    "infinity": math.inf,
    "nan": math.nan,
    "10^400 bytes": f"1{'0' * 400}GB",
}


@pytest.mark.parametrize("name", ["seed", "damping", "memory", "solver"])
@pytest.mark.parametrize("value", ABSURD.values(), ids=ABSURD)
def test_an_absurd_number_is_refused_in_one_short_line(name, value):
    message = refused(name, value)
    assert message.startswith(f"{name}: expected ")
    assert len(message) < 1000
    assert "cannot convert" not in message


@pytest.mark.parametrize("name", ["seed", "damping", "memory", "solver", "progress"])
@pytest.mark.parametrize("value", ["x" * 100_000, [0] * 100_000], ids=["text", "list"])
def test_an_endless_value_is_refused_in_one_short_line(name, value):
    message = refused(name, value)
    assert message.startswith(f"{name}: expected ")
    assert len(message) < 1000
    assert "\n" not in message


def test_an_integer_is_good_for_a_float_but_not_the_other_way_round():
    damping = Options.resolve({"damping": 1}).stest.damping
    assert (damping, type(damping)) == (1.0, float)
    assert "expected int, found 3.0" in refused("seed", 3.0)


@given(options)
@settings(deadline=None)
def test_options_survive_the_flat_mapping(made):
    assert Options.resolve(made.flat()) == made


@given(options)
@settings(deadline=None)
def test_options_survive_a_yaml_file(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "options.yaml"
    path.write_text(yaml.safe_dump(made.flat(), sort_keys=False), encoding="utf-8")
    assert Options.resolve(read_config_file(path)) == made


def test_options_cannot_be_changed_afterwards():
    made = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.stest = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.stest.damping = 1.0


# --- sizes


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("0", 0),
        (4096, 4096),
        (1.5e3, 1500),
        ("512", 512),
        ("2GB", 2 * 10**9),
        ("2gb", 2 * 10**9),
        ("2 G", 2 * 10**9),
        ("1.5 MiB", 1_572_864),
        (".5k", 500),
        ("3KiB", 3072),
        (" 4 TiB ", 2**42),
        ("100b", 100),
    ],
)
def test_a_size_is_read_in_the_units_people_write(text, n):
    assert parse_size(text) == n
    assert type(parse_size(text)) is int


@pytest.mark.parametrize(
    "text", ["", "GB", "2 GBB", "two GB", "-1GB", "1e9", "2 G B", "1.2.3k", "2ZB", True, None, "٢GB"]
)
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="a size such as 2GB or 512MiB, found"):
        parse_size(text)


@given(
    st.integers(0, 2**50),
    st.sampled_from([("k", 10**3), ("M", 10**6), ("GB", 10**9), ("KiB", 2**10), ("Mi", 2**20)]),
)
@settings(deadline=None)
def test_a_unit_multiplies(n, unit):
    assert parse_size(f"{n // unit[1]}{unit[0]}") == n // unit[1] * unit[1]


def test_memory_takes_a_size_and_refuses_less_than_a_byte():
    assert Options.resolve({"memory": "1.5 MiB"}).resources.memory == 1_572_864
    assert refused("memory", "lots") == "memory: expected a size such as 2GB or 512MiB, found 'lots'"
    assert "a finite number at least 1, found" in refused("memory", "0GB")
    assert "at least 1, found -5" in refused("memory", -5)


# --- files


@pytest.fixture
def write(tmp_path):
    def written(text, name="options.yaml"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def test_yaml_and_toml_say_the_same(write):
    expected = {"damping": 0.5, "solver": "cg", "max_iterations": 7, "progress": False}
    lines = [("damping", "0.5"), ("solver", '"cg"'), ("max-iterations", "7"), ("progress", "false")]
    assert read_config_file(write("".join(f"{key}: {value}\n" for key, value in lines))) == expected
    assert read_config_file(write("".join(f"{key} = {value}\n" for key, value in lines), "o.toml")) == expected


@pytest.mark.parametrize("text", ["damping: 1e-3", "damping: 1.0e-3", "damping: 0.001"])
def test_a_number_is_read_however_people_write_it(write, text):
    assert Options.resolve(read_config_file(write(text))).stest.damping == 0.001


@pytest.mark.parametrize("name", ["empty.yaml", "empty.toml"])
def test_an_empty_file_gives_no_options(write, name):
    assert read_config_file(write("# nothing\n", name)) == {}


@pytest.mark.parametrize("name", ["o.yaml", "o.toml"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(BadInput, match=rf"{name}: cannot be read: No such file"):
        read_config_file(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(BadInput, match=rf"{name}: cannot be read: Is a directory"):
        read_config_file(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "found"),
    [("- a\n- b\n", "list"), ("damping\n", "str"), ("7\n", "int"), ("1: 2\n", "dict"), ("~: 2\n", "dict")],
)
def test_a_file_that_is_no_mapping_of_names_is_refused(write, text, found):
    with pytest.raises(BadInput, match=f"expected a mapping of option names to values, found {found}"):
        read_config_file(write(text))


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "a: {",
        "\t",
        "a: 1\n---\nb: 2",
        "a: *nowhere",
        "? [a]\n: 1",
        "a: 2020-13-45",
        b"\xff\xfe\x00",
        b"a: \x00",
    ],
    ids=ascii,
)
def test_broken_yaml_is_refused_in_one_line(write, text):
    with pytest.raises(BadInput, match=r"options\.yaml: not a plain YAML or TOML file: ") as refusal:
        read_config_file(write(text))
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("text", ["a", "a = ", "a = 1\na = 2", "[a", b"\xff", "a = 1979-13-01"], ids=ascii)
def test_broken_toml_is_refused(write, text):
    with pytest.raises(BadInput, match=r"o\.toml: not a plain YAML or TOML file: "):
        read_config_file(write(text, "o.toml"))


@pytest.mark.parametrize(
    "text",
    [
        "damping: !!python/object/apply:os.mkdir [{}]",
        "!!python/object/apply:os.mkdir [{}]",
        "damping: !!python/object/new:os.mkdir [{}]",
        "damping: !!python/name:os.mkdir",
        "damping: !!python/module:os",
        "damping: !!python/tuple [1]",
        "damping: !mine {{a: 1}}",
    ],
)
def test_tags_that_would_build_objects_are_refused_and_not_run(write, tmp_path, text):
    marker = tmp_path / "was_run"
    with pytest.raises(BadInput, match=r"not a plain YAML or TOML file: .*tag"):
        read_config_file(write(text.format(marker)))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["o.yaml", "o.toml"])
def test_a_huge_file_is_refused_before_it_is_read(write, monkeypatch, name):
    path = write("a: " if name.endswith("yaml") else "a = ", name)
    os.truncate(path, MAX_CONFIG_BYTES + 1)
    monkeypatch.setattr(type(path), "read_text", lambda *_, **__: pytest.fail("was read"))
    sizes = f"under {MAX_CONFIG_BYTES:,} bytes, found {MAX_CONFIG_BYTES + 1:,}"
    with pytest.raises(BadInput, match=f"expected a configuration {sizes}"):
        read_config_file(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.yaml", "[" * 20_000),
        ("o.yaml", "a: " + "{a: " * 20_000),
        ("o.yaml", "- " * 20_000),
        ("o.toml", "a = " + "[" * 20_000),
        ("o.toml", "a = " + "{a = " * 10_000),
    ],
    ids=lambda text: text[:8],
)
def test_a_deeply_nested_file_is_refused_at_once(write, name, text):
    began = time.process_time()
    with pytest.raises(BadInput, match="not a plain YAML or TOML file"):
        read_config_file(write(text, name))
    assert time.process_time() - began < 2


ANCHORS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" if i else "a0: &a0 [x]\n" for i in range(12))
MERGES = "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" if i else "a0: &a0 {x: 1}\n" for i in range(12)
)

UNFOLD = """
import resource, sys, types
root = types.ModuleType("infl_cache")  # the package root imports torch, which a configuration does not need
root.__path__ = [sys.argv[1]]
sys.modules["infl_cache"] = root
from pathlib import Path
from infl_cache.config import Options, read_config_file
from infl_cache.errors import BadInput
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 60_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    Options.resolve({"seed": read_config_file(Path(sys.argv[2]))["seed"]})
except BadInput as error:
    print(len(str(error)))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory in use is read from /proc")
@pytest.mark.parametrize("text", [f"{ANCHORS}seed: *a11\n", f"{MERGES}seed: *a11\n"], ids=["anchors", "merges"])
def test_a_small_file_that_unfolds_to_a_huge_one_is_refused_and_takes_no_memory(write, text):
    told = subprocess.run(
        [sys.executable, "-c", UNFOLD, Path(errors.__file__).parent, write(text)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.stdout.strip().isdigit(), f"refused neither quickly nor cleanly: {told.stderr[-300:]}"
    assert int(told.stdout) < 1000


@pytest.mark.parametrize("text", ["damping: 0.1\ndamping: 5\n", "top-k: 3\ntop_k: 4\n", "task_args: {a: 1, a: 2}\n"])
def test_an_option_that_is_there_twice_is_refused(text, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"twice|once"):
        read_config_file(tmp_path / "x.yaml")
