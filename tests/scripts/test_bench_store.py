import json
import math

from tests.scripts.running import ran, refused

COMPARED = ["write a block", "lz4", "files", "digests"]


def test_it_prints_ratios_and_appends_them_and_leaves_nothing_else(tmp_path):
    done = ran("bench_store", tmp_path, "--quick", "--workloads", "W1,W2", "--rounds", "2", "--json", "figures.jsonl")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split()[-2:] == ["W1", "W2"]
    assert [row.split(":")[0] for row in rows] == COMPARED
    records = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert [record["workload"] for record in records] == ["W1", "W2"]
    for record in records:
        assert [title.split(":")[0] for title in record["ratios"]] == COMPARED
        for ratio in record["ratios"].values():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] < math.inf
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]


def test_it_refuses_what_it_does_not_know(tmp_path):
    for wrong in (["--workloads", "W9"], ["--rounds", "0"]):
        code, said = refused("bench_store", tmp_path, *wrong)
        assert code == 2
        assert wrong[0] in said
    assert not list(tmp_path.iterdir())
