"""The power goes at any moment: the ledger never claims what is not there, and the run goes on to the same files.

`pytest -s` shows the seed; `INFL_CACHE_SEED=17` repeats one.
"""

import os
import shutil
import subprocess
from unittest.mock import patch

import pytest

from infl_cache import Run
from infl_cache.disk.ledger import Ledger
from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import OUTPUTS
from infl_cache.stages import contraction, keeping, tally
from infl_cache.stages.verify import verify
from tests.faults import times
from tests.faults.data import small_task
from tests.faults.powercut import CONTENTS, NAMES, Disk
from tests.faults.test_kills import data_files

CUTS = times(16, 240)
COMMON = {"damping": 0.1, "progress": False, "block_rows": 8, "test_block_rows": 2, "tile_rows": 2}
RUNS = {
    "all": {**COMMON, "solver": "exact", "by_layer": True},
    "no matrix": {**COMMON, "solver": "exact", "matrix": False},
    "state": {**COMMON, "solver": "cg", "tolerance": 1e-8},
}


@pytest.fixture(autouse=True)
def states_are_kept_all_the_time(monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(contraction, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(tally, "KEEP_SECONDS", 0.0)


def whole(path, kind):
    """Some test samples, then all of them: the stores grow."""
    Run(path, small_task(), **RUNS[kind], test="0:3").all()
    run = Run(path, small_task(), **RUNS[kind], test="all")
    run.all()
    run.self_influence()


@pytest.mark.parametrize("kind", RUNS)
def test_a_power_cut_at_any_moment_leaves_no_false_claim_and_the_run_goes_on(kind, tmp_path):
    seed = int(os.environ.get("INFL_CACHE_SEED") or int.from_bytes(os.urandom(3), "little"))
    calm = Disk(tmp_path / "calm", tmp_path / "kept")
    with calm.watched():
        whole(calm.folder, kind)
    expected = data_files(calm.folder)
    every = max(1, len(RUNS) * calm.moments // CUTS)
    left = []

    def cut(moment):
        if (moment + seed) % every == 0:
            place = tmp_path / f"cut{moment}"
            variant = NAMES[len(left) % 2], CONTENTS[len(left) // 2 % 4]
            disk.after_a_cut(place, *variant, seed + moment)
            left.append((moment, *variant, place))

    disk = Disk(tmp_path / "run", tmp_path / "kept-too", cut)
    with disk.watched():
        whole(disk.folder, kind)
    assert data_files(disk.folder) == expected
    assert len(left) >= CUTS // len(RUNS) - 1
    claims = 0
    for moment, names, contents, place in left:
        about = f"moment {moment}, names {names}, contents {contents}, seed {seed}"
        if place.exists():
            folder = RunFolder(place)
            claims += sum(len(folder.records(stage)) for stage in folder.manifest.stages)
            if folder.exists:
                assert verify(folder, show=False).faults == (), about
        whole(place, kind)
        found = data_files(place)
        assert found.keys() == expected.keys(), about
        assert [name for name in found if found[name] != expected[name]] == [], about
        shutil.rmtree(place)
    assert claims > 10 * len(left) // 2
    print(f"{kind}: seed {seed}, {len(left)} cuts among {disk.moments} moments")


@pytest.mark.parametrize("kind", RUNS)
def test_files_then_their_folders_are_on_the_disk_before_the_ledger_names_them(kind, tmp_path):
    disk = Disk(tmp_path / "run", tmp_path / "kept")
    with disk.watched():
        whole(disk.folder, kind)
    synced, commits = {}, 0
    for number, (what, which) in enumerate(disk.order):
        if what == "sync":
            synced[which.removesuffix(".partial").replace(".partial.npy", ".npy")] = number
            continue
        commits += 1
        for file in which.files:
            path = disk.folder / file.path
            assert str(path) in synced, f"{file.path} was not synced before its commit"
            for folder in path.parents:
                if folder == disk.folder.parent:
                    break
                after = synced[str(path)] if folder == path.parent and path.suffix != ".npy" else -1
                assert synced.get(str(folder), -2) > after, f"{folder} was not synced after {path.name}"
    assert commits > 10


def test_a_snapshot_of_a_mounted_disk_is_a_run_that_goes_on(tmp_path):
    image, mount, again = tmp_path / "image", tmp_path / "mount", tmp_path / "again"
    tools = [shutil.which(name) for name in ("mkfs.ext4", "mount", "umount")]
    if os.geteuid() != 0 or not all(tools):
        pytest.skip("needs root, mkfs.ext4 and mount")
    with image.open("wb") as file:
        file.truncate(48 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mount.mkdir()
    if subprocess.run(["mount", "-o", "loop", str(image), str(mount)], capture_output=True).returncode:
        pytest.skip("this machine mounts no loop devices")
    kind, snapshots, commits = "all", [], []

    def snapshot(self, record, commit=Ledger.commit):
        commit(self, record)
        commits.append(record)
        if len(commits) % 7 == 0 and len(snapshots) < times(2, 8):
            # What the device holds at this moment, with the page cache of the mounted file system left behind.
            place = tmp_path / f"snapshot{len(snapshots)}"
            shutil.copyfile(image, place)
            snapshots.append((place, {(stage, index) for stage in OUTPUTS for index in self.done(stage)}))

    try:
        with patch.object(Ledger, "commit", snapshot):
            whole(mount / "run", kind)
        expected = data_files(mount / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)
    again.mkdir()
    for place, claimed in snapshots:
        subprocess.run(["mount", "-o", "loop", str(place), str(again)], check=True)
        try:
            folder = RunFolder(again / "run")
            there = {(stage, index) for stage in folder.manifest.stages for index in folder.records(stage)}
            assert claimed <= there, "what was committed is gone"
            assert verify(folder, show=False).faults == ()
            whole(again / "run", kind)
            assert data_files(again / "run") == expected
        finally:
            subprocess.run(["umount", str(again)], check=True)
    assert snapshots
