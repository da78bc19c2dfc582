"""The pieces of a plan are timed at the sizes that the stages work at, and add up as the stages do."""

import dataclasses
import math
import time

import pytest
import torch

from infl_cache import Run
from infl_cache.config import StestOptions
from infl_cache.maths.curvature import Rows, captured
from infl_cache.maths.curvature.jacobian import Jacobian, forms_for_products
from infl_cache.maths.ekfac import fit
from infl_cache.stages.opening import looked_at
from infl_cache.stages.plan.clock import clocked
from infl_cache.stages.plan.costs import LOOKS, Costs, Iterations, Sizes, solver_choice
from infl_cache.stages.plan.influence import classes_among, ranked
from infl_cache.stages.plan.pieces import FITTED, compared, fitting
from infl_cache.stages.plan.stest import plan_stest, sizes_of
from tests.driving import decided, operator_of
from tests.stages.plan.test_grads import QUIET, images

SIZES = Sizes(n_train=1000, n_test=6, n_params=50, together=3, itemsize=4, budget=10**6, batch=100)
NEEDED = Iterations(8.0, 10.0, "")


def seconds(name, costs, depth=0.0, **changes):
    return solver_choice(name, costs, dataclasses.replace(SIZES, **changes), NEEDED, depth).seconds


def test_what_is_long_is_timed_once_and_what_is_short_twice():
    calls = []
    clocked(lambda: (calls.append(1), time.sleep(0.12)), torch.device("cpu"))
    assert len(calls) == 1
    clocked(lambda: calls.append(1), torch.device("cpu"))
    assert len(calls) == 3


def test_a_look_at_the_spectrum_goes_by_rows_where_they_are_kept_or_few():
    by_rows = Costs(capture=2.0, product=3.0, vector=5.0, twice=7.0, twice_vector=11.0, row_bytes=8, outputs=10)
    assert by_rows.spectrum(SIZES) == 1000 * (2 + LOOKS * 8)
    assert by_rows.spectrum(dataclasses.replace(SIZES, budget=30)) == 1000 * LOOKS * 18
    few = dataclasses.replace(by_rows, outputs=2)
    assert few.spectrum(dataclasses.replace(SIZES, budget=30)) == 1000 * LOOKS * (2 + 8)
    assert few.spectrum(dataclasses.replace(SIZES, n_train=10**6)) == 4096 * (2 + LOOKS * 8)


def test_each_solver_takes_what_it_does():
    once = Costs(start=100.0, side=2.0, commit=5.0)
    assert seconds("identity", once) == 100 + 6 * 2 + 2 * 5
    assert seconds("cg", Costs(cg=1.0)) == 6 * 9
    assert seconds("pcg", Costs(pcg=1.0), nystrom=False) == pytest.approx(6 * (0.26 * 8 + 1))
    # Two products of the rank's vectors, over the 512 samples of the subsample.
    assert (
        seconds("pcg", Costs(vector=1.0), n_train=512) - seconds("pcg", Costs(vector=1.0), n_train=512, nystrom=False)
        == 512 * 2 * 32
    )
    assert seconds("ekfac", Costs(eigen=3.0, moments=2.0)) == 3 + 1000 * 2
    assert seconds("fisher", Costs(pair=1.0, eigen=0.0), budget=10**9) == pytest.approx(1000**2)
    # A tile on the diagonal is multiplied whole: of two rows of tiles three are.
    assert seconds("fisher", Costs(pair=1.0), n_train=4096, budget=10**9) == pytest.approx(3 * 2048**2)


def test_lissa_takes_steps_of_a_batch_and_looks_at_the_residual():
    found = seconds("lissa", Costs(twice=1.0, twice_vector=2.0), 40.0)
    assert found == 2 * 40 * 100 * (1 + 3 * 2) + 1000 * LOOKS * 3
    # A look for every 20 steps of the 100 samples, and one at the end.
    by_rows = Costs(product=1.0, row_bytes=8)
    assert seconds("lissa", by_rows, 40.0) == 2 * 3 * 1000 + LOOKS * 1000


