import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from infl_cache import Run, load_task
from infl_cache.__main__ import main

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from infl_cache import Task

def small(width: int = 4, shift: float = 0.0, n_test: int = 5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    x, y = torch.randn(25, 6), torch.randint(0, 3, (25,))
    x[0, 0] += shift
    loss = nn.CrossEntropyLoss(reduction="none")
    train, test = TensorDataset(x[:20], y[:20]), TensorDataset(x[20:20+n_test], y[20:20+n_test])
    return Task(model=model, train=train, test=test, loss=loss)

def broken():
    raise KeyError("no data here")

def number():
    return 7
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(line):
    return main(shlex.split(line))


def finished(options=""):
    assert call(f"run --task task.py:small --run runs/r --no-progress --damping 0.1 {options}") == 0


def test_the_three_stages_one_by_one_and_again(here, capsys):
    for stage in ("grads", "stest", "influence"):
        assert call(f"{stage} --task task.py:small --run runs/r --damping 0.1") == 0
    assert "20 of 20 rows computed" in capsys.readouterr().out
    for stage in ("grads", "stest", "influence"):
        assert call(f"{stage} --task task.py:small --run runs/r") == 0
    assert capsys.readouterr().out.count("nothing left to do") == 3
    assert np.load("runs/r/influence.npy", mmap_mode="r", allow_pickle=False).shape == (5, 20)
    assert {p.name for p in (here / "runs" / "r").iterdir() if not p.name.startswith(".lock")} >= {
        "run.yaml", "manifest.json", "ledger.sqlite", "grad_z.zarr", "s_test.zarr", "influence.npy", "rankings.npz"
    }  # fmt: skip


def test_run_does_all_and_ends_with_a_table(here, capsys):
    finished()
    out = capsys.readouterr().out
    assert "test sample" in out
    assert "helpful" in out
    assert out.index("grads ") < out.index("stest ") < out.index("influence ")


def test_run_yaml_runs_again_as_it_is(here, capsys):
    finished("--task-args.width 5 --codec zstd")
    stored = yaml.safe_load(Path("runs/r/run.yaml").read_text())
    assert (stored["task_args"], stored["damping"]) == ({"width": 5}, 0.1)
    assert stored["task"] == f"{here / 'task.py'}:small"
    capsys.readouterr()
    assert call("run --config runs/r/run.yaml") == 0
    assert capsys.readouterr().out.count("nothing left to do") == 3
    first = Path("runs/r/influence.npy").read_bytes()
    assert call("run --config runs/r/run.yaml --run runs/again") == 0
    assert Path("runs/again/influence.npy").read_bytes() == first


def test_a_run_that_goes_on_in_python_still_runs_again_as_it_is(here, capsys):
    finished("--task-args.width 5")
    task = load_task("task.py:small", {"width": 5})
    Run("runs/r", task, progress=False).self_influence()
    stored = yaml.safe_load(Path("runs/r/run.yaml").read_text())
    assert (stored["task"], stored["task_args"]) == (f"{here / 'task.py'}:small", {"width": 5})
    capsys.readouterr()
    assert call("run --config runs/r/run.yaml") == 0
    assert capsys.readouterr().out.count("nothing left to do") == 3
    Run("runs/r", task, progress=False).influence(force=True)
    assert yaml.safe_load(Path("runs/r/run.yaml").read_text())["task"] is None


def test_a_toml_file_serves_as_well_and_the_command_line_wins(here):
    Path("c.toml").write_text('task = "task.py:small"\nrun = "runs/t"\ndamping = 0.3\ntask-args = {width = 6}\n')
    assert call("stest --config c.toml --solver exact --damping 0.2") == 0
    stored = yaml.safe_load(Path("runs/t/run.yaml").read_text())
    assert (stored["damping"], stored["solver"], stored["task_args"]) == (0.2, "exact", {"width": 6})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("grads --run r", "task: expected --task on the command line"),
        ("grads --task task.py:small", "run: expected --run on the command line"),
        ("grads --task task.py --run r", "task: expected path/to/file.py:function"),
        ("grads --task nothing.py:small --run r", "expected a Python file, found none at nothing.py"),
        ("grads --task task.py:absent --run r", "expected a function absent in task.py"),
        ("grads --task task.py:broken --run r", "raised KeyError: 'no data here'"),
        ("grads --task task.py:number --run r", "to return an infl_cache.Task, found int"),
        ("grads --task task.py:small --run r --task-args.depth 3", "cannot be called with {'depth': 3}"),
        ("grads --task no.such.module:f --run r", "expected a Python module, found none called no"),
        ("grads --task task.py:small --run r --form wide", "form: expected one of auto, dense, found 'wide'"),
        ("grads --task task.py:small --run r --damping -1", "damping: expected a finite number at least 0.0, found -1"),
        ("grads --task task.py:small --run r --damping abc", "damping"),
        ("grads --task task.py:small --run r --memory lots", "memory: expected a size such as 2GB"),
        ("grads --task task.py:small --run r --device tpu9", "device: expected one that works here, found 'tpu9'"),
        ("grads --task task.py:small --run r --wrong 1", "--wrong"),
        ("grads --config absent.yaml", "absent.yaml: cannot be read"),
        ("grads --config odd.yaml", "unknown option 'dampning'; did you mean damping?"),
        ("grads --config evil.yaml", "not a plain YAML or TOML file"),
        ("status nowhere", "expected a run folder, found no manifest.json there"),
        ("verify nowhere", "expected a run folder"),
        ("fly", "fly"),
        ("", "command"),
    ],
)
def test_bad_input_is_one_or_two_lines_and_exit_code_2(here, capsys, line, message):
    Path("odd.yaml").write_text("task: task.py:small\nrun: r\ndampning: 0.1\n")
    Path("evil.yaml").write_text("task: !!python/object/apply:os.system ['touch executed']\nrun: r\n")
    assert call(line) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err or "broken" in line or "no.such" in line
    assert captured.out == ""
    assert not Path("executed").exists()
    assert not any(p.name[:5] != ".lock" for p in Path("r").glob("*"))


