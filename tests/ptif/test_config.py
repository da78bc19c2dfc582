"""The config: the documented defaults, both spellings, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

import infl_cache.ptif as ptif
from infl_cache.errors import BadInput

DOCUMENTED = {
    "seed": 42, "gpu": -1, "calc_method": "img_wise", "recursion_depth": 5000, "r": 1, "damp": 0.01, "scale": 25,
    "save_pth": None, "outdir": "outdir", "log_filename": None, "test_sample_start_per_class": False,
    "test_sample_num": False,
}  # fmt: skip


def test_the_defaults_are_those_that_were_documented():
    config = ptif.get_default_config()
    assert type(config) is dict
    assert {key: config[key] for key in DOCUMENTED} == DOCUMENTED
    assert json.loads(json.dumps(config)) == config


def test_a_config_and_its_dict_are_the_same():
    config = ptif.Config(damp=0.5, outdir=Path("somewhere"), options={"memory": "1GB"})
    assert config.outdir == "somewhere"
    assert ptif.Config.from_dict(config.to_dict()) == config
    assert ptif.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert ptif.Config.from_dict(config) is config


@pytest.mark.parametrize(
    ("code", "readme", "value"),
    [("r_averaging", "r", 7), ("test_start_index", "test_sample_start_per_class", 3)],
)
def test_both_spellings_of_a_key_are_accepted(code, readme, value):
    for given in ({code: value}, {readme: value}, {**ptif.get_default_config(), code: value}):
        assert getattr(ptif.Config.from_dict(given), readme) == value
    with pytest.raises(BadInput, match=f"expected one of {code} and {readme}, found {value} and {value + 1}"):
        ptif.Config.from_dict({code: value, readme: value + 1})


def test_an_unknown_key_is_refused_with_the_one_that_was_meant():
    with pytest.raises(BadInput, match="unknown key 'recursion_dept'; did you mean recursion_depth"):
        ptif.Config.from_dict({"recursion_dept": 10})
    with pytest.raises(BadInput, match="unknown key 'xyz'; known: at_once"):
        ptif.Config.from_dict({"xyz": 10})
    with pytest.raises(BadInput, match="expected a dict or a Config, found list"):
        ptif.Config.from_dict([])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("damp", -1, "expected a finite number at least 0.0, found -1"),
        ("damp", "much", "expected float or auto, found 'much'"),
        ("scale", 0, "expected a finite number at least"),
        ("scale", float("nan"), "expected a finite number at least"),
        ("recursion_depth", 0, "expected a finite number at least 1, found 0"),
        ("recursion_depth", 1.5, "expected int, found 1.5"),
        ("r", True, "expected int, found True"),
        ("gpu", -2, "expected a finite number at least -1, found -2"),
        ("calc_method", "fast", "expected one of img_wise, all_grad_then_test, found 'fast'"),
        ("test_sample_num", 0, "expected False or a whole number of at least 1, found 0"),
        ("test_sample_num", True, "expected False or a whole number of at least 1, found True"),
        ("test_sample_start_per_class", -1, "expected False or a whole number of at least 0, found -1"),
        ("test_sample_ids", [1.5], "expected a list of ids of test samples, found \\[1.5\\]"),
        ("display_progress", "no", "expected bool, found 'no'"),
        ("solver", "magic", "expected one of lissa, cg"),
        ("options", {"damping": 1}, "expected other options than damping, which config\\['damp'\\] decides"),
        ("options", 3, "expected a dict of options"),
        ("outdir", None, "expected str, found None"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(key, value, message):
    with pytest.raises(BadInput, match=rf"config\['{key}'\]: {message}"):
        ptif.Config.from_dict({key: value})


def test_an_option_of_a_run_is_checked_too():
    with pytest.raises(BadInput, match="unknown option 'memry'; did you mean memory"):
        ptif.Config(options={"memry": "1GB"})


def test_what_means_the_same_is_taken():
    assert ptif.Config(test_sample_num=None, test_sample_start_per_class=None) == ptif.Config()
    assert ptif.Config(calc_method="calc_all_grad_then_test").calc_method == "all_grad_then_test"
    assert ptif.Config(seed=np.int64(3), damp=np.float32(0.5)) == ptif.Config(seed=3, damp=0.5)
    assert ptif.Config(test_sample_ids=np.array([4, 2, 4])).test_sample_ids == [4, 2]
    with pytest.raises(BadInput, match="expected either ids or a number of each class, found both"):
        ptif.Config(test_sample_ids=[1], test_sample_num=2)


def test_it_prints_itself_as_a_table():
    lines = str(ptif.Config(damp=0.25)).splitlines()
    assert len(lines) == len(ptif.get_default_config())
    (damp,) = [line for line in lines if line.startswith("damp ")]
    assert "0.25" in damp
    assert "added to the diagonal" in damp


def test_it_becomes_options_of_a_run():
    found = ptif.Config(damp=0.2, scale=3, recursion_depth=7, r=2, seed=5, gpu=1, at_once=4).run_options(8)
    wanted = {"damping": 0.2, "scale": 3.0, "depth": 7, "repeats": 2, "seed": 5, "device": "cuda:1", "solver": "lissa"}
    assert {key: found[key] for key in wanted} == wanted
    assert found["test_block_rows"] == 4
    assert ptif.Config(damp=None).run_options(8)["damping"] == "auto"


def test_the_batch_size_is_that_of_the_loader_unless_it_is_tiny():
    assert ptif.Config().run_options(64)["batch_size"] == 64
    assert ptif.Config().run_options(4)["batch_size"] is None
    assert ptif.Config(batch_size="auto").run_options(64)["batch_size"] is None
    assert ptif.Config(batch_size=2).run_options(64)["batch_size"] == 2
