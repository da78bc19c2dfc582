import json
import os

import pytest

from infl_cache.disk import codecs, direct, ledger, run
from tests.scripts.running import ran


def test_the_pipeline_takes_turns_with_itself_without_its_care(tmp_path):
    done = ran("bench_durability", tmp_path, "--quick", "--workloads", "W2", "--rounds", "1", "--json", "figures.jsonl")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["figures.jsonl"]
    record = json.loads((tmp_path / "figures.jsonl").read_text())
    assert (record["workload"], record["samples"], record["bytes"] > 100_000) == ("W2", 128, True)
    assert [each["key"] for each in record["contestants"]] == ["ours", "without", "cached", "synced"]
    ours, without = record["contestants"][:2]
    assert ours["ours_over_it"]["median"] == 1
    assert without["ours_over_it"]["median"] == ours["seconds"]["median"] / without["seconds"]["median"]
    assert "without ledger, fsync, checksum" in done.stdout


def test_a_careless_run_writes_the_same_rows_and_leaves_out_what_was_named(scripts, tmp_path, monkeypatch):
    script, workloads = scripts("bench_durability"), scripts("workloads")
    workload = workloads.WORKLOADS["W2"](n_train=32, n_fit=8)
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    rows = {}
    for parts in ((), ("fsync",), ("ledger",), ("checksum",), script.PARTS):
        folder = tmp_path / "-".join(parts)
        synced.clear()
        with script.careless(parts):
            made = script.Run(folder, workload.task(), progress=False)
            made.grads()
        assert bool(synced) == ("fsync" not in parts)
        assert len(ledger.done_in(folder / "ledger.sqlite", "grads")) == int("ledger" not in parts)
        chunk = next((folder / "grad_z.zarr" / "loss").glob("c.*")).read_bytes()
        assert (chunk[-4:] == bytes(4)) == ("checksum" in parts)
        rows[parts] = {
            path.relative_to(folder): path.read_bytes()[:-4] for path in (folder / "grad_z.zarr").rglob("c.*")
        }
    assert all(found == rows[()] for found in rows.values())
    direct_writing = direct.DIRECT
    with script.careless((), cached=True):
        assert direct.DIRECT == 0
    assert direct_writing == direct.DIRECT == getattr(os, "O_DIRECT", 0)
    assert run.Ledger is ledger.Ledger
    assert getattr(os, "O_DIRECT", 0) == direct.DIRECT
    assert codecs.google_crc32c.value(b"123456789") == 0xE3069283


@pytest.mark.parametrize("wrong", [["--workloads", "W9"], ["--without", "sleep"], ["--rounds", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, scripts, capsys):
    with pytest.raises(SystemExit, match="2"):
        scripts("bench_durability").asked(wrong)
    assert wrong[0] in capsys.readouterr().err