def kept_files():
    """Every file of the run but the lock and SQLite's own side files."""
    passing = (".lock", "ledger.sqlite-")
    return {p: p.read_bytes() for p in Path("runs/r").rglob("*") if p.is_file() and not p.name.startswith(passing)}


def test_another_configuration_is_exit_code_3_and_touches_nothing(here, capsys):
    finished()
    before = kept_files()
    assert call("stest --task task.py:small --run runs/r --damping 0.2") == 3
    assert "damping: expected 0.1, found 0.2" in capsys.readouterr().err
    assert call("grads --task task.py:small --run runs/r --task-args.shift 0.5") == 3
    assert "train: expected" in capsys.readouterr().err
    assert before == kept_files()


def test_damage_and_missing_stages_are_exit_code_4(here, capsys):
    assert call("influence --task task.py:small --run runs/new") == 4
    assert "run infl-cache grads" in capsys.readouterr().err
    for line in ("select runs/new", "select runs/new --test 0", "export runs/new --format csv", "report runs/new"):
        assert call(line) == 4
        assert "infl-cache " in capsys.readouterr().err.partition("run ")[2]
    assert call("select runs/new --out made/ids.txt") == 4
    assert not Path("made").exists()
    finished()
    assert call("verify runs/r") == 0
    chunk = Path("runs/r/grad_z.zarr/loss/c.0")
    chunk.write_bytes(chunk.read_bytes()[:-6])
    assert call("verify runs/r") == 4
    assert "grad_z.zarr/loss/c.0 (rows 0 to 19): expected" in capsys.readouterr().err
    assert call("grads --task task.py:small --run runs/r") == 4


def test_a_full_disk_is_exit_code_5(here, capsys, monkeypatch):
    from infl_cache.disk import store

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "sync_together", full)
    assert call("grads --task task.py:small --run runs/r") == 5
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.undo()
    os.chdir(here)
    assert call("grads --task task.py:small --run runs/r") == 0


