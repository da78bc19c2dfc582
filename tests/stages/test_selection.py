"""Some test samples now, others later: nothing is lost, done twice, or claimed for a sample that nobody asked for."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
import zarr
from hypothesis import given
from hypothesis import strategies as st

from infl_cache import BadInput, ForeignRun, IncompleteStore, Run
from infl_cache.__main__ import main
from infl_cache.config import Options
from infl_cache.disk.ledger import Ledger
from infl_cache.disk.run import RunFolder
from infl_cache.stages import stest as stage
from infl_cache.stages.export import export
from infl_cache.stages.report import report
from infl_cache.stages.selection import as_text, asked_tests, parse_tests
from infl_cache.stages.verify import verify
from tests import tasks

N_TEST = 11
OPTIONS = {"damping": 0.1, "test_block_rows": 2, "block_rows": 5, "progress": False}


def task(**changes):
    return tasks.mlp(n_train=15, n_test=N_TEST, **changes)


def run_of(path, **options):
    return Run(path, task(), **{**OPTIONS, **options})


# --- the words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:4", [0, 1, 2, 3]),
        ("5, 7,2:4", [5, 7, 2, 3]),
        ("::4", [0, 4, 8]),
        ("-3:", [8, 9, 10]),
        ("3:0:-1", [3, 2, 1]),
        ("4,0:6", [4, 0, 1, 2, 3, 5]),
        ("9:1000", [9, 10]),
        ("-1", [10]),
        (" all ", list(range(11))),
    ],
)
def test_indices_and_slices_mean_what_they_mean_in_python(text, expected):
    assert parse_tests(text, 11) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected indices and slices"),
        ("1,,2", "expected indices and slices"),
        ("1-5", "expected indices and slices"),
        ("0:5:0", "expected indices and slices"),
        ("0:1:2:3", "expected indices and slices"),
        ("1.5", "expected indices and slices"),
        ("all,3", "expected indices and slices"),
        ("9" * 5000, "expected indices and slices"),
        ("11", "expected indices of test samples, 0 to 10, found 11"),
        ("-12", "expected indices of test samples, 0 to 10, found -12"),
        ("20:", "expected some of the 11 test samples, found none in '20:'"),
        ("5:2", "found none in '5:2'"),
    ],
)
def test_other_words_are_refused_in_one_line(text, message, tmp_path):
    with pytest.raises(BadInput, match=message) as refused:
        run_of(tmp_path / "r", test=text).grads()
    assert len(str(refused.value)) < 200
    assert not (tmp_path / "r").exists()


@given(st.lists(st.integers(0, 30), min_size=1, unique=True))
def test_the_text_of_a_selection_means_the_same_selection(chosen):
    assert parse_tests(as_text(chosen, 31), 31) == chosen


def test_the_command_line_refuses_in_two_lines_at_most(tmp_path, capsys):
    (tmp_path / "t.py").write_text("from tests.tasks import mlp")
    common = ["stest", "--task", f"{tmp_path}/t.py:mlp", "--run", str(tmp_path / "r")]
    for more in (["--test", "0:x"], ["--test", "99"], ["--test-start", "1"], ["--test-per-class", "0"],
                 ["--test", "0:2", "--test-per-class", "1"], ["--measure", "loss2"]):  # fmt: skip
        assert main([*common, *more]) == 2
        out = capsys.readouterr()
        assert 1 <= out.err.count("\n") <= 2, out.err
        assert more[0].lstrip("-") in out.err
    assert not (tmp_path / "r").exists()


def test_python_takes_indices_too_and_yaml_needs_quotes(tmp_path):
    for given_as in ([3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1]), "3,1"):
        assert Options.resolve({"test": given_as}).selection.test == "3,1"
    assert Options.resolve({"test": range(3)}).selection.test == "0,1,2"
    unquoted = yaml.safe_load("test: 1:30")
    with pytest.raises(BadInput, match=r"test: expected a string such as '0:1000'.*in quotes.*found 90"):
        Options.resolve(unquoted)


# --- by class


def of_classes(*targets):
    inputs = tasks.normal(len(targets), 6)
    return task(test=torch.utils.data.TensorDataset(inputs, torch.tensor(targets)))


def per_class(made, **given_options):
    return asked_tests(Options.resolve(given_options).selection, made, show=False)


def test_so_many_of_each_class_after_the_first_so_many_of_it():
    made = of_classes(0, 2, 0, 0, 2, 1, 0, 2)
    assert per_class(made, test_per_class=1) == [0, 1, 5]
    assert per_class(made, test_per_class=2) == [0, 1, 2, 4, 5]
    assert per_class(made, test_per_class=2, test_start=1) == [2, 3, 4, 7]
    assert per_class(made, test_per_class=99, test="all") == list(range(8))
    first, second = (per_class(made, test_per_class=2, test_start=start) for start in (0, 2))
    assert sorted(first + second) == list(range(8)), "two machines share the work"
    with pytest.raises(BadInput, match="fewer than the 4 test samples of the largest class, found 4"):
        per_class(made, test_per_class=1, test_start=4)
    with pytest.raises(BadInput, match="expected one of them, found both"):
        Run("/nowhere", made, test_per_class=1, test="0:2").grads()
    with pytest.raises(BadInput, match="expected test-per-class with it"):
        Run("/nowhere", made, test_start=1).grads()


@pytest.mark.parametrize("targets", [(0.5, 1.0), (float("nan"), 1.0)])
def test_classes_are_whole_numbers(targets):
    made = task(test=torch.utils.data.TensorDataset(tasks.normal(2, 6), torch.tensor(targets)))
    with pytest.raises(BadInput, match=r"expected an integer label of each test sample, found .* at test\[0\]"):
        per_class(made, test_per_class=1)


def test_a_selection_by_class_is_run_and_remembered(tmp_path):
    made = task(test=torch.utils.data.TensorDataset(tasks.normal(6, 6), torch.tensor([0, 0, 1, 2, 1, 2])))
    Run(tmp_path / "r", made, test_per_class=1, **OPTIONS).all()
    again = Run(tmp_path / "r", made, progress=False)
    assert again.tests.tolist() == [0, 2, 3]
    assert [result.computed for result in again.all()] == [0, 0, 0]


# --- some now, others later


def column(run, name):
    """A column of the store by test sample."""
    folder = RunFolder(run.path)
    store, samples = folder.store("stest"), folder.samples("stest")
    parts = {}
    for block in folder.stage_blocks("stest"):
        for row, value in zip(range(block.start, block.stop), store.read_block(block, [name])[name], strict=True):
            parts[int(samples[row])] = value
    return parts


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = run_of(tmp_path_factory.mktemp("full") / "r")
    run.all()
    return run


def test_all_of_them_is_what_it_always_was(full):
    folder = RunFolder(full.path)
    assert [(b.start, b.stop) for b in folder.stage_blocks("stest")] == [
        (0, 2),
        (2, 4),
        (4, 6),
        (6, 8),
        (8, 10),
        (10, 11),
    ]
    assert zarr.open_group(full.path / "s_test.zarr", mode="r")["index"][:].tolist() == list(range(N_TEST))
    assert yaml.safe_load((full.path / "run.yaml").read_text())["test"] == "all"


def test_a_subset_has_its_rows_and_only_those(tmp_path, full):
    run = run_of(tmp_path / "r", test="2:6")
    assert [result.computed for result in run.all()] == [15, 4, 4]
    assert run.tests.tolist() == [2, 3, 4, 5]
    assert np.array_equal(run.s_test([5, 2, 3]), full.s_test([5, 2, 3])), "the same blocks, the same bits"
    assert np.allclose(run.scores()[2:6], full.scores()[2:6], rtol=1e-6)
    assert np.isnan(run.scores()[[0, 1, 6, 10]]).all()
    assert run.helpful(3).ids.tolist() == full.helpful(3).ids.tolist()
    for ask in (lambda: run.helpful(7), lambda: run.harmful(7), lambda: run.s_test(7), lambda: run.s_test([3, 7])):
        with pytest.raises(IncompleteStore, match=r"asked about \('2:6'\), found 7; run .* with --test 7"):
            ask()
    with pytest.raises(IncompleteStore, match="found 0, 1, 6, 7, 8, 9, 10"):
        run.s_test(slice(None))
    with pytest.raises(BadInput, match="test sample: expected 0 to 10, found 11"):
        run.helpful(11)
    kept, calm = np.load(tmp_path / "r" / "rankings.npz"), np.load(full.path / "rankings.npz")
    assert np.array_equal(kept["helpful_ids"][2:6], calm["helpful_ids"][2:6])
    assert (kept["harmful_ids"][[0, 7]] == -1).all()
    assert np.isnan(kept["harmful_values"][[0, 7]]).all()
    assert np.allclose(kept["mean"], full.scores()[2:6].mean(0), rtol=1e-5)


def test_others_later_compute_nothing_again_and_equal_a_calm_run(tmp_path, full, monkeypatch):
    path = tmp_path / "r"
    run_of(path, test="0:3").all()
    before = {record.index: record for record in RunFolder(path).records("stest").values()}
    tiles = RunFolder(path).records("influence")
    computed, original = [], stage._right_hand_sides
    monkeypatch.setattr(stage, "_right_hand_sides", lambda run, forms, block: (
        computed.extend(run.folder.samples("stest")[block.start : block.stop].tolist()),
        original(run, forms, block))[1])  # fmt: skip
    more = run_of(path, test="0:7")
    assert [result.computed for result in more.all()] == [0, 4, 4]
    assert [result.rows for result in more.all()] == [15, 7, 7]
    last = run_of(path, test="-1,1:10:4,8:")
    assert [result.computed for result in last.all()] == [0, 3, 3], "1 and 5 are there"
    run_of(path, test="all").all()
    assert sorted(computed) == list(range(3, N_TEST)), "each once"
    after = RunFolder(path)
    assert {index: after.records("stest")[index] for index in before} == before
    assert {index: after.records("influence")[index] for index in tiles} == tiles
    run = run_of(path)
    assert run.tests.tolist() == [0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7]
    assert np.allclose(run.s_test(slice(None)), full.s_test(slice(None)), rtol=1e-3, atol=1e-6)
    assert np.allclose(run.scores(), full.scores(), rtol=1e-3, atol=1e-7)
    assert {name: column(run, name) for name in ("target", "digest", "index")} == {
        name: column(full, name) for name in ("target", "digest", "index")
    }
    assert column(run, "index") == {test: test for test in range(N_TEST)}
    assert verify(after, show=False).faults == ()
    assert np.allclose(np.load(path / "rankings.npz")["mean"], np.load(full.path / "rankings.npz")["mean"], rtol=1e-3)


def test_an_extension_by_whole_blocks_has_the_bits_of_a_calm_run(tmp_path, full):
    for selection in ("0:4", "0:8", "all"):
        run = run_of(tmp_path / "r", test=selection)
        run.grads(), run.stest()
    assert np.array_equal(run.s_test(slice(None)), full.s_test(slice(None)))
    run.influence()
    assert run.scores().tobytes() == full.scores().tobytes()


def test_samples_that_came_one_by_one_share_a_pass_over_the_gradients(tmp_path, full):
    for test in ("3", "9", "0", "5:8"):
        run = run_of(tmp_path / "r", test=test)
        run.grads(), run.stest()
    assert RunFolder(tmp_path / "r").plan("stest")["spans"] == [[0, 1], [2, 3], [4, 5], [6, 9]]
    run.influence()
    assert RunFolder(tmp_path / "r").plan("influence")["tests"] == [[0, 9]]
    assert np.allclose(run.scores()[[0, 3, 5, 6, 7, 9]], full.scores()[[0, 3, 5, 6, 7, 9]], rtol=1e-3, atol=1e-7)
    assert np.isnan(run.scores()[[1, 2, 4, 8, 10]]).all()
    for test in ("1", "2", "4", "8"):
        run_of(tmp_path / "r", test=test).stest()
    assert run_of(tmp_path / "r", tile_rows=1).influence().computed == 4
    assert np.allclose(run.scores()[:10], full.scores()[:10], rtol=1e-3, atol=1e-7)
    assert verify(RunFolder(tmp_path / "r"), show=False).faults == ()


def test_without_a_word_it_is_what_the_run_was_asked_for(tmp_path):
    run_of(tmp_path / "r", test="0:3").all()
    assert run_of(tmp_path / "r").stest().rows == 3
    run_of(tmp_path / "r", test="5:7").all()
    said = yaml.safe_load((tmp_path / "r" / "run.yaml").read_text())
    assert (said["test"], said["test_per_class"], said["test_start"]) == ("0:3,5:7", None, 0)
    assert [result.rows for result in run_of(tmp_path / "r").all()] == [15, 5, 5]
    # Said again by its file, in another folder, it is the same run.
    again = Run(tmp_path / "again", task(), **{k: said[k] for k in Options().flat()})
    again.all()
    assert sorted(again.tests) == [0, 1, 2, 5, 6]
    # Stage 1 knows nothing of it and leaves it be.
    run_of(tmp_path / "r", test="9").grads()
    assert run_of(tmp_path / "r").influence().rows == 5
    with pytest.raises(IncompleteStore, match=r"none for 9; run infl-cache stest with the same --test first"):
        run_of(tmp_path / "r", test="9").influence()


def test_force_starts_over_with_what_is_asked_then(tmp_path):
    run_of(tmp_path / "r", test="0:5").all()
    assert run_of(tmp_path / "r").stest(force=True).rows == 5
    assert run_of(tmp_path / "r", test="7:9").stest(force=True).rows == 2
    assert run_of(tmp_path / "r").tests.tolist() == [7, 8]


def test_what_is_asked_now_replaces_what_was_asked_and_is_not_done(tmp_path, monkeypatch):
    original = stage._right_hand_sides

    def failing(run, forms, block):
        if block.index == 2:
            raise RuntimeError("the lights went out")
        return original(run, forms, block)

    run = run_of(tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_right_hand_sides", failing)
        with pytest.raises(RuntimeError, match="lights"):
            run.stest()
    assert run_of(tmp_path / "r", test="8:10").stest().computed == 2
    assert run_of(tmp_path / "r").tests.tolist() == [0, 1, 2, 3, 8, 9]
    run_of(tmp_path / "r").all()
    assert sorted(np.flatnonzero(np.isfinite(run_of(tmp_path / "r").scores()).all(1))) == [0, 1, 2, 3, 8, 9]
    assert run_of(tmp_path / "r", test="all").stest().computed == 5


def test_an_unfinished_extension_leaves_the_finished_matrix_to_be_read(tmp_path):
    run = run_of(tmp_path / "r", test="0:3")
    run.all()
    before = np.array(run.scores())
    run_of(tmp_path / "r", test="0:7").stest()
    for reader in (run, Run(tmp_path / "r"), Run(tmp_path / "r", task())):
        assert np.array_equal(reader.scores(), before, equal_nan=True)
        assert len(reader.helpful(2).ids) == 10
        with pytest.raises(IncompleteStore, match=r"asked about \('0:3'\), found 5"):
            reader.helpful(5)
        assert reader.s_test(5).shape == reader.s_test(0).shape
    assert "test samples: 7 of 11: 0:7" in str(run.status())
    assert "test samples: 3 of 11: 0:3" in str(run.status())


def test_other_samples_another_task_or_damage_are_noticed_in_an_extended_run(tmp_path):
    path = tmp_path / "r"
    run_of(path, test="0:3").all()
    run_of(path, test="6:9").all()
    changed = task()
    changed.test.tensors[0][7, 0] += 1
    with pytest.raises(ForeignRun, match=r"test\[7\]: expected the sample|test: expected"):
        Run(path, changed, **OPTIONS, test="6:11").stest()
    with pytest.raises(ForeignRun, match=r"test\[7\]: expected the sample"):
        Run(path, changed).scores()
    with pytest.raises(ForeignRun, match="test: expected 11 samples"):
        Run(path, tasks.mlp(n_train=15, n_test=6)).scores()
    # Of samples that nobody asked about only the identity knows.
    assert Run(path, task()).scores().shape == (N_TEST, 15)
    data = bytearray((path / "influence.npy").read_bytes())
    data[-4 * 15 * 3 - 2] ^= 1  # in the row of test sample 8
    (path / "influence.npy").write_bytes(data)
    with pytest.raises(Exception, match="test rows 6 to 8, train columns 0 to 14 are not what was committed"):
        Run(path, task()).scores()


def test_report_and_export_show_what_was_asked(tmp_path):
    run_of(tmp_path / "r", test="4,9,2").all()
    folder = RunFolder(tmp_path / "r")
    text = report(folder)
    assert sorted(line.split()[2].rstrip(":") for line in text.splitlines() if line.startswith("test ")) == [
        "2",
        "4",
        "9",
    ]
    content = json.loads(export(folder, "json", show=False).read_text())
    assert sorted(content) == ["2", "4", "9"]
    assert content["9"]["num_in_dataset"] == 9
    assert content["9"]["label"] == int(task().test.tensors[1][9])
    with open(export(folder, "csv", top_k=2, show=False)) as file:
        rows = list(csv.DictReader(file))
    assert {row["test_id"] for row in rows} == {"2", "4", "9"}
    assert len(rows) == 12


def test_samples_that_are_not_finite_are_named_by_their_own_numbers(tmp_path):
    made = task()
    made.test.tensors[0][6] = torch.inf
    with pytest.raises(IncompleteStore, match=r"NaN or Inf at test samples 6; the other 2 are done"):
        Run(tmp_path / "r", made, test="5:8", **OPTIONS).all()
    run = Run(tmp_path / "r", made, nonfinite="skip", **OPTIONS)
    notes = run.all()[2].notes
    assert "test samples 6 have no s_test" in notes[0]
    assert np.isnan(run.scores()[6]).all()
    assert "not finite: 1 rows: 6" in str(run.status())
    assert np.isfinite(run.scores()[[5, 7]]).all()


# --- killed anywhere


class Killed(BaseException):
    """Nobody catches it: what is on the disk then is what a kill leaves."""


def data_files(path):
    kept = [p for p in path.rglob("*") if p.is_file() and (p.suffix in (".npy", ".npz") or ".zarr" in str(p))]
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in kept}


def extend(path):
    run_of(path, test="0:3,6:9").all()


def test_a_kill_at_any_moment_of_an_extension_loses_and_repeats_nothing(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    run = run_of(tmp_path / "base", test="0:3")
    run.all()
    before = np.array(run.scores())
    shutil.copytree(tmp_path / "base", tmp_path / "calm")
    extend(tmp_path / "calm")
    expected, moment = data_files(tmp_path / "calm"), 0
    replace, commit = os.replace, Ledger.commit
    while True:
        moment += 1
        path, count = tmp_path / f"killed{moment}", [0]
        shutil.copytree(tmp_path / "base", path)

        def die_at(work, counts=lambda *_: True, count=count, moment=moment):
            def counted(*arguments):
                count[0] += counts(*arguments)
                if count[0] == moment and counts(*arguments):
                    raise Killed
                return work(*arguments)

            return counted

        with monkeypatch.context() as patch:
            # Chunk files prove nothing until their block is committed: their moments are left out.
            patch.setattr(os, "replace", die_at(replace, lambda _, target: "/c." not in str(target) + "/"))
            patch.setattr(Ledger, "commit", die_at(commit))
            try:
                extend(path)
            except Killed:
                pass
            else:
                break
        reader = Run(path, task())
        try:
            scores = reader.scores()
        except IncompleteStore:
            pass
        else:
            assert np.array_equal(scores[:3], before[:3])
            assert np.isnan(scores[[3, 9]]).all()
        assert verify(RunFolder(path), show=False).faults == ()
        assert np.array_equal(reader.s_test([0, 1, 2]), run.s_test([0, 1, 2]))
        done = {stage: RunFolder(path).records(stage) for stage in ("stest", "influence")}
        extend(path)
        found = data_files(path)
        assert [name for name in expected if found.get(name) != expected[name]] == [], f"moment {moment}"
        assert found.keys() == expected.keys()
        for stage_of, records in done.items():
            assert {index: RunFolder(path).records(stage_of)[index] for index in records} == records
    assert moment > 20, "manifests, metadata, blocks, tiles, the matrix's name, rankings"


def test_s_test_that_is_over_the_tolerance_is_named_by_stage_3_and_by_status(tmp_path, caplog):
    run = run_of(tmp_path / "r", test="3:9", tolerance=1e-9, max_iterations=3)
    run.grads(), run.stest()
    caplog.clear()
    result = run.influence()
    expected = "s_test of 6 of 6 test samples did not meet the tolerance: 3, 4, 5, 6, 7, 8 (relative residual up to "
    assert any(note.startswith(expected) for note in result.notes)
    assert expected in caplog.text
    residual = sorted(column(run, "residual").values())
    status = str(run.status())
    assert f"smallest {residual[0]:.1e}, median {residual[2]:.1e}, 90 % up to {residual[5]:.1e}" in status
    assert f"largest {residual[-1]:.1e}" in status
    assert "converged: 0 of 6; over the tolerance 6: 3, 4, 5, 6, 7, 8" in status


def test_nothing_is_said_of_rows_that_converged(tmp_path, caplog):
    run = run_of(tmp_path / "r", test="3:9")
    assert [result.notes for result in run.all()] == [(), (), ()]
    assert "converged: 6 of 6\n" in str(run.status()) + "\n"
    assert "tolerance" not in caplog.text
