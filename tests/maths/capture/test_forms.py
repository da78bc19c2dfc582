"""Forms: which parameter is kept how, as plain data."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.params import Parameters
from tests.driving import captured_rows, decided
from tests.tasks import TASKS

PARAMETERS = Parameters(("a.w", "a.b", "n", "c.w", "c.b"), ((5, 4), (5,), (3,), (2, 5), (2,)))
A = Layer("a", "a", "a.w", "a.b", 1, 4, 5)
C = Layer("c", "c", "c.w", "c.b", 2, 5, 2)


def test_sizes_of_a_layer_count_its_factors_and_its_gradient():
    assert (A.factor_size, A.gradient_size, A.names) == (9, 25, ("a.w", "a.b"))
    assert (C.factor_size, C.gradient_size) == (14, 12)
    weight_only = Layer("a", "a", "a.w", None, 1, 4, 5)
    assert (weight_only.gradient_size, weight_only.names) == (20, ("a.w",))
    bias_only = Layer("a", "a", None, "a.b", 1, 4, 5)
    assert (bias_only.gradient_size, bias_only.names) == (5, ("a.b",))


def test_dense_columns_are_the_parameters_that_are_not_factored_in_their_order():
    forms = Forms(PARAMETERS, (A,), (C,), ("n",))
    assert forms.layers == (A, C)
    assert forms.dense == ("n", "c.w", "c.b")
    assert (forms.n_dense, forms.row_size) == (3 + 10 + 2, 15 + 9)
    everything = Forms(PARAMETERS, (), (A, C), ("n",))
    assert everything.dense == PARAMETERS.names
    assert everything.n_dense == everything.row_size == PARAMETERS.size


def test_a_factored_layer_whose_bias_is_not_chosen_leaves_it_out():
    parameters = Parameters(("a.w", "n"), ((5, 4), (3,)))
    forms = Forms(parameters, (Layer("a", "a", "a.w", None, 1, 4, 5),), (), ("n",))
    assert (forms.dense, forms.n_dense, forms.row_size) == (("n",), 3, 12)


names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=6)
layers = st.builds(
    Layer, names, names, st.none() | names, st.none() | names, st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)
)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(names, shapes), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
    st.lists(layers, max_size=2),
    st.lists(layers, max_size=2),
    st.lists(names, max_size=2),
    st.sampled_from(["vmap", "loop"]),
)
def test_forms_survive_json(parameters, factored, expanded, mapped, engine):
    named = Parameters(tuple(name for name, _ in parameters), tuple(shape for _, shape in parameters))
    forms = Forms(named, tuple(factored), tuple(expanded), tuple(mapped), engine)
    assert Forms.from_json(json.loads(json.dumps(forms.to_json()))) == forms


@pytest.mark.parametrize("name", TASKS)
def test_decided_forms_cover_every_parameter_once_and_still_work_after_json(name):
    task = TASKS[name]()
    forms, _ = decided(task)
    covered = [each for layer in forms.layers for each in layer.names] + list(forms.mapped)
    assert sorted(covered) == sorted(forms.parameters.names)
    read = Forms.from_json(json.loads(json.dumps(forms.to_json())))
    assert captured_rows(task, read).equal(captured_rows(task, forms))