def test_a_second_writer_is_exit_code_6_and_says_who_the_first_is(here, capsys):
    from infl_cache.disk.lock import only_writer

    finished()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import time, pathlib\nfrom infl_cache.disk.lock import only_writer\n"
         "with only_writer(pathlib.Path('runs/r')):\n    print('held', flush=True)\n    time.sleep(60)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert call("grads --task task.py:small --run runs/r") == 6
    assert f"process {holder.pid} on " in capsys.readouterr().err
    assert call("status runs/r") == 0
    holder.kill()
    holder.communicate()
    with only_writer(Path("runs/r")):
        pass


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_between_blocks_and_the_printed_line_carries_on(here, signum, code):
    Path("slow.py").write_text(
        TASK.replace("def small", "def unused").replace(
            "def broken",
            """
class Slow(torch.utils.data.Dataset):
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        import time; time.sleep(0.02)
        return self.data[i]

def slow():
    task = unused()
    import dataclasses
    return dataclasses.replace(task, train=Slow(task.train))

def broken""",
        )
    )
    command = [
        sys.executable,
        "-m",
        "infl_cache",
        "grads",
        "--task",
        "slow.py:slow",
        "--run",
        "runs/s",
        "--block-rows",
        "1",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(Path("runs/s/grad_z.zarr").glob("loss/c.2")) and time.monotonic() < deadline:
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert "between two blocks; what is done is kept" in err
    resume = next(line for line in err.splitlines() if line.startswith("carry on with: infl-cache "))
    words = shlex.split(resume.removeprefix("carry on with: infl-cache "))
    again = subprocess.run([sys.executable, "-m", "infl_cache", *words], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert 0 < int(again.stdout.split()[1]) < 20


def test_status_tells_what_is_done(here, capsys):
    assert call("grads --task task.py:small --run runs/r") == 0
    capsys.readouterr()
    assert call("status runs/r") == 0
    out = capsys.readouterr().out
    assert "20 of 20 rows (done)" in out
    assert "stest      not begun" in out
    finished("--force")
    capsys.readouterr()
    assert call("status runs/r") == 0
    assert "converged: 5 of 5" in capsys.readouterr().out


def test_export_json_has_the_old_structure(here, capsys):
    finished()
    capsys.readouterr()
    assert call("export runs/r --format json --out out.json") == 0
    assert capsys.readouterr().out.strip() == "out.json"
    loaded, matrix = json.loads(Path("out.json").read_text()), np.load("runs/r/influence.npy")
    assert list(loaded) == [str(j) for j in range(5)]
    entry = loaded["3"]
    assert entry["num_in_dataset"] == 3
    assert entry["label"] in (0, 1, 2)
    assert entry["time_calc_influence_s"] > 0
    assert np.allclose(entry["influence"], matrix[3], rtol=1e-6)
    assert entry["helpful"] == np.argsort(matrix[3], kind="stable").tolist()
    assert entry["harmful"] == np.argsort(-matrix[3], kind="stable").tolist()


def test_export_csv_is_a_long_table(here):
    finished()
    assert call("export runs/r --format csv --top-k 2") == 0
    lines = Path("runs/r/export/influence.csv").read_text().splitlines()
    assert lines[0] == "test_id,train_id,rank,effect,influence,loss_change_if_removed,test_label,train_label"
    assert len(lines) == 1 + 5 * 2 * 2
    first = lines[1].split(",")
    matrix = np.load("runs/r/influence.npy")
    assert (first[0], int(first[1]), first[2], first[3]) == ("0", int(matrix[0].argmin()), "1", "helpful")
    assert float(first[4]) == -float(first[5]) == float(matrix[0].min())


@pytest.mark.parametrize(("line", "code"), [("export runs/r --format xml", 2), ("export runs/r --top-k 0", 2)])
def test_export_refuses_what_it_cannot_write(here, capsys, line, code):
    finished()
    assert call(line) == code


def test_select_writes_ids_to_retrain_with_or_without(here, capsys, caplog):
    finished()
    assert call("self-influence --task task.py:small --run runs/r") == 0
    matrix = np.load("runs/r/influence.npy")
    order, of_some = (
        np.argsort(-rows.mean(0, dtype=np.float64), kind="stable") for rows in (matrix, matrix[[0, 3, 4]])
    )
    capsys.readouterr()
    assert call("select runs/r --k 4") == 0
    assert capsys.readouterr().out == "".join(f"{i}\n" for i in order[:4])
    assert call("select runs/r --effect harmful --k 4 --out out/bad.txt") == 0
    assert capsys.readouterr().out == "out/bad.txt: 4 of 20 training samples, the most harmful on all test samples\n"
    assert np.loadtxt("out/bad.txt", dtype=int).tolist() == order[:4].tolist()
    assert call("select runs/r --k 4 --keep --out good.npy") == 0
    assert "16 of 20 training samples, all but the 4 most harmful" in capsys.readouterr().out
    assert np.load("good.npy").tolist() == sorted(order[4:].tolist())
    assert call("select runs/r --k 20 --out bad.txt") == 0
    harmful = [i for i in order if matrix.mean(0, dtype=np.float64)[i] > 0]
    assert np.loadtxt("bad.txt", dtype=int).tolist() == harmful
    assert f"k: {len(harmful)} of the 20 asked for are there: no other training sample is harmful on all" in caplog.text
    assert call("select runs/r --effect helpful --test 0,3:5 --k 2 --out some.json") == 0
    assert json.loads(Path("some.json").read_text()) == of_some[::-1][:2].tolist()
    assert call("select runs/r --self-influence --k 3 --out ids --format txt") == 0
    suspects = np.load("runs/r/self_influence.npz", allow_pickle=False)["ids"][:3].tolist()
    assert Path("ids").read_text().split() == [str(i) for i in suspects]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--effect odd", "effect: expected one of helpful, harmful, both, found 'odd'"),
        ("--k 0", "k: expected at least 1, found 0"),
        ("--k 20 --effect both --keep", "k: expected fewer than the 20 training samples with --keep, found 20"),
        ("--test 9", "expected indices of test samples, 0 to 4, found 9"),
        ("--test 0 --label 1", "test, label: expected one of them, found both"),
        ("--label 8", "class: expected 0, 1, found 8"),
        ("--self-influence --test 0", "self-influence: expected neither --effect, --test nor --label with it"),
        ("--format npy", "out: expected a file for the format 'npy', found none"),
        ("--out ids.csv", "out: expected a name that ends in .txt, .json, .npy, or --format, found 'ids.csv'"),
        ("--out task.py/ids.txt", "expected a folder that can be written in"),
    ],
)
def test_select_refuses_what_cannot_be_meant(chosen_from, capsys, monkeypatch, options, message):
    monkeypatch.chdir(chosen_from)
    assert call(f"select runs/r {options}") == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def chosen_from(tmp_path_factory):
    """A folder with a finished run that is only read."""
    path = tmp_path_factory.mktemp("chosen")
    (path / "task.py").write_text(TASK)
    line = f"run --task {path}/task.py:small --run {path}/runs/r --no-progress --damping 0.1"
    assert call(line) == 0
    return path


