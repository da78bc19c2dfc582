"""What a run that never began leaves behind: nothing that the next start would take for somebody else's."""

import pytest

from infl_cache.disk.run import RunFolder
from infl_cache.disk.sweep import forget_unbegun, refuse_other_folders
from infl_cache.errors import BadInput


def test_a_run_that_had_no_room_to_begin_leaves_nothing_in_the_way(tmp_path):
    folder = RunFolder(tmp_path / "run")

    def fail():
        with folder.writing():
            (folder.path / "manifest.json.partial").write_bytes(b"{")
            (folder.path / "run.yaml").write_bytes(b"x: 1")
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        fail()
    assert [each.name for each in folder.path.iterdir() if not each.name.startswith(".lock")] == []
    with RunFolder(folder.path).writing():
        pass


@pytest.mark.parametrize("name", ["run.yaml.partial", "mine.txt"])
def test_files_without_a_run_are_somebodys_until_a_ledger_says_otherwise(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(BadInput, match="found other files"):
        refuse_other_folders(tmp_path)
    (tmp_path / "ledger.sqlite").touch()
    refuse_other_folders(tmp_path)
    forget_unbegun(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ([] if name.endswith(".partial") else [name])
