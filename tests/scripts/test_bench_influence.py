import importlib
import json
import math

import numpy as np
import pytest
import torch

from infl_cache import Run
from tests.scripts.running import ROOT, ran

OWN = ["ours", "ours-16"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick benchmark of one workload: what is left in its folder, its records, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    done = ran("bench_influence", folder, "--quick", "--workloads", "dense", "--rounds", "1", "--samples", "12",
               "--tests", "3", "--only", ",".join([*OWN, "memmap", "zarr", "decode", "pydvl"]),
               "--json", "figures.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
    return [path.name for path in folder.iterdir()], records, done.stdout


def test_stage_3_is_set_beside_plain_means_with_a_hot_and_a_cold_cache(quick):
    _, (record,), printed = quick
    assert (record["workload"], record["rounds"], record["samples"], record["tests"]) == ("dense", 1, 12, 3)
    assert record["row_samples"] == record["mapped_samples"] == 12
    known = {(each["key"], each["cache"]): each for each in record["contestants"]}
    stores = ("float32-lz4", "bfloat16-lz4")
    reading = [*OWN, "memmap", "zarr", *(f"decode {store}" for store in stores)]
    alone = [("mm", None), ("multiply float32", None)]
    assert set(known) == {*alone, *((key, cache) for key in reading for cache in ("hot", "cold"))}
    for each in known.values():
        assert each["title"] in printed
        for name in ("seconds", "pairs_per_second", "of_mm", "gflops", "of_machine"):
            assert 0 < each[name]["low"] <= each[name]["median"] <= each[name]["high"] < math.inf
        assert (each["samples"], each["pairs"]) == (12, 12 * 3)
        assert each["cache"] is None or each["stored_gb_per_second"]["low"] > 0
        assert ("over_halves" in each) == (each["key"] in OWN)
    assert known["mm", None]["of_mm"] == {"median": 1, "low": 1, "high": 1}
    assert record["machine_gflops"]["low"] > 0
    assert set(record["skipped"]) == {"pyDVL, gradients again"}


def test_influences_are_right_and_the_error_of_16_bits_is_seen(quick):
    for each in (each for record in quick[1] for each in record["contestants"]):
        if each["key"] == "ours":
            assert each["error"] < 1e-6
        if each["key"] == "ours-16":
            assert 1e-5 < each["error"] < 1e-2


def test_ratios_are_those_of_one_round(scripts):
    script, halves = scripts("bench_influence"), ("decode store hot", "multiply float32")
    made = [
        script.Contestant("ours", "ours", 100, float, "hot", halves=halves),
        script.Contestant("mm", "mm", 50, float),
        script.Contestant("decode store", "decode", 100, float, "hot"),
        script.Contestant("multiply float32", "multiply", 200, float),
        script.Contestant("memmap", "memmap", 25, float, "hot"),
        script.Contestant("memmap", "memmap", 100, float, "cold"),
    ]
    seconds = {"ours hot": [6.0, 8.0], "mm": [1.0, 2.0], "decode store hot": [2.0, 6.0], "multiply float32": [4.0, 8.0],
               "memmap hot": [3.0, 4.0], "memmap cold": [9.0, 9.0]}  # fmt: skip
    turns = {name: [script.Turn(one, 1.0) for one in those] for name, those in seconds.items()}
    workload = type("Workload", (), {"n_params": 10, "train": range(100)})
    ours, *others = (script.figures(each, turns, made, [1e-6, 2e-6], 5, workload) for each in made)
    # All 100 samples: 6 s where both halves take 2 + 4 / 2, then 8 s where they take 6 + 8 / 2.
    assert ours["over_halves"] == pytest.approx({"low": 0.8, "median": 1.15, "high": 1.5})
    # The product would take 2 s, then 4 s; the map 12 s, then 16 s.
    assert ours["of_mm"] == pytest.approx({"low": 1 / 3, "median": 5 / 12, "high": 1 / 2})
    assert ours["of_memmap"] == pytest.approx({"low": 2.0, "median": 2.0, "high": 2.0})
    assert ours["gflops"]["high"] == pytest.approx(2 * 10 * 500 / 6 * 1e-9)
    # 10,000 operations: in 6 s of a machine that does 1,000 a second, in 8 s of one that does 2,000.
    assert ours["of_machine"] == pytest.approx({"low": 0.625, "median": 0.625 + 0.5 * (10 / 6 - 0.625), "high": 10 / 6})
    assert all("over_halves" not in each for each in others)
    assert [each["pairs"] for each in others] == [250, 500, 1000, 125, 500]


def test_who_takes_long_takes_as_many_samples_as_there_is_time_for(scripts):
    plain = scripts("plain_scores")
    assert plain.fitting(lambda samples: samples / 100, 1000, 4.0) == 400
    assert plain.fitting(lambda samples: samples / 100, 1000, 20.0) == 1000
    assert plain.fitting(lambda samples: samples * 100, 1000, 20.0) == 50  # what was tried first
    assert plain.fitting(lambda samples: samples / 100, 3, 1e-9) == 1


def test_rows_in_memory_are_multiplied_again_until_there_are_as_many_as_asked_for(scripts):
    counts = []
    rows = torch.ones(4, 2)
    seconds = scripts("plain_scores").in_memory(rows, rows[:1], lambda s_test, part: counts.append(len(part)), 10)
    assert counts == [4, 4, 2]
    assert seconds > 0


def test_a_setting_is_in_the_file_before_the_next_is_measured(scripts, tmp_path, capsys):
    head, seen = scripts("head"), []

    def measure(folder):
        for number in (1, 2):
            seen.append((tmp_path / "figures").read_text().count("\n") if number > 1 else 0)
            yield {"number": number}

    parser = head.command_line("First line.\n\nMore.")
    settings = parser.parse_args(["--folder", str(tmp_path / "new"), "--json", str(tmp_path / "figures"), "--quick"])
    records = head.publish(settings, {"part": "x"}, measure, lambda record: f"number {record['number']}", ["torch"])
    assert seen == [0, 1]
    assert [json.loads(line) for line in (tmp_path / "figures").read_text().splitlines()] == records
    assert [(each["part"], each["number"], each["rounds"], each["quick"]) for each in records] == [
        ("x", 1, 3, True), ("x", 2, 3, True)]  # fmt: skip
    assert capsys.readouterr().out == "number 1\n\nnumber 2\n\n"
    assert not list((tmp_path / "new").iterdir())


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
    monkeypatch.setattr(plain, "GROUP", 5 * 4 * run.grad_z(0).size)
    s_test, n_params = torch.from_numpy(run.s_test(slice(None))), run.grad_z(0).size
    wanted = torch.from_numpy(np.array(run.scores())) * -37
    plain.write_map(run, 37, tmp_path / "rows")
    assert (tmp_path / "rows").stat().st_size == 37 * 4 * n_params
    rows = plain.held(tmp_path / "rows", n_params)
    assert torch.equal(rows, torch.from_numpy(run.grad_z(slice(0, 37))).float())
    assert len(plain.held(tmp_path / "rows", n_params, 6 * 4 * n_params)) == 6
    for multiply in plain.ANY:
        for samples in (37, 12):
            mapped = plain.from_map(tmp_path / "rows", s_test, multiply, samples)
            sliced = plain.by_slices(run.path / "grad_z.zarr", s_test, multiply, samples)
            for found in (mapped, sliced):
                assert float((found - wanted[:, :samples]).norm() / wanted.norm()) < 1e-5
    assert plain.faster(plain.ANY, s_test, rows) in plain.ANY


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


@pytest.mark.parametrize(
    "wrong",
    [["--workloads", "W4"], ["--only", "fast"], ["--turn-seconds", "0"], ["--cache", "warm"], ["--rounds", "0"],
     ["--tests", "20,x"], ["--samples", "0"]],
)  # fmt: skip
def test_it_refuses_what_it_does_not_know(wrong, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        scripts("bench_influence").asked(wrong)
    assert wrong[0] in capsys.readouterr().err