@pytest.mark.parametrize(
    ("options", "largest", "steps", "note"),
    [
        ({"depth": 50, "repeats": 3}, math.nan, 150, "as many steps as asked for"),
        ({}, math.nan, None, "its steps are not known without a spectrum; give --depth"),
        ({"depth": 50}, 1e9, 50, ""),
        ({"tolerance": 0.1, "repeats": 2}, 0.99, 1.33 * 100 * math.log(10), ""),
        ({"depth": 50, "repeats": 2}, 1e9, 100, ""),
    ],
)
def test_the_steps_of_lissa_are_those_that_are_asked_for_or_that_the_spectrum_asks_for(options, largest, steps, note):
    options = StestOptions(solver="lissa", damping=0.01, **options)
    sizes = sizes_of(options, 3, 10**6, 50, 4, (1000, 3))
    chosen = plan_stest(options, Costs(cg=1.0), sizes, NEEDED, largest, 0.01, 200.0).chosen
    assert chosen.note == note
    if steps is None:
        assert math.isnan(chosen.seconds)
    else:
        assert chosen.seconds == pytest.approx(3 * steps)


def test_lissa_without_a_spectrum_is_not_guessed_at(tmp_path):
    task = images(40)
    bare = dataclasses.replace(task, model=task.model.to("meta"))
    text = str(Run("nowhere", bare, solver="lissa", depth=70, repeats=2, **QUIET).plan(device="h100"))
    assert re_line(text, "lissa").endswith("as many steps as asked for")
    unknown = Run("nowhere", bare, solver="lissa", **QUIET).plan(device="h100")
    assert "give --depth" in re_line(str(unknown), "lissa")
    assert math.isnan(unknown.stest.seconds)


def re_line(text, start):
    return next(line for line in text.splitlines() if line.startswith(start))


def test_a_comparison_with_the_data_ends_after_two_seconds():
    with looked_at(Run("nowhere", images()).folder, images(), Run("nowhere", images()).options) as run:
        few, many = compared(run, "train", 10), compared(run, "train", 10**9)
    assert few < many
    assert 2 <= many < 3


def test_the_fit_of_ekfac_is_timed_by_its_passes_and_its_bases():
    task = images(40)
    forms = forms_for_products(decided(task)[0], 3)
    with operator_of(task, damping=0.1) as operator:
        rows = list(captured(operator.task, forms, operator.batches)())
        made = dataclasses.replace(operator, rows=Rows(forms, lambda: rows, 8))
        eigen, moments, found = fitting(made)
    expected = fit(Rows(forms, lambda: [first(rows[0], FITTED)], 8), FITTED)
    assert 0 < moments < 1
    assert 0 < eigen < 10
    asked = torch.ones(1, forms.parameters.size)
    torch.testing.assert_close(found.solve(asked, 0.1), expected.solve(asked, 0.1))


def first(rows, count):
    factors = {key: (a[:count], g[:count]) for key, (a, g) in rows.factors.items()}
    return Jacobian(factors, rows.dense[:count], rows.hessian[:count])


def test_classes_are_counted_and_left_out_where_they_have_no_room():
    task = images(40)
    with looked_at(Run("nowhere", task).folder, task, Run("nowhere", task).options) as run:
        there = len({int(label) for _, label in task.test})
        assert classes_among(run, range(len(task.test)), 40) == there
        assert classes_among(run, range(len(task.test)), 10**12) == 0


def test_rankings_are_timed_without_a_column_for_every_sample():
    first, later = ranked(100, 10, 8, 512)
    assert 0 < later < 10 * first


def test_a_billion_samples_are_planned_as_fast_as_a_few(tmp_path):
    run = Run(tmp_path / "run", images(40), **QUIET)
    started = time.process_time()
    plan = run.plan(n_train=10**9, n_test=10**6)
    assert time.process_time() - started < 4
    assert plan.influence.n_train == plan.grads.n_train == plan.stest.sizes.n_train == 10**9
    assert plan.seconds > 3600
