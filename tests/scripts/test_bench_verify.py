import json
import math

from tests.scripts.running import ran, refused


def test_it_prints_ratios_and_appends_them_and_leaves_nothing_else(tmp_path):
    done = ran("bench_verify", tmp_path, "--quick", "--rounds", "2", "--json", "figures.jsonl")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert "over those of verify" in head
    (record,) = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert len(rows) == len(record["ratios"]) == 2
    for ratio in record["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]


def test_it_refuses_what_it_does_not_know(tmp_path):
    for wrong in (["--workload", "W9"], ["--rounds", "0"]):
        code, said = refused("bench_verify", tmp_path, *wrong)
        assert code == 2
        assert wrong[0] in said
    assert not list(tmp_path.iterdir())
