"""Runs that an older version began: read where that is possible, else refused in words that say what to do."""

import json

import pytest

from infl_cache import Run
from infl_cache.disk import layout
from infl_cache.disk.manifest import fingerprint
from infl_cache.disk.run import RunFolder
from infl_cache.errors import DamagedStore, ForeignRun
from infl_cache.stages.verify import verify
from tests import tasks

QUIET = {"progress": False, "damping": 0.1}


def aged(path):
    """Take out of a run's manifest what older versions did not write: codecs, `cache`, ways without a rule."""
    folder = RunFolder(path)
    with folder.writing():
        grads = folder.manifest.stages["grads"]
        del grads["identity"]["cache"], grads["identity"]["layer_forms"]
        del grads["plan"]["forms"]["spread"], grads["plan"]["forms"]["alone"]
        for stage in ("grads", "stest"):
            del folder.manifest.stages[stage]["plan"]["codec"]
        folder._write_manifest()


def test_the_status_of_an_older_run_is_shown(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.all()
    expected = str(run.status())
    aged(run.path)
    assert "layers factored" in expected
    assert str(Run(tmp_path / "run").status()) == expected


def test_a_store_without_its_codec_is_read_and_not_written(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), block_rows=4, **QUIET)
    run.grads()
    run.stest()
    expected = run.s_test(0)
    aged(run.path)
    folder = RunFolder(run.path)
    assert (Run(run.path).s_test(0) == expected).all()
    words = r"expected the codec of grads in manifest.json, found none.* another version; .*infl-cache grads --force"
    with pytest.raises(DamagedStore, match=words):
        folder.store("grads", "r+")


def test_an_older_run_is_started_over_with_force(tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.all()
    aged(run.path)
    Run(run.path, tasks.mlp(), **QUIET).all(force=True)
    assert RunFolder(run.path).store("grads", "r+")


def before_the_choice_of_curvature(path):
    """Take out of a run what stage 2 knew nothing of before there was a choice of preconditioners and subsamples."""
    folder = RunFolder(path)
    with folder.writing():
        entry = folder.manifest.stages["stest"]
        for part in (entry["identity"], entry["options"]):
            part.pop("preconditioner", None), part.pop("curvature_samples")
            part["curvature"] = "ggn"
        entry["plan"].pop("spectrum"), entry["plan"].pop("damping")
        entry["fingerprint"] = fingerprint({"task": folder.manifest.task, "stage": entry["identity"]})
        folder._write_manifest()
        lines = (path / "run.yaml").read_text().splitlines()
        new = ("preconditioner:", "curvature_samples:", "curvature:")
        kept = [line for line in lines if not line.startswith(new)]
        (path / "run.yaml").write_text("\n".join([*kept, "curvature: ggn", ""]))


@pytest.mark.parametrize("solver", ["cg", "lissa", "exact"])
def test_an_older_stage_2_is_carried_on_where_it_stopped(solver, tmp_path, lights_out):
    run = Run(tmp_path / "run", tasks.mlp(), solver=solver, test_block_rows=1, **QUIET)
    run.grads()
    begun = lights_out()
    with pytest.raises(RuntimeError, match="lights"):
        run.stest()
    before_the_choice_of_curvature(run.path)
    assert Run(run.path, tasks.mlp(), progress=False).stest().computed == 2
    assert [result.computed for result in Run(run.path, tasks.mlp(), progress=False).all()] == [0, 0, 4]
    assert Run(run.path, tasks.mlp(), progress=False).stest().computed == 0
    assert begun == [0, 1, 2, 2, 3]


@pytest.mark.parametrize("options", [{"curvature_samples": 5}, {"solver": "pcg"}, {"curvature": "hessian"}], ids=str)
def test_an_older_stage_2_is_not_carried_on_with_what_it_did_not_know(options, tmp_path):
    run = Run(tmp_path / "run", tasks.mlp(), **QUIET)
    run.stest()
    before_the_choice_of_curvature(run.path)
    with pytest.raises(ForeignRun, match=rf"{next(iter(options))}: expected .*, found .*--force"):
        Run(run.path, tasks.mlp(), progress=False, **options).stest()
    assert Run(run.path, tasks.mlp(), progress=False, **options).stest(force=True).computed == 4


def dimension_names(path):
    return {
        str(file.parent.relative_to(path)): json.loads(file.read_text())["dimension_names"]
        for file in path.rglob("zarr.json")
        if "dimension_names" in json.loads(file.read_text())
    }


def test_stores_from_before_their_axes_had_names_are_read_repaired_and_extended(tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setattr(layout, "axis_names", lambda *given: ())
        run = Run(tmp_path / "run", tasks.mlp(), solver="exact", test="0:2", **QUIET)
        run.all()
        run.self_influence()
    folder = RunFolder(run.path)
    with folder.writing():
        for stage in ("grads", "stest", "self_influence"):
            for array in folder.manifest.stages[stage]["plan"]["arrays"]:
                assert list(array.pop("axes")) == []
        folder._write_manifest()
    assert dimension_names(run.path)["s_test.zarr/s_test"] == ["sample", "axis1"]
    again = Run(run.path, tasks.mlp(), test="all", progress=False)
    assert verify(RunFolder(run.path), show=False).faults == ()
    (run.path / "grad_z.zarr" / "loss" / "zarr.json").unlink()
    assert again.verify(repair=True).faults == ()
    assert [result.computed for result in again.all()] == [0, 2, 2]
    assert again.self_influence().computed == 0
    assert dimension_names(run.path)["s_test.zarr/s_test"] == ["sample", "axis1"]
    new = Run(tmp_path / "new", tasks.mlp(), solver="exact", **QUIET)
    new.all()
    assert dimension_names(new.path)["s_test.zarr/s_test"] == ["row", "parameter"]
    assert dimension_names(new.path)["grad_z.zarr/0/input"] == ["train", "input_1", "input_2"]
    chunks = [file.relative_to(new.path) for file in new.path.glob("grad_z.zarr/**/c.*")]
    assert len(chunks) >= 9
    assert all((new.path / name).read_bytes() == (run.path / name).read_bytes() for name in chunks)
