"""Forms: which parameter is kept how, as plain data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infl_cache import DamagedStore
from infl_cache.maths.capture import Forms, Layer
from infl_cache.maths.capture.forms import Alone, Spread
from infl_cache.maths.capture.rules import RULES
from infl_cache.maths.params import Parameters
from tests.driving import captured_rows, decided
from tests.tasks import TASKS

PARAMETERS = Parameters(("a.w", "a.b", "n", "c.w", "c.b"), ((5, 4), (5,), (3,), (2, 5), (2,)))
A = Layer("a", "a", "linear", {"weight": "a.w", "bias": "a.b"}, (1, 4), (1, 5), 25)
C = Layer("c", "c", "linear", {"weight": "c.w", "bias": "c.b"}, (2, 5), (2, 2), 12)


def test_sizes_of_a_layer_count_its_factors():
    assert (A.factor_size, A.names, A.input_from) == (9, ("a.w", "a.b"), "a")
    assert (C.factor_size, C.names) == (14, ("c.w", "c.b"))
    image = Layer("i", "i", "convolution", {"weight": "w"}, (1, 2, 4, 4), (1, 3, 2, 2), 54)
    assert (image.factor_size, image.names) == (32 + 12, ("w",))
    words = Layer("e", "e", "embedding", {"weight": "w"}, (6,), (6, 4), 40, indices=True)
    assert words.factor_size == 6 + 24


def test_a_shared_input_is_counted_where_it_is_stored():
    key = replace(A, key="k", module="k", input_key="a")
    assert (key.factor_size, key.input_from) == (5, "a")
    assert Forms(PARAMETERS, (A, replace(key, parameters={"weight": "c.w"}))).row_size == 9 + 5 + 3 + 2


def test_dense_columns_are_the_parameters_that_are_not_factored_in_their_order():
    spread, alone = Spread("n", "", "n", 0), Alone("c", {"w": "c.w", "b": "c.b"}, (0,), (0,))
    forms = Forms(PARAMETERS, (A,), (), (spread,), (alone,))
    assert forms.layers == (A,)
    assert forms.dense == ("n", "c.w", "c.b")
    assert (forms.n_dense, forms.row_size) == (3 + 10 + 2, 15 + 9)
    everything = Forms(PARAMETERS, (), (A, C), (), (), ("n",))
    assert everything.layers == (A, C)
    assert everything.dense == PARAMETERS.names
    assert everything.n_dense == everything.row_size == PARAMETERS.size


def test_a_factored_layer_whose_bias_is_not_chosen_leaves_it_out():
    parameters = Parameters(("a.w", "n"), ((5, 4), (3,)))
    forms = Forms(parameters, (replace(A, parameters={"weight": "a.w"}),), (), (), (), ("n",))
    assert (forms.dense, forms.n_dense, forms.row_size) == (("n",), 3, 12)


def test_a_parameter_of_several_factored_layers_is_in_no_column():
    shared = Parameters(("e.w", "n"), ((6, 4), (3,)))
    table = Layer("e", "e", "embedding", {"weight": "e.w"}, (3,), (3, 4), 24, indices=True)
    decoder = Layer("d", "d", "linear", {"weight": "e.w"}, (1, 4), (1, 6), 24)
    forms = Forms(shared, (table, decoder), mapped=("n",))
    assert (forms.dense, forms.row_size) == (("n",), 3 + 15 + 10)


names = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=6)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
axes = st.tuples(st.integers(-1, 2), st.integers(-1, 2))
owned = st.dictionaries(st.sampled_from(["weight", "bias"]), names, min_size=1)
said = st.fixed_dictionaries({"stride": st.lists(st.integers(1, 3)), "mode": names, "one": st.booleans(),
                              "padding_idx": st.none() | st.integers(0, 3)})  # fmt: skip
layers = st.builds(
    Layer, names, names, st.sampled_from(sorted(RULES)), owned, sizes, sizes, st.integers(1, 99), settings=said,
    axes=axes, lengths=st.tuples(st.integers(0, 3), st.integers(0, 3)), input_key=names | st.just(""),
    indices=st.booleans(),
)  # fmt: skip
batch_axes = st.lists(st.none() | st.integers(0, 2), max_size=3).map(tuple)
copies = st.builds(Spread, names, names, names, st.integers(-1, 3))
units = st.builds(
    Alone, names, st.dictionaries(names, names, max_size=2), batch_axes, batch_axes, st.sampled_from(["vmap", "loop"])
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(names, sizes), min_size=1, max_size=3, unique_by=lambda pair: pair[0]),
    st.lists(layers, max_size=2), st.lists(layers, max_size=2), st.lists(copies, max_size=2),
    st.lists(units, max_size=2), st.lists(names, max_size=2), st.sampled_from(["vmap", "loop"]),
)  # fmt: skip
def test_forms_survive_json(parameters, factored, expanded, spread, alone, mapped, engine):
    named = Parameters(tuple(name for name, _ in parameters), tuple(shape for _, shape in parameters))
    forms = Forms(named, *(tuple(each) for each in (factored, expanded, spread, alone, mapped)), engine)
    assert Forms.from_json(json.loads(json.dumps(forms.to_json()))) == forms


@pytest.mark.parametrize("spoil", ["missing", "unknown", "of_an_older_version"])
def test_forms_of_another_version_say_what_to_do(spoil):
    content = Forms(PARAMETERS, (A,), (C,)).to_json()
    if spoil == "missing":
        del content["spread"]
    elif spoil == "unknown":
        content["factored"][0]["colour"] = "red"
    else:
        content["factored"] = [{"key": "a", "module": "a", "weight": "a.w", "bias": "a.b", "positions": 1}]
    with pytest.raises(DamagedStore, match=r"the plan of grads: expected .*forms .*start over with infl-cache grads"):
        Forms.from_json(content)


def covered_by(forms):
    """Every parameter as often as a part of the plan makes it."""
    by_layers = {name: "layer" for layer in forms.layers for name in layer.names}
    by_copies = [each.name for each in forms.spread]
    by_modules = [name for each in forms.alone for name in each.parameters.values()]
    return [*by_layers, *by_copies, *by_modules, *forms.mapped]


@pytest.mark.parametrize("name", TASKS)
def test_decided_forms_cover_every_parameter_once_and_still_work_after_json(name):
    task = TASKS[name]()
    forms, _ = decided(task)
    assert sorted(covered_by(forms)) == sorted(forms.parameters.names)
    read = Forms.from_json(json.loads(json.dumps(forms.to_json())))
    assert captured_rows(task, read).equal(captured_rows(task, forms))
