import json

import pytest

from tests.scripts.running import ran


def test_a_pair_of_a_larger_stage_is_set_beside_one_of_the_smallest(tmp_path):
    done = ran("bench_scaling", tmp_path, "--quick", "--parts", "scaling", "--rounds", "1", "--json", "figures.jsonl")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]
    record = json.loads((tmp_path / "figures.jsonl").read_text())
    assert (record["workload"], record["part"], record["rounds"]) == ("W1", "scaling", 1)
    sizes = record["sizes"]
    assert all(f"{each['n_train']} x {each['n_test']}" in done.stdout for each in sizes)
    assert [(each["n_train"], each["n_test"]) for each in sizes] == [(32, 2), (64, 2), (32, 4)]
    assert sizes[0]["a_pair_of_smallest"] == {"median": 1, "low": 1, "high": 1}
    smallest, larger = sizes[0]["seconds"], sizes[1]["seconds"]
    at_most = larger["high"] / 2 / smallest["low"]
    assert larger["low"] / 2 / smallest["high"] <= sizes[1]["a_pair_of_smallest"]["median"] <= at_most


def test_memory_is_that_of_stage_3_above_what_there_was(scripts, tmp_path):
    script, stage3 = scripts("bench_scaling"), scripts("stage3")
    workload = stage3.prepared("dense", 6, 2, quick=True)
    run = stage3.run_of(tmp_path / "run", workload, 2)
    run.grads()
    run.stest()
    before, peak = script.memory_of_stage(run.path, workload, 2, 10_000_000)
    assert 0 < before <= peak
    assert run.scores().shape == (2, 6)


def test_what_memory_is_above_the_budget_is_said(scripts):
    told = {"low": 0.0, "median": 1.0, "high": 2.0}
    record = {"samples": 6, "tests": 2, "row_mb": 40.0, "store_mb": 20.0, "budget_mb": 1.5, "before_mb": told,
              "above_mb": told}  # fmt: skip
    assert "0.5 MB above the budget" in scripts("bench_scaling").memory_lines(record)[1]


@pytest.mark.parametrize("wrong", [["--parts", "x"], ["--rounds", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        scripts("bench_scaling").asked(wrong)
    assert wrong[0] in capsys.readouterr().err