def test_export_parquet_is_the_csv_table_of_what_does_help_or_harm(here):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    finished()
    assert call("export runs/r --format csv --top-k 3 --out t.csv") == 0
    assert call("export runs/r --format parquet --top-k 3 --out t.parquet") == 0
    assert call("export runs/r --format parquet --top-k all") == 0
    lines, found = pandas.read_csv("t.csv"), pandas.read_parquet("t.parquet")
    lines = lines[(lines["influence"] < 0) == (lines["effect"] == "helpful")]
    assert found.drop(columns=["influence", "loss_change_if_removed"]).astype({"effect": str}).values.tolist() == (
        lines.drop(columns=["influence", "loss_change_if_removed"]).values.tolist()
    )
    assert len(pandas.read_parquet("runs/r/export/influence.parquet")) == 5 * 20
    assert call("export runs/r --format parquet --top-k some") == 2


def test_figures_of_run_and_report(here, capsys):
    pytest.importorskip("matplotlib")
    assert call("run --task task.py:small --run runs/new --figures gif") == 2
    assert "figures: expected one of png, svg, found 'gif'" in capsys.readouterr().err
    assert not Path("runs/new").exists()
    finished("--figures svg")
    out = capsys.readouterr().out
    names = ("neighbours", "classes", "histogram")
    assert all(f"runs/r/report/figures/{name}.svg" in out for name in names)
    assert "not drawn: layers: " in out
    assert call("report runs/r --figures png") == 0
    assert {path.name for path in Path("runs/r/report/figures").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    assert call("report runs/r --figures pdf") == 2


def test_a_report_without_the_page_is_a_table_alone(here, capsys):
    finished()
    shutil.rmtree("runs/r/report")
    capsys.readouterr()
    assert call("report runs/r --no-page --task task.py:small") == 0
    assert "negative = helpful" in capsys.readouterr().out
    assert not Path("runs/r/report").exists()


def page_of(output):
    """What is in the page whose path is the last line of the output."""
    path = Path(output.rstrip().splitlines()[-1])
    assert path == Path("runs/r/report/index.html")
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(text)


def test_run_and_report_end_with_the_path_of_the_page(here, capsys):
    finished()
    assert len(page_of(capsys.readouterr().out)["samples"]["test"]) == 5
    assert call("report runs/r --tests 1,3 --neighbours 2") == 0
    found = page_of(capsys.readouterr().out)
    assert [(each["id"], len(each["helpful"])) for each in found["tests"]] == [(1, 2), (3, 2)]
    assert list(found["samples"]["test"]) == ["1", "3"]
    assert call("report runs/r --tests 3 --neighbours 2 --no-page") == 2
    assert "no-page: expected no options of the page with it, found tests, neighbours" in capsys.readouterr().err
    assert call("report runs/r --task-args.shift 0.5") == 2
    assert "task-args: expected --task with them, found none" in capsys.readouterr().err
    assert call("report runs/r --tests 9") == 2
    assert "expected indices of test samples, 0 to 4, found 9" in capsys.readouterr().err


def test_a_report_takes_the_task_from_run_yaml_only_if_this_user_wrote_it(here, capsys, caplog):
    finished()
    Path("runs/r/run.yaml").write_text(Path("runs/r/run.yaml").read_text().replace("task.py", "evil.py"))
    (here / "evil.py").write_text("open('ran', 'w').close()")
    capsys.readouterr()
    assert call("report runs/r") == 0
    found = page_of(capsys.readouterr().out)
    assert not Path("ran").exists()
    assert found["samples"] is None
    assert "evil.py" in found["notes"][0]
    assert "is not as you wrote it on this machine; if you trust it: infl-cache report runs/r --task" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: Path("task.py").unlink(), r"the task of run\.yaml cannot be used \(task: expected a Python file"),
        (lambda: Path("task.py").write_text(TASK.replace("randn(25, 6)", "rand(25, 6)")), "expected the sample that"),
        (lambda: Path("runs/r/run.yaml").unlink(), r"the run has no run\.yaml"),
    ],
)
def test_a_task_of_run_yaml_that_cannot_be_used_is_a_note(here, capsys, caplog, change, words):
    finished()
    change()
    capsys.readouterr()
    assert call("report runs/r") == 0
    assert page_of(capsys.readouterr().out)["samples"] is None
    assert re.search(words, caplog.text)


