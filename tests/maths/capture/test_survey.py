"""The survey: what each parameter's gradient can be made from, seen in a few forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from infl_cache.maths.capture.forms import Alone, Layer, Spread
from infl_cache.maths.capture.survey import Found, survey
from infl_cache.maths.params import select
from infl_cache.maths.task import evaluating
from tests.driving import CPU, captured_rows, decided, one_batch
from tests.tasks import (
    TASKS,
    Samples,
    attention,
    batch_second,
    built,
    classified,
    convnet,
    labels,
    logistic,
    mlp,
    normal,
    tied,
    tokens,
    twice,
)
from tests.twins import gradient_rows, relative_error


def surveyed(task, not_copied=()):
    parameters = select(task.model, task.parameters)
    with evaluating(task.model, CPU):
        return survey(task, parameters, one_batch(task), not_copied)


def seen(found):
    return {layer.module: (layer.rule, layer.input_shape, layer.grad_shape, layer.axes) for layer in found.layers}


def right(task, forms):
    rows = gradient_rows(task, range(len(task.train)), forms.parameters.names)
    return all(relative_error(captured_rows(task, forms, size), rows) < 1e-12 for size in (1, 2, 3, None))


# --- layers that a rule covers ---


def test_layers_are_seen_with_the_shapes_of_one_sample():
    assert seen(surveyed(tokens())) == {
        "embed": ("embedding", (3,), (3, 5), (0, 0)), "up": ("linear", (3, 5), (3, 8), (0, 0)),
        "down": ("linear", (3, 8), (3, 5), (0, 0)), "head": ("linear", (1, 5), (1, 3), (0, 0)),
    }  # fmt: skip
    assert seen(surveyed(convnet())) == {
        "0": ("convolution", (1, 1, 6, 6), (1, 2, 4, 4), (0, 0)),
        "1": ("channel_norm", (1, 2, 4, 4), (1, 2, 4, 4), (0, 0)),
        "5": ("linear", (1, 8), (1, 3), (0, 0)),
    }  # fmt: skip


def test_a_layer_called_twice_has_the_positions_of_both_calls():
    assert seen(surveyed(twice()))["inner"][1:3] == ((2, 5), (2, 5))


def test_tied_layers_name_the_same_parameter():
    found = surveyed(tied())
    assert {layer.module: layer.parameters for layer in found.layers} == {
        "embed": {"weight": "embed.weight"}, "decoder": {"weight": "embed.weight"},
        "first": {"weight": "first.weight", "bias": "first.bias"},
        "second": {"weight": "first.weight", "bias": "second.bias"},
    }  # fmt: skip
    assert (found.spread, found.alone, found.mapped) == ((), (), ())


def test_layers_with_the_very_same_input_name_the_first_of_them():
    found = surveyed(attention())
    assert {layer.module: layer.input_key for layer in found.layers} == {
        "embed": "", "query": "", "key": "query", "value": "query", "head": "",
    }  # fmt: skip


def test_equal_numbers_in_another_place_are_no_shared_input():
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.left(x) + self.right(x.clone())))

    assert {layer.input_key for layer in surveyed(logistic(model=built(Copies, torch.float64))).layers} == {""}


@pytest.mark.parametrize("positions", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_second_batch_axis_is_found_whatever_the_lengths(positions, count):
    task = batch_second(n_train=count, positions=positions)
    found = surveyed(task)
    assert seen(found)["inner"] == ("linear", (positions, 3), (positions, 6), (1, 1))
    forms, notes = decided(task)
    assert (forms.mapped, notes) == ((), [])
    assert right(task, forms)


class Folded(nn.Module):
    """Works on (B T, d) inside, samples one after the other or times one after the other."""

    def __init__(self, time_first=False):
        super().__init__()
        self.inner, self.head, self.time_first = nn.Linear(3, 4), nn.Linear(4, 3), time_first

    def forward(self, x):
        x = x.transpose(0, 1) if self.time_first else x
        y = torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.head(y.mean(0 if self.time_first else 1))


def test_samples_one_after_the_other_are_taken_apart():
    task = classified(built(Folded, torch.float64), normal(12, 4, 3), 10)
    layer = surveyed(task).layers[0]
    assert (layer.module, layer.input_shape, layer.axes, layer.lengths) == ("inner", (4, 3), (0, 0), (4, 4))
    assert right(task, decided(task)[0])


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_times_one_after_the_other_are_noticed_however_few_samples_are_held_at_once(at_once):
    task = classified(built(lambda: Folded(True), torch.float64), normal(12, 4, 3), 10)
    forms, notes = decided(task, at_once=at_once)
    assert "inner" not in {layer.module for layer in forms.layers}
    assert notes == ["layer 'inner' disagrees with plain autograd by its rule; vmap takes it"]
    assert right(task, forms)


def test_other_positions_in_the_second_call_are_added_up():
    class Pooling(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.inner(torch.tanh(self.inner(x)).mean(1)))

    task = classified(built(Pooling, torch.float64), normal(12, 4, 3), 10)
    assert seen(surveyed(task))["inner"][1:3] == ((5, 3), (5, 3))
    forms, notes = decided(task)
    assert not notes
    assert right(task, forms)


def test_a_call_that_the_rule_does_not_cover_leaves_the_layer_to_others():
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(6, 4, mode="sum"), nn.Linear(4, 3)

        def forward(self, ids):
            return self.head(self.bag(ids, per_sample_weights=(1.0 + ids).to(self.head.weight.dtype)))

    task = classified(built(Bags, torch.float64), labels(36, 6).reshape(12, 3), 10)
    found = surveyed(task)
    assert list(seen(found)) == ["head"]
    assert [(unit.module, unit.inputs) for unit in found.alone] == [("bag", (0, 0))]
    assert right(task, decided(task)[0])


def test_only_chosen_parameters_are_looked_at():
    found = surveyed(mlp(parameters=["3.weight", "5.bias"]))
    assert {layer.module: layer.parameters for layer in found.layers} == {
        "3": {"weight": "3.weight"}, "5": {"bias": "5.bias"},
    }  # fmt: skip
    assert [layer.gradient_size for layer in found.layers] == [20, 3]


# --- a layer that is called once for all samples ---


class Places(nn.Module):
    """Adds an embedding of the places, the same for all samples, in different ways."""

    def __init__(self, way):
        super().__init__()
        self.embed, self.place, self.head, self.way = nn.Embedding(6, 5), nn.Embedding(4, 5), nn.Linear(5, 3), way

    def forward(self, ids):
        places = torch.arange(ids.shape[1])
        if self.way == "second":
            return self.head(torch.tanh(self.embed(ids.T) + self.place(places).unsqueeze(1)).mean(0))
        if self.way == "mean":
            return self.head(torch.tanh(self.embed(ids) * self.place(places).mean(0)).mean(1))
        return self.head(
            torch.tanh(self.embed(ids) + self.place(places[None] if self.way == "row" else places)).mean(1)
        )


@pytest.mark.parametrize("way", ["plain", "row", "second", "mean"])
@pytest.mark.parametrize("positions", [1, 2, 3, 4])
def test_a_layer_called_once_for_all_samples_has_a_gradient_for_each(way, positions):
    for count in (1, 2, 3, 5):
        ids = labels((count + 2) * positions, 6).reshape(-1, positions)
        task = classified(built(lambda: Places(way), torch.float64), ids, count)
        assert right(task, decided(task)[0]), count
    if positions > 1 and way in ("plain", "row"):
        assert seen(surveyed(task))["place"] == ("embedding", (positions,), (positions, 5), (-1, -1))


# --- lengths ---


class Padded(nn.Module):
    """Leaves the padding (0) out before the inner layer, or only afterwards."""

    def __init__(self, packed):
        super().__init__()
        self.embed, self.inner, self.head, self.packed = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 3), packed

    def forward(self, ids):
        x, real = self.embed(ids), ids > 0
        if self.packed:
            y = torch.zeros_like(x)
            y[real] = torch.tanh(self.inner(x[real]))
        else:
            y = torch.tanh(self.inner(x.flatten(0, 1))).unflatten(0, ids.shape) * real.unsqueeze(-1)
        return self.head(y.sum(1))


def padded(lengths, packed=True):
    ids = [1 + labels(4, 8, seed=i) for i in range(len(lengths) + 2)]
    ids = torch.stack(ids) * (torch.arange(4) < torch.tensor([*lengths, 4, 4]).unsqueeze(1))
    return classified(built(lambda: Padded(packed), torch.float64), ids, len(lengths))


@pytest.mark.parametrize("form", ["auto", "dense"])
def test_padding_taken_out_of_a_batch_is_never_shared_out_among_its_samples(form):
    # 2 + 4 positions of two samples look like 3 + 3.
    task = padded([4] * 8 + [2, 4, 4, 2, 3, 3, 2, 4])
    assert "inner" not in seen(surveyed(task))
    forms, _ = decided(task, form, count=8)
    for size in (1, 2, 4, 8):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(16))) < 1e-12


def test_samples_of_one_length_after_the_other_are_taken_apart_though_padding_could_be_taken_out():
    task = padded([4] * 6, packed=False)
    layer = next(layer for layer in surveyed(task).layers if layer.module == "inner")
    assert (layer.input_shape, layer.lengths) == ((4, 6), (4, 4))
    assert right(task, decided(task)[0])


def test_lengths_that_vary_are_told():
    sequences = [(normal(length, 6, seed=length), length % 3) for length in (3, 1, 2, 3)]

    def collate(samples):
        return nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True), torch.tensor(
            [y for _, y in samples]
        )

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.inner(x)).sum(1))

    task = classified(built(Sum, torch.float64), normal(2, 1), 1, 3, train=Samples(sequences), collate=collate)
    found = surveyed(task)
    assert found.varying == {"inner"}
    assert list(seen(found)) == ["inner", "head"]
    assert right(task, decided(task)[0])


# --- parameters of one's own ---


class Owns(nn.Module):
    """Parameters used by hand, each in another place: their shapes do not say how they meet the batch."""

    def __init__(self, second=False):
        super().__init__()
        self.number, self.row = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.rand(4))
        self.before = nn.Parameter(torch.rand(5))
        self.first, self.table = nn.Parameter(torch.rand(1, 4)), nn.Parameter(torch.rand(3, 4))
        self.inner, self.head, self.second = nn.Linear(5, 4), nn.Linear(4, 3), second

    def forward(self, x):
        x = x.transpose(0, 1) if self.second else x
        hidden = self.inner(x * self.before) * self.number * self.row + self.first
        hidden = hidden + self.table[: x.shape[0 if self.second else 1]].unsqueeze(1 if self.second else 0)
        return self.head(torch.tanh(hidden).mean(0 if self.second else 1))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("positions", [1, 2, 3])
@pytest.mark.parametrize("second", [False, True])
def test_each_sample_has_its_own_copy_of_a_parameter_whatever_the_lengths(second, positions, count):
    task = classified(built(lambda: Owns(second), torch.float64), normal(count + 2, positions, 5), count)
    found = surveyed(task)
    assert {each.name for each in found.spread} >= {"before", "number", "row", "first"}
    forms, _ = decided(task)
    assert forms.engine == "vmap"
    assert right(task, forms)


def test_a_parameter_for_each_place_takes_the_place_of_a_first_axis_of_one():
    class Start(nn.Module):
        def __init__(self):
            super().__init__()
            self.start, self.head = nn.Parameter(torch.rand(1, 1, 5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(torch.tanh(torch.cat([self.start.expand(len(x), -1, -1), x], 1)).mean(1))

    task = classified(built(Start, torch.float64), normal(12, 2, 5), 10)
    assert surveyed(task).spread == (Spread("start", "", "start", -1),)
    assert right(task, decided(task)[0])


def test_lists_and_dictionaries_of_parameters_are_copied_too():
    class Lists(nn.Module):
        def __init__(self):
            super().__init__()
            self.many = nn.ParameterList([nn.Parameter(torch.rand(5)) for _ in range(2)])
            self.named = nn.ParameterDict({"scale": nn.Parameter(torch.tensor(0.7))})
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            for each in self.many:
                x = torch.tanh(x * each)
            return self.head(x) * self.named["scale"]

    task = classified(built(Lists, torch.float64), normal(12, 5), 10)
    assert {each.name for each in surveyed(task).spread} == {"many.0", "many.1", "named.scale"}
    assert right(task, decided(task)[0])


def test_a_parameter_named_as_needing_more_than_a_copy_goes_elsewhere():
    task = classified(built(Owns, torch.float64), normal(12, 3, 5), 10)
    assert "row" in {each.name for each in surveyed(task).spread}
    found = surveyed(task, ["row"])
    assert "row" not in {each.name for each in found.spread}
    assert set(found.mapped) == {"row", "table"}


@pytest.mark.parametrize("positions", [2, 3, 5, 8])
def test_a_table_of_places_that_is_cut_to_length_is_never_cut_along_the_batch(positions):
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.places, self.rows = nn.Parameter(torch.rand(8, 5)), nn.Parameter(torch.rand(1, 8, 5))
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            length = x.shape[1]
            return self.head(torch.tanh(x + self.places[:length] + self.rows[:, :length]).mean(1))

    task = classified(built(Cut, torch.float64), normal(14, positions, 5), 12)
    found = surveyed(task)
    assert (found.spread, found.mapped) == ((Spread("rows", "", "rows", -1),), ("places",))
    forms, _ = decided(task, count=3)
    for size in (1, 3, 8, 12):
        assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(12))) < 1e-12


class Rarely(nn.Module):
    """A part that few samples need: a layer with a rule, one without, or a parameter."""

    def __init__(self, kind):
        super().__init__()
        self.inner, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.rare = {"linear": lambda: nn.Linear(6, 6), "gru": lambda: nn.GRU(6, 6, batch_first=True)}.get(
            kind, Scale
        )()

    def forward(self, x):
        hidden, need = torch.tanh(self.inner(x)), x[:, 0, 0] > 1
        if bool(need.any()):
            found = self.rare(hidden)
            hidden = torch.where(need[:, None, None], found[0] if isinstance(found, tuple) else found, hidden)
        return self.head(hidden.mean(1))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return x * self.by


@pytest.mark.parametrize("kind", ["linear", "gru", "parameter"])
def test_a_part_that_the_first_samples_do_not_use_is_right_once_one_does(kind):
    inputs = normal(42, 4, 5)
    inputs = inputs[(inputs[:, 0, 0] > 1).long().argsort(stable=True)]
    assert not bool((inputs[:30, 0, 0] > 1).any())
    assert bool((inputs[:40, 0, 0] > 1).any())
    task = classified(built(lambda: Rarely(kind), torch.float64), inputs, 40)
    for form in ("auto", "dense"):
        forms, _ = decided(task, form, count=8)
        assert not forms.spread
        for size in (1, 4, 8):
            assert relative_error(captured_rows(task, forms, size), gradient_rows(task, range(40))) < 1e-12


# --- modules without a rule, and what is left ---


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2, batch_first=True)})
        self.wrapped, self.head = weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)
        self.mix = nn.Parameter(torch.rand(4, 4))

    def forward(self, x):
        found, _ = self.block["attention"](x, 2 * x, torch.tanh(x))
        return self.head((self.wrapped(found).mean(1)) @ self.mix)


def test_the_nearest_module_that_is_called_takes_a_parameter_without_a_rule():
    task = classified(built(Nested, torch.float64), normal(12, 3, 4), 10)
    found = surveyed(task, [name for name, _ in task.model.named_parameters()])
    units = {unit.module: unit for unit in found.alone}
    assert set(units) == {"block.attention", "wrapped"}
    inner = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    assert units["block.attention"].parameters == {name: f"block.attention.{name}" for name in inner}
    assert (units["block.attention"].inputs, units["block.attention"].outputs) == ((0, 0, 0), (0, 0))
    assert set(units["wrapped"].parameters.values()) == {
        "wrapped.bias", "wrapped.parametrizations.weight.original0", "wrapped.parametrizations.weight.original1",
    }  # fmt: skip
    assert found.mapped == ("mix",)


@pytest.mark.parametrize("name", TASKS)
def test_every_parameter_is_in_a_part(name):
    task = TASKS[name]()
    found = surveyed(task)
    assert found.names | set(found.mapped) == {each for each, _ in task.model.named_parameters()}
    assert found.names.isdisjoint(found.mapped)


def layer_of(module, **parameters):
    return Layer(module, module, "linear", parameters, (1, 2), (1, 2), 4)


def test_what_leaves_takes_along_what_it_is_tied_to():
    a, b, c = (
        layer_of("a", weight="w", bias="a.bias"),
        layer_of("b", weight="w", bias="b.bias"),
        layer_of("c", weight="c"),
    )
    unit = Alone("u", {"x": "b.bias", "y": "u.y"}, (0,), (0,))
    copies = Spread("p", "", "p", 0), Spread("q", "", "q", 0)
    found = Found((a, b, c), copies, (unit,), ("r",), frozenset({"c"}))
    assert found.names == {"w", "a.bias", "b.bias", "c", "u.y", "p", "q"}
    less = found.without(["a.bias", "q"])
    assert (less.layers, less.spread, less.alone, less.varying) == ((c,), copies[:1], (), {"c"})
    assert less.mapped[0] == "r"
    assert sorted(less.mapped[1:]) == ["a.bias", "b.bias", "q", "u.y", "w"]
    assert found.without([]) == found
