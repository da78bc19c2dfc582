import json
import math

import pytest
import torch

from infl_cache.maths.curvature.products import batch_product
from infl_cache.maths.params import select
from infl_cache.maths.probe import probe_batch
from tests.scripts.running import ran, refused

WAYS = ["loop", "hessian", "graph", "anew", "kept"]
SOLVERS = ["cg", "pcg-none", "ekfac", "identity"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick benchmark of one workload: what is left in its folder, its records, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    only = ",".join([*WAYS, *SOLVERS, "exact"])
    done = ran("bench_stest", folder, "--quick", "--workloads", "W2", "--rounds", "2", "--parts", "products,solvers",
               "--only", only, "--json", "figures.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "figures.jsonl").read_text().splitlines()]
    return [path.name for path in folder.iterdir()], records, done.stdout


def test_products_agree_and_are_set_beside_the_loop(quick):
    _, (record, _), printed = quick
    assert (record["workload"], record["part"], record["rounds"]) == ("W2", "products", 2)
    known = {each["key"]: each for each in record["contestants"]}
    assert list(known) == WAYS
    for key, each in known.items():
        assert each["title"] in printed
        assert 0 < each["of_loop"]["low"] <= each["of_loop"]["median"] <= each["of_loop"]["high"] < math.inf
        assert each["sample_vectors_per_second"] == pytest.approx(16 * each["vectors_per_second"]["median"])
        assert each["error"] is None if key in ("loop", "hessian") else each["error"] < 1e-4
    assert known["loop"]["of_loop"] == {"median": 1, "low": 1, "high": 1}


def test_solvers_meet_the_residual_and_their_products_are_counted(quick):
    _, (_, record), printed = quick
    assert (record["part"], record["tests"], record["samples"]) == ("solvers", 3, 16)
    known = {each["key"]: each for each in record["contestants"]}
    assert list(known) == SOLVERS
    assert set(record["skipped"]) == {"exact"}
    assert "exact: skipped" in printed
    for key in ("cg", "pcg-none"):
        assert known[key]["largest_residual"] <= record["tolerance"] == 1e-3
        assert known[key]["converged"] == 3
        assert known[key]["products"] > 6
    assert known["identity"]["products"] == known["identity"]["spectrum_products"] == 0
    assert known["ekfac"]["products"] == 3  # the certificate only
    assert known["cg"]["spectrum_products"] == 24


def test_it_leaves_nothing_but_its_figures(quick):
    assert quick[0] == ["figures.jsonl"]


@pytest.mark.parametrize("wrong", [["--workloads", "W4"], ["--only", "fast"], ["--parts", "x"], ["--rounds", "0"]])
def test_it_refuses_what_it_does_not_know(wrong, tmp_path):
    code, said = refused("bench_stest", tmp_path, *wrong)
    assert code == 2
    assert wrong[0] in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", WAYS)
def test_a_way_gives_the_product_with_its_matrix(key, scripts):
    workload = scripts("workloads").WORKLOADS["W2"](n_train=7, n_test=1, n_fit=16)
    way = next(each for each in scripts("products").WAYS if each.key == key)
    task = workload.task()
    vectors = torch.randn(2, workload.n_params, generator=torch.Generator().manual_seed(1))
    batch = probe_batch(task, range(7), torch.device("cpu"))
    expected = batch_product(task, select(task.model, None), way.kind, batch, vectors.double(), print) / 7
    found = way.products(workload, 7, 3)(vectors).double()
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_products_of_a_part_of_the_samples_count_as_that_part(scripts, monkeypatch):
    solving = scripts("solving")
    monkeypatch.setattr(solving.Curvature, "__call__", lambda operator, vectors: vectors)
    with solving.counted(20) as counts:
        for n, shift in ((20, 0.1), (5, 0.1), (20, 0.0)):
            operator = object.__new__(solving.Curvature)
            object.__setattr__(operator, "n_train", n)
            object.__setattr__(operator, "damping", shift)
            object.__setattr__(operator, "task", type("Task", (), {"weight_decay": 0.0}))
            operator(torch.zeros(4, 3))
    assert (counts.system, counts.spectrum) == (5.0, 4.0)


def test_only_solvers_that_are_there_are_known(scripts):
    solving = scripts("solving")
    assert all(solving.Choice(name).known for name in ("cg", "pcg", "exact", "lissa", "ekfac", "identity"))