def test_a_render_that_cannot_be_used_is_said_before_any_work(here, capsys):
    text = TASK.replace("loss=loss)", "loss=loss, render=lambda sample: sample)")
    (here / "task.py").write_text(text)
    assert call("run --task task.py:small --run runs/r --no-progress") == 2
    assert "render, on test[0]: expected a picture (H, W)" in capsys.readouterr().err
    assert not Path("runs/r").exists()


def test_debug_shows_the_traceback(here, capsys):
    assert call("grads --task task.py:small --run runs/r --form wide --debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_help_has_examples_for_every_command(capsys):
    own = {"export": "infl-cache export runs", "select": "infl-cache select runs", "report": "infl-cache report runs"}
    for command in ([], ["grads"], ["run"], ["status"], ["export"], ["select"], ["report"], ["verify"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, "--help"])
        assert stopped.value.code == 0
        out = capsys.readouterr().out
        assert own.get("".join(command), "infl-cache run --task") in out
        assert "exit codes: 0 done" in out


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "infl_cache", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "infl-cache 0.1.0"


def test_self_influence_needs_stage_1_alone_and_ends_with_a_table(here, capsys):
    line = "self-influence --task task.py:small --run runs/r --solver fisher --damping 0.1"
    assert call(line) == 4
    assert "run infl-cache grads" in capsys.readouterr().err
    assert call("grads --task task.py:small --run runs/r --solver fisher --damping 0.1") == 0
    capsys.readouterr()
    assert call(line) == 0
    out = capsys.readouterr().out
    assert "self-influence 20 of 20 rows computed" in out
    values = np.load("runs/r/self_influence.npz", allow_pickle=False)
    assert [int(row.split()[0]) for row in out.splitlines()[5:15]] == values["ids"][:10].tolist()
    assert call("self-influence --task task.py:small --run runs/r") == 0
    assert "nothing left to do" in capsys.readouterr().out
    assert call("self-influence --task task.py:small --run runs/r --damping 0.2") == 3
    assert call("verify runs/r") == 0


@pytest.mark.parametrize("line", ["grads --task task.py:small --run r --dampin 0.1", "report runs/r --test 1"])
def test_an_option_is_written_in_full(here, capsys, line):
    assert call(line) == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err
