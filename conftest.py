"""What examples in docstrings share: a finished run, for those that draw one."""

import pytest


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A run of 20 training and 6 test samples with all there is to draw."""
    pytest.importorskip("matplotlib")
    from infl_cache import Run
    from tests import tasks

    path, task = tmp_path_factory.mktemp("plotting") / "run", tasks.logistic(n_train=20, n_test=6)
    run = Run(path, task, damping=0.1, solver="exact", by_layer=True, progress=False)
    run.all()
    run.self_influence()
    run.validate(points=5)
    return run


@pytest.fixture(autouse=True)
def run_of_the_examples(request, doctest_namespace):
    """In the examples of `infl_cache.plotting` that run is `run`."""
    if request.node.name.startswith("infl_cache.plotting"):
        doctest_namespace["run"] = request.getfixturevalue("finished_run")
