"""The cost model: which layers are worth storing as factors, together where they share an input or a parameter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from infl_cache import BadInput
from infl_cache.maths.capture import Layer
from infl_cache.maths.capture.cost import Cost, asked_forms, choose_factored, cost_of, scored, unfactorable
from tests.driving import captured_rows, decided
from tests.tasks import Samples, built, classified, inplace, mlp, normal, tied, tokens
from tests.twins import gradient_rows, relative_error


def linear(module, n_in, n_out, positions=1, names=None, shares=""):
    own = names or {"weight": f"{module}.weight", "bias": f"{module}.bias"}
    size = n_in * n_out * ("weight" in own) + n_out * ("bias" in own)
    return Layer(module, module, "linear", own, (positions, n_in), (positions, n_out), size, input_key=shares)


def chosen(layers, asked=None, unable=()):
    found = choose_factored(layers, {layer.module: layer.module not in unable for layer in layers}, asked or {})
    return {layer.module: layer.input_key for layer in found}


# --- one layer ---


def test_the_cost_of_a_layer_is_what_it_stores_and_multiplies():
    layer = linear("a", 6, 5, positions=2)
    assert cost_of(layer, "dense") == Cost(35, 70)
    assert cost_of(layer, "factored") == Cost(22, 70)
    assert cost_of(layer, "factored", with_input=False) == Cost(10, 70)
    image = Layer("c", "c", "convolution", {"weight": "w"}, (1, 3, 8, 8), (1, 4, 8, 8), 108)
    assert cost_of(image, "dense") == Cost(108, 64 * 108)
    assert cost_of(image, "factored") == Cost(3 * 64 + 4 * 64, 64 * 108)
    assert Cost(300, 0).seconds() == pytest.approx(2 * Cost(300, 0).seconds(itemsize=2))


def test_what_is_smaller_is_stored():
    assert chosen([linear("wide", 784, 512)]) == {"wide": ""}
    assert chosen([linear("few", 3, 2, positions=4)]) == {}
    assert chosen([linear("even", 8, 8, positions=2), linear("long", 8, 8, positions=40)]) == {"even": ""}


def test_an_embedding_is_stored_by_its_indices_and_a_small_convolution_as_rows():
    table = Layer("e", "e", "embedding", {"weight": "w"}, (16,), (16, 32), 5000 * 32, indices=True)
    first = Layer("c", "c", "convolution", {"weight": "c"}, (1, 3, 32, 32), (1, 16, 32, 32), 432)
    last = Layer("d", "d", "convolution", {"weight": "d"}, (1, 512, 4, 4), (1, 512, 4, 4), 512 * 512 * 9)
    assert chosen([table, first, last]) == {"e": "", "d": ""}


def test_how_scores_of_many_test_samples_are_made_is_told():
    assert scored(linear("one", 6, 5)) == "contracted"
    assert scored(linear("many", 6, 5, positions=3)) == "rebuilt"
    assert scored(Layer("c", "c", "convolution", {"weight": "w"}, (1, 1, 2, 2), (1, 1, 2, 2), 4)) == "rebuilt"


def test_what_cannot_be_stored_is_not():
    assert chosen([linear("a", 50, 50)], unable=["a"]) == {}
    assert chosen([linear("a", 50, 50)], {"a": "factored"}, unable=["a"]) == {}


# --- layers with one input ---


def test_a_shared_input_is_stored_once_and_pays_for_all():
    alone = linear("q", 12, 6, positions=4)
    assert cost_of(alone, "factored").numbers == 72 < cost_of(alone, "dense").numbers == 78
    # 4 x (12 + 4) = 64 numbers for 12 x 4 + 4 = 52: each alone does not pay, with a common input two of them do.
    q, k, v = (linear(name, 12, 4, positions=4, shares="" if name == "q" else "q") for name in "qkv")
    assert chosen([q]) == chosen([replace(k, input_key="")]) == {}
    assert chosen([q, k]) == {"q": "", "k": "q"}
    assert chosen([q, k, v]) == {"q": "", "k": "q", "v": "q"}


def test_the_input_goes_to_the_first_of_those_that_are_stored():
    q, k, v = (linear(name, 12, 4, positions=4, shares="" if name == "q" else "q") for name in "qkv")
    assert chosen([q, k, v], {"q": "dense"}) == {"k": "", "v": "k"}
    assert chosen([q, k, v], unable=["q"]) == {"k": "", "v": "k"}
    assert chosen([k, v]) == {"k": "", "v": "k"}
    assert chosen([q, k, v], {"q": "dense", "k": "dense"}) == {}
    assert chosen([q, k, v], {"q": "dense", "k": "dense", "v": "factored"}) == {"v": ""}


def test_a_layer_that_gains_nothing_even_with_a_stored_input_stays_plain():
    q, k = linear("q", 60, 60, positions=2), linear("k", 60, 1, positions=62, shares="q")
    assert chosen([q, k]) == {"q": ""}
    assert chosen([q, k], {"k": "factored"}) == {"q": "", "k": "q"}


def test_query_key_and_value_of_a_model_are_stored_with_one_input():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(12, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            weights = torch.softmax(self.query(x) @ self.key(x).mT, -1)
            return self.head((weights @ self.value(x)).mean(1))

    task = classified(built(Heads, torch.float64), normal(12, 4, 12), 10)
    forms, notes = decided(task)
    assert {layer.module: layer.input_key for layer in forms.factored} == {
        "query": "", "key": "query", "value": "query", "head": "",
    }  # fmt: skip
    assert forms.row_size == 4 * 12 + 3 * 4 * 4 + (4 + 3)
    assert notes == []
    for size in (1, 3, 10):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(10))) < 1e-12


# --- layers with one parameter ---


def chain(*positions):
    """Four layers, each tied to the next by a weight or a bias: a-c by a weight, c-d by a bias, d-b by a weight."""
    a, b, c, d = positions
    return [
        linear("a", 9, 9, a, {"weight": "w1", "bias": "b1"}), linear("c", 9, 9, c, {"weight": "w1", "bias": "b3"}),
        linear("b", 9, 9, b, {"weight": "w2", "bias": "b2"}), linear("d", 9, 9, d, {"weight": "w2", "bias": "b3"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("positions", "factored"), [((1, 1, 1, 1), True), ((1, 1, 1, 7), False), ((7, 1, 1, 1), False)]
)
def test_tied_layers_are_all_factors_or_all_plain_however_they_hang_together(positions, factored):
    assert set(chosen(chain(*positions))) == (set("abcd") if factored else set())


def test_one_tied_layer_that_cannot_be_stored_keeps_the_others_from_it():
    for each in "abcd":
        assert chosen(chain(1, 1, 1, 1), unable=[each]) == {}
        assert chosen(chain(1, 1, 1, 1), {each: "dense"}) == {}
        assert set(chosen(chain(7, 7, 7, 7), {each: "factored"})) == set("abcd")


def test_a_tied_plain_row_is_paid_for_once():
    # Two layers of 9 x 9: 36 numbers as factors, one plain row of 81.
    a, b = (linear(name, 9, 9, names={"weight": "w"}) for name in "ab")
    assert set(chosen([a, b])) == {"a", "b"}
    many = [linear(name, 9, 9, names={"weight": "w"}) for name in "abcde"]
    assert chosen(many) == {}


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(9, 9) for _ in range(4))
        self.head = nn.Linear(9, 3)
        self.c.weight, self.d.weight, self.d.bias = self.a.weight, self.b.weight, self.c.bias

    def forward(self, x):
        x = torch.tanh(self.d(x)).mean(1)
        for layer in (self.a, self.c, self.b):
            x = torch.tanh(layer(x))
        return self.head(x)


@pytest.mark.parametrize(("positions", "factored"), [(1, ["a", "c", "b", "d", "head"]), (7, ["head"])])
def test_a_chain_of_tied_layers_in_a_model_is_right_and_needs_no_fallback(positions, factored):
    task = classified(built(Chain, torch.float64), normal(12, positions, 9), 10)
    forms, notes = decided(task)
    assert ([layer.module for layer in forms.factored], notes, forms.mapped) == (factored, [], ())
    assert relative_error(captured_rows(task, forms, 3), gradient_rows(task, range(10))) < 1e-12


# --- for any layers ---


@st.composite
def any_layers(draw):
    """Layers of which some share inputs, some parameters."""
    layers = []
    for place in range(draw(st.integers(1, 6))):
        names = {"weight": f"w{draw(st.integers(0, 4))}", "bias": f"b{draw(st.integers(0, 4))}"}
        shares = draw(st.sampled_from(["", *(each.key for each in layers if not each.input_key)]))
        keeper = next((each for each in layers if each.key == shares), None)
        positions = keeper.input_shape[0] if keeper else draw(st.integers(1, 6))
        layers.append(linear(f"l{place}", 6, draw(st.integers(1, 12)), positions, names, shares))
    return layers


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_layers(), st.data())
def test_whatever_the_layers_the_choice_can_be_stored_and_read(layers, data):
    able = {layer.module: data.draw(st.booleans()) for layer in layers}
    asked = data.draw(st.dictionaries(st.sampled_from([each.module for each in layers]),
                                      st.sampled_from(["dense", "factored"])))  # fmt: skip
    found = choose_factored(layers, able, asked)
    stored = {layer.key: layer for layer in found}
    plain = {name for layer in layers if layer.key not in stored for name in layer.names}
    assert not plain.intersection(name for layer in found for name in layer.names)
    assert all(able[layer.module] and asked.get(layer.module) != "dense" for layer in found)
    for layer in found:
        assert layer.input_from in stored
        assert not stored[layer.input_from].input_key
        before = next(each for each in layers if each.key == layer.key)
        keeper = next(each for each in layers if each.key == layer.input_from)
        assert before.input_from == keeper.input_from


# --- what the user asks for ---


LAYERS = [
    linear("conv1", 3, 3), linear("layer4.0.conv", 3, 3), linear("layer4.1.conv", 3, 3), linear("fc", 3, 3),
    Layer("layer4.0.bn", "layer4.0.bn", "channel_norm", {"weight": "n"}, (1, 3), (1, 3), 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("fc=dense", {"fc": "dense"}),
        (" conv1=dense, layer4.*=factored ,",
         {"conv1": "dense", "layer4.0.conv": "factored", "layer4.1.conv": "factored"}),
        ("layer4.0.*=dense", {"layer4.0.conv": "dense", "layer4.0.bn": "dense"}),
        ("*=dense,fc=factored", {**dict.fromkeys([each.module for each in LAYERS], "dense"), "fc": "factored"}),
        ("fc=factored,*c*=dense", {"fc": "dense", "conv1": "dense", "layer4.0.conv": "dense",
                                   "layer4.1.conv": "dense"}),
    ],
)  # fmt: skip
def test_forms_are_asked_for_by_pattern_and_the_last_counts(text, expected):
    assert asked_forms(text, LAYERS) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fc", r"layer-forms: expected PATTERN=dense or PATTERN=factored, found 'fc'"),
        ("fc=sparse", r"expected PATTERN=dense or PATTERN=factored, found 'fc=sparse'"),
        ("fc=Dense", r"expected PATTERN=dense or PATTERN=factored, found 'fc=Dense'"),
        ("conv9=dense", r"'conv9' matches no layer with a rule; they are conv1, layer4.0.conv, layer4.1.conv, fc, "),
        ("layer4.0.bn=factored", r"layer 'layer4.0.bn' cannot be factored, its gradient is no product; use dense"),
        ("fc=dense,x" + "y" * 99 + "=dense", r"'xy{59}' matches no layer"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(text, message):
    with pytest.raises(BadInput, match=message):
        asked_forms(text, LAYERS)


def test_a_model_without_layers_says_so():
    with pytest.raises(BadInput, match=r"'fc' matches no layer with a rule; they are none"):
        asked_forms("fc=dense", [])


def test_what_is_asked_for_is_done_and_right():
    for make, asked, factored in (
        (mlp, "0=dense,3=dense", ["5"]),
        (tokens, "down=factored,embed=factored", ["embed", "up", "down", "head"]),
        (tied, "embed=factored", ["embed", "decoder"]),
        (tied, "*=dense", []),
        (inplace, "*=factored", ["0", "3", "5"]),
    ):
        task = make()
        forms, notes = decided(task, layer_forms=asked)
        assert [layer.module for layer in forms.factored if layer.module in factored] == factored
        assert not notes
        assert relative_error(captured_rows(task, forms, 3), gradient_rows(task, range(10))) < 1e-12
    assert forms.layers


def test_a_pattern_is_refused_before_anything_is_decided():
    with pytest.raises(BadInput, match=r"'nothing' matches no layer with a rule; they are 0, 3, 5"):
        decided(mlp(), layer_forms="nothing=dense")


class Summed(nn.Module):
    """A layer for each vector of a sequence, and one for their sum, to which padding adds nothing."""

    def __init__(self):
        super().__init__()
        self.each, self.head = nn.Linear(5, 4, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.each(x).sum(1))


def ragged(asked, make=Summed):
    samples = Samples([(normal(2 + i % 2, 5, seed=i), i % 3) for i in range(10)])

    def collate(chosen):
        return nn.utils.rnn.pad_sequence([x for x, _ in chosen], True), torch.tensor([y for _, y in chosen])

    task = classified(built(make, torch.float64), normal(2, 1), 1, 3, train=samples, collate=collate)
    return decided(task, layer_forms=asked)


def test_a_layer_that_cannot_be_factored_is_refused_with_the_reason():
    with pytest.raises(BadInput, match=r"^layer-forms: layer '5' .*, its weight is not among the parameters; use"):
        decided(mlp(parameters=["*.bias"]), layer_forms="5=factored")
    with pytest.raises(BadInput, match=r"^layer-forms: layer 'each' .*, it sees samples of different lengths \(pad to"):
        ragged("each=factored")
    shared = linear("up", 3, 4)
    assert unfactorable([linear("down", 3, 4), shared], elsewhere={"up.weight"}) == {
        "up": "a parameter of it is also used where there is no rule"
    }


def test_a_layer_is_no_factor_where_a_layer_that_shares_its_parameter_cannot_be_one():
    class Shared(Summed):
        def __init__(self):
            super().__init__()
            self.again, self.last = nn.Linear(4, 3), nn.Linear(4, 3)
            self.again.weight = self.head.weight
            self.last.bias = self.again.bias

        def forward(self, x):
            hidden = self.each(x)
            return self.head(hidden.sum(1)) + torch.tanh(self.again(hidden)).sum(1) + self.last(hidden.mean(1))

    for layer, shared, other in (("head", "head.weight", "again"), ("last", "again.bias", "again")):
        reason = rf"^layer-forms: layer '{layer}' .*, '{shared}' is shared with layer '{other}', which cannot be .*: it"
        with pytest.raises(BadInput, match=reason):
            ragged(f"{layer}=factored", Shared)
    assert ragged(None, Shared)[0].factored == ()


def test_of_the_layers_that_a_pattern_matches_those_are_factored_that_can_be():
    assert [layer.module for layer in ragged("*=factored")[0].factored] == ["head"]
