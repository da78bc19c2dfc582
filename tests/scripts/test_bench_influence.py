import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from infl_cache import Run

ROOT = Path(__file__).resolve().parents[2]
OWN = ["ours", "ours-16"]


@pytest.fixture
def scripts(monkeypatch):
    """A function that imports a script."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module


def bench(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench_influence.py"), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick benchmark of one workload: what is left in its folder, its records by part, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    done = bench(folder, "--quick", "--workloads", "dense", "--rounds", "1", "--parts", "scores,scaling",
                 "--samples", "12", "--only", ",".join([*OWN, "memmap", "zarr", "pydvl"]),
                 "--json", "figures.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
    return [path.name for path in folder.iterdir()], {record["part"]: record for record in records}, done.stdout


def test_stage_3_is_set_beside_plain_means_with_a_hot_and_a_cold_cache(quick):
    _, records, printed = quick
    record = records["scores"]
    assert (record["workload"], record["rounds"], record["samples"], record["tests"]) == ("dense", 1, 12, 3)
    assert record["row_samples"] == 12
    known = {(each["key"], each["cache"]): each for each in record["contestants"]}
    stores = ("float32-lz4", "bfloat16-lz4")
    reading = [*OWN, "memmap", *(f"{kind} {store}" for kind in ("zarr", "decode") for store in stores)]
    assert set(known) == {("mm", None), *((key, cache) for key in reading for cache in ("hot", "cold"))}
    for each in known.values():
        assert each["title"] in printed
        for name in ("seconds", "pairs_per_second", "of_mm", "gflops"):
            assert 0 < each[name]["low"] <= each[name]["median"] <= each[name]["high"] < math.inf
        assert each["pairs"] == 12 * 3
        assert each["cache"] is None or each["stored_gb_per_second"]["low"] > 0
    assert known["mm", None]["of_mm"] == {"median": 1, "low": 1, "high": 1}
    assert record["machine_gflops"] > 0
    assert set(record["skipped"]) >= {"pyDVL, gradients again"}


def test_influences_are_right_and_the_error_of_16_bits_is_seen(quick):
    _, records, _ = quick
    for each in records["scores"]["contestants"]:
        if each["key"] == "ours":
            assert each["error"] < 1e-6
        if each["key"] == "ours-16":
            assert 1e-5 < each["error"] < 1e-2


def test_the_sum_of_both_halves_is_that_of_one_round(scripts):
    script = scripts("bench_influence")
    files, pairs = (), 100
    made = [
        script.Contestant("ours", "ours", pairs, float, "hot", files, None, "store"),
        script.Contestant("mm", "mm", pairs // 2, float),
        script.Contestant("decode store", "decode", pairs, float, "hot", files),
        script.Contestant("memmap", "memmap", pairs, float, "hot", files),
    ]
    seconds = {"ours hot": [6.0, 8.0], "mm": [1.0, 1.0], "decode store hot": [2.0, 6.0], "memmap hot": [3.0, 16.0]}
    turns = {name: [script.Turn(one, 1.0) for one in those] for name, those in seconds.items()}
    setting = type("Setting", (), {"workload": type("Workload", (), {"n_params": 10})})
    found = script.figures(made[0], turns, made, setting)
    assert found["over_halves"] == pytest.approx({"low": 1.0, "median": 1.25, "high": 1.5})
    assert found["of_mm"] == pytest.approx({"low": 0.25, "median": (1 / 3 + 1 / 4) / 2, "high": 1 / 3})
    assert found["of_memmap"] == pytest.approx({"low": 0.5, "median": 1.25, "high": 2.0})
    assert found["gflops"]["high"] == pytest.approx(2 * 10 * 100 / 6 * 1e-9)


def test_a_pair_of_a_larger_stage_is_set_beside_one_of_the_smallest(quick):
    sizes = quick[1]["scaling"]["sizes"]
    assert [(each["n_train"], each["n_test"]) for each in sizes] == [(32, 2), (64, 2), (32, 4)]
    assert sizes[0]["a_pair_of_smallest"] == {"median": 1, "low": 1, "high": 1}
    smallest, larger = sizes[0]["seconds"], sizes[1]["seconds"]
    at_most = larger["high"] / 2 / smallest["low"]
    assert larger["low"] / 2 / smallest["high"] <= sizes[1]["a_pair_of_smallest"]["median"] <= at_most


def test_it_leaves_nothing_but_its_figures(quick):
    assert quick[0] == ["figures.jsonl"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tmp_path_factory):
    """A finished run over plain rows: several blocks, the last of them not full."""
    script = pytest.MonkeyPatch()
    script.syspath_prepend(ROOT / "scripts")
    workloads = importlib.import_module("workloads")
    script.undo()
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    workload = workloads.classifier("tiny", "tiny", model, (6,), (37, 4, 37), epochs=1)
    made = Run(tmp_path_factory.mktemp("run") / "run", workload.task(), solver="identity", form="dense",
               dtype=request.param, block_rows=10, progress=False)  # fmt: skip
    made.all()
    return made


def test_plain_means_agree_with_stage_3(run, scripts, tmp_path, monkeypatch):
    plain = scripts("plain_scores")
    monkeypatch.setattr(plain, "MAPPED", 7 * 4 * run.grad_z(0).size)
    rows = plain.Rows(run, torch.from_numpy(run.s_test(slice(None))), 37)
    wanted = torch.from_numpy(np.array(run.scores())) * -37
    plain.write_map(rows, tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_size == 37 * 4 * run.grad_z(0).size
    assert torch.equal(torch.cat(list(rows.pieces(1000))), torch.from_numpy(run.grad_z(slice(0, 37))).float())
    for multiply in (plain.from_left, plain.from_right):
        mapped = plain.from_map(tmp_path / "rows", rows.s_test, 37, multiply)
        sliced = plain.by_slices(run.path / "grad_z.zarr", rows.s_test, multiply)
        for found in (mapped, sliced):
            assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert plain.in_memory(rows, plain.faster(rows)) > 0


def test_decoding_reads_every_chunk_of_the_gradients(run, scripts):
    found = scripts("plain_scores").decoded(run.path / "grad_z.zarr")
    layouts = run.folder.store("grads").layouts
    held = {path: layouts[path] for path in layouts if path.startswith("dense")}
    # Whole chunks of rows: the last one is filled up.
    rows = -(-37 // held["dense"].chunks[0]) * held["dense"].chunks[0]
    assert found == sum(rows * math.prod(each.row_shape) * np.dtype(each.dtype).itemsize for each in held.values())
    chunk = next((run.path / "grad_z.zarr" / "dense").glob("c.*"))
    body = chunk.read_bytes()
    chunk.write_bytes(b"\0" * len(body))
    with pytest.raises(RuntimeError, match="blosc"):
        scripts("plain_scores").decoded(run.path / "grad_z.zarr")
    chunk.write_bytes(body)


def test_files_are_forgotten_and_recalled_without_a_change(scripts, tmp_path):
    measuring = scripts("measuring")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(range(256)) * 100)
    assert measuring.files_of([tmp_path / "deep"]) == measuring.files_of([tmp_path / "deep" / "file"])
    for work in (measuring.forget, measuring.recall):
        work([tmp_path])
        assert (tmp_path / "deep" / "file").read_bytes() == bytes(range(256)) * 100


def test_memory_is_that_of_stage_3_above_what_there_was(scripts, tmp_path):
    script = scripts("bench_influence")
    workload = script.prepared("dense", 6, 2, quick=True)
    run = script.run_of(tmp_path / "run", workload, 2)
    run.grads()
    run.stest()
    before, peak = script.memory_of_stage(run.path, workload, 2, 10_000_000)
    assert 0 < before <= peak
    assert run.scores().shape == (2, 6)


@pytest.mark.parametrize(
    "wrong",
    [["--workloads", "W4"], ["--only", "fast"], ["--parts", "x"], ["--cache", "warm"], ["--rounds", "0"],
     ["--tests", "20,x"], ["--samples", "0"]],
)  # fmt: skip
def test_it_refuses_what_it_does_not_know(wrong, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        scripts("bench_influence").asked(wrong)
    assert wrong[0] in capsys.readouterr().err
