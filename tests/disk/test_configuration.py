import yaml

from infl_cache.__main__ import main
from infl_cache.disk.configuration import as_yaml, written_by_this_user

CONFIGURATION = {"task": "a.py:f", "damping": 0.1}


def test_what_this_user_wrote_is_known_wherever_it_lies_and_reads_as_it_is(tmp_path):
    for name in ("run.yaml", "moved.yaml"):
        (tmp_path / name).write_bytes(as_yaml(CONFIGURATION))
        assert written_by_this_user(tmp_path / name)
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == CONFIGURATION


def test_what_was_edited_or_is_another_users_is_not(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    content = as_yaml(CONFIGURATION)
    for other in (content.replace(b"a.py", b"b.py"), content[:-3], content + b"x", b"", b"\xff", b"# by \n"):
        file.write_bytes(other)
        assert not written_by_this_user(file)
    file.write_bytes(content)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    assert not written_by_this_user(file)
    assert not (tmp_path / "other").exists()
    file.write_bytes(as_yaml(CONFIGURATION))
    assert written_by_this_user(file)
    assert (tmp_path / "other" / "infl_cache" / "key").stat().st_mode & 0o077 == 0


def test_without_a_place_for_a_key_there_is_no_mark_and_no_trust(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    file = tmp_path / "run.yaml"
    file.write_bytes(as_yaml(CONFIGURATION))
    assert yaml.safe_load(file.read_text()) == CONFIGURATION
    assert not written_by_this_user(file)


def test_a_repair_runs_no_code_that_somebody_else_named(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    canary = tmp_path / "canary"
    (folder / "run.yaml").write_text(f"task: os:mkdir\nrun: {folder}\ntask_args: {{path: {canary}}}\n")
    assert main(["verify", str(folder), "--repair"]) == 2
    said = capsys.readouterr().err
    assert "not as you wrote it" in said
    assert "--task os:mkdir" in said
    assert not canary.exists()
