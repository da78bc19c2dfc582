"""What is logged goes to stdout and to the file; progress can be switched off; JSON files are whole."""

import json
import logging

import numpy as np
import pytest
import torch

import infl_cache.ptif as ptif
from infl_cache.errors import BadInput
from infl_cache.ptif.journal import _File, _Screen


@pytest.fixture(autouse=True)
def as_before():
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [each for each in root.handlers if isinstance(each, (_Screen, _File))]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_init_logging_writes_to_stdout_and_to_the_file_once(tmp_path, capsys):
    ptif.init_logging()
    ptif.init_logging(tmp_path / "log.txt")
    logging.getLogger("anybody").info("a line")
    assert capsys.readouterr().out.count("INFO: a line") == 1
    assert (tmp_path / "log.txt").read_text().count("INFO: a line") == 1
    with pytest.raises(BadInput, match="expected a file in a folder that is there"):
        ptif.init_logging(tmp_path / "nowhere" / "log.txt")


def test_log_filename_is_respected(given, config, tmp_path, capsys):
    config.update(solver="identity", log_filename=str(tmp_path / "log.txt"))
    before = list(logging.getLogger("infl_cache").handlers)
    ptif.calc_img_wise(config, *given.given)
    assert "influences on 12 test samples are in" in (tmp_path / "log.txt").read_text()
    assert logging.getLogger("infl_cache").handlers == before
    ptif.init_logging(tmp_path / "log.txt")
    ptif.calc_img_wise({**config, "force": True}, *given.given)
    assert (tmp_path / "log.txt").read_text().count("influences on 12 test samples are in") == 2


def test_the_log_may_be_in_the_folder_of_the_results(given, config):
    config.update(solver="identity", log_filename=f"{config['outdir']}/log.txt")
    ptif.calc_img_wise(config, *given.given)
    with open(config["log_filename"]) as file:
        assert "influences on 12 test samples" in file.read()


def test_progress_is_shown_unless_it_is_switched_off(given, config, monkeypatch, capsys):
    shown = []
    original = ptif.calculating.Run
    monkeypatch.setattr("infl_cache.ptif.calculating.Run",
                        lambda *a, **o: shown.append(o["progress"]) or original(*a, **o))  # fmt: skip
    for show in (True, False):
        ptif.calc_img_wise({**config, "solver": "identity", "display_progress": show, "force": True}, *given.given)
    assert shown == [True, False]
    ptif.display_progress("x", 0, 2, enabled=False)
    assert capsys.readouterr().out == ""
    ptif.display_progress("x", 1, 2, fix_zero_start=False)
    assert capsys.readouterr().out == "x: 1 of 2 (50 %)\n"


def test_save_json(tmp_path):
    path = tmp_path / "new" / "a.json"
    value = {"a": np.float32(0.5), "b": torch.tensor([1, 2]), 3: float("nan"), "p": path}
    assert ptif.save_json(value, path) == path
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [1, 2], "3": None, "p": str(path)}
    assert ptif.save_json({"c": 1}, path).name == "a_1.json"
    assert ptif.save_json({"c": 1}, path).name == "a_2.json"
    ptif.save_json({"c": 1}, path, append_if_exists=True)
    assert json.loads(path.read_text())["c"] == 1
    assert json.loads(path.read_text())["a"] == 0.5
    ptif.save_json([1], path, overwrite_if_exists=True)
    assert json.loads(path.read_text()) == [1]
    with pytest.raises(BadInput, match="expected a name that is free, found a file"):
        ptif.save_json([1], path, unique_fn_if_exists=False)
    with pytest.raises(BadInput, match="expected a dict to append to a dict"):
        ptif.save_json({}, path, append_if_exists=True)
    with pytest.raises(BadInput, match="expected what JSON can hold, found object"):
        ptif.save_json(object(), path)
    assert sorted(each.name for each in path.parent.iterdir()) == ["a.json", "a_1.json", "a_2.json"]


def test_combine_refuses_what_does_not_belong_together():
    entry = {"label": 1, "num_in_dataset": 0, "time_calc_influence_s": 0.1, "influence": [0.5, -2.0],
             "harmful": [0, 1], "helpful": [1, 0]}  # fmt: skip
    with pytest.raises(BadInput, match="part 1: expected the influences on test sample 0 of another part"):
        ptif.combine({"0": entry}, {"0": {**entry, "influence": [1.0, 2.0]}})
    with pytest.raises(BadInput, match="of different lengths"):
        ptif.combine({"0": entry}, {"1": {**entry, "influence": [1.0]}})
    with pytest.raises(BadInput, match="part 0: expected influences by test id"):
        ptif.combine({"a": entry})
    with pytest.raises(BadInput, match="at least one test sample"):
        ptif.combine()
