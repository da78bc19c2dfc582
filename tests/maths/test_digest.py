"""Digests: equal content, equal digest; any other content, another digest."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from infl_cache.maths.digest import code_digest, digest_of, sample_digest, weights_digest

SAMPLES = [
    torch.arange(6.0).reshape(2, 3),
    torch.tensor(3),
    torch.tensor(True),
    torch.empty(0, 4),
    torch.ones(3, dtype=torch.bfloat16),
    torch.tensor([1 + 2j]),
    np.arange(4, dtype=np.int16),
    np.float32(1.5),
    np.array(["text", "longer text"]),
    np.array(["2020-01-01"], dtype="datetime64[D]"),
    (torch.zeros(2), 1, "label", None, 2.5, b"raw", [True, {"key": (1, 2)}]),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: str(getattr(s, "dtype", type(s).__name__)))
def test_equal_samples_have_equal_digests(sample):
    assert sample_digest(sample) == sample_digest(copy.deepcopy(sample))
    assert 0 <= sample_digest(sample) < 2**64


DIFFERENT = {
    "a value": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])),
    "the last bit": (torch.tensor(1.0), torch.tensor(1.0) + torch.finfo(torch.float32).eps),
    "the type of a tensor": (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float32)),
    "the shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "an empty shape": (torch.zeros(0, 3), torch.zeros(0, 2)),
    "tensor or array": (torch.zeros(2), np.zeros(2, np.float32)),
    "the order": ((1, 2), (2, 1)),
    "where a list ends": (([1], [2, 3]), ([1, 2], [3])),
    "where a number ends": ([1, 23], [12, 3]),
    "where a text ends": (("ab", "c"), ("a", "bc")),
    "depth": ([1, 2], [[1, 2]]),
    "one and one point nought": (1, 1.0),
    "one and true": (1, True),
    "one and its text": (1, "1"),
    "text and bytes": ("a", b"a"),
    "none and its text": (None, "None"),
    "a key": ({"a": 1}, {"b": 1}),
    "an entry": ({"a": 1}, {"a": 2}),
    "the label": ((torch.zeros(2), 0), (torch.zeros(2), 1)),
    "the middle of a long row": (torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1.0)),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_samples_that_differ_in_this_have_different_digests(what):
    one, other = DIFFERENT[what]
    assert sample_digest(one) != sample_digest(other)


leaf = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3) | st.binary(max_size=3)
nested = st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)


@settings(max_examples=150, deadline=None)
@given(nested, nested)
def test_nested_samples_share_a_digest_only_if_they_are_the_same(one, other):
    assert (sample_digest(one) == sample_digest(other)) == (repr(one) == repr(other))


def test_layout_in_memory_does_not_matter():
    x = torch.arange(12.0).reshape(3, 4)
    assert sample_digest(x.T) == sample_digest(x.T.contiguous())
    assert sample_digest(torch.ones(1).expand(5)) == sample_digest(torch.ones(5))
    assert sample_digest(x.numpy().T) == sample_digest(np.ascontiguousarray(x.numpy().T))


def test_the_order_in_which_a_set_was_filled_does_not_matter():
    one, other = {0, 8}, {8, 0}
    assert list(one) != list(other)
    assert sample_digest(one) == sample_digest(other)


@dataclass
class Record:
    values: torch.Tensor
    label: int


@dataclass(slots=True)
class SlotRecord:
    values: torch.Tensor
    label: int


class PlainSlots:
    __slots__ = ("label",)

    def __init__(self, label):
        self.label = label


@pytest.mark.parametrize(
    ("same", "equal", "different"),
    [
        (Record(torch.zeros(3), 1), Record(torch.zeros(3), 1), Record(torch.ones(3), 1)),
        (
            SlotRecord(torch.zeros(5000), 1),
            SlotRecord(torch.zeros(5000), 1),
            SlotRecord(torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1.0), 1),
        ),
        (PlainSlots(1), PlainSlots(1), PlainSlots(2)),
    ],
    ids=["attributes", "dataclass with slots", "class with slots"],
)
def test_objects_go_by_what_they_hold_and_not_by_where_they_live(same, equal, different):
    assert sample_digest(same) == sample_digest(equal)
    assert sample_digest(same) != sample_digest(different)


def test_pictures_go_by_their_pixels():
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    changed = pixels.copy()
    changed[3, 3] = 200
    one, equal, other = (image.fromarray(each) for each in (pixels, pixels.copy(), changed))
    assert sample_digest(one) == sample_digest(equal)
    assert sample_digest(one) != sample_digest(other)


def test_a_digest_over_values_sees_each_and_their_order():
    assert digest_of([1, "a"]) == digest_of([1, "a"])
    assert len({digest_of(values) for values in ([1, "a"], ["a", 1], [1], [1, "b"], [[1, "a"]])}) == 5


def small_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


def test_equal_weights_have_equal_digests_in_any_mode():
    one, other = small_model(), small_model().eval()
    other.requires_grad_(False)
    assert weights_digest(one) == weights_digest(other)


@torch.no_grad()
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.running_var", "1.num_batches_tracked"])
def test_every_parameter_and_buffer_counts(name):
    model = small_model()
    before = weights_digest(model)
    model.state_dict()[name].view(-1)[-1] += 1
    assert weights_digest(model) != before


def test_the_type_of_the_weights_counts():
    assert weights_digest(small_model()) != weights_digest(small_model().double())


def test_a_buffer_that_is_not_saved_counts():
    model = small_model()
    model.register_buffer("table", torch.zeros(2), persistent=False)
    before = weights_digest(model)
    model.table[0] = 1.0
    assert weights_digest(model) != before


def with_default(gamma):
    def loss(outputs, targets, gamma=gamma):
        return gamma * (outputs - targets).square().sum(1)

    return loss


def with_keyword_default(gamma):
    def loss(outputs, targets, *, gamma=gamma):
        return gamma * (outputs - targets).square().sum(1)

    return loss


def closed_over(gamma):
    def loss(outputs, targets):
        return gamma * (outputs - targets).square().sum(1)

    return loss


def closed_over_function(base):
    def loss(outputs, targets):
        return base(outputs, targets, reduction="none").sum(1)

    return loss


class Focal:
    def __init__(self, gamma):
        self.gamma = gamma

    def __call__(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none") ** self.gamma

    def method(self, outputs, targets):
        return self(outputs, targets)


def weighted(*weights):
    return nn.CrossEntropyLoss(weight=torch.tensor(weights), reduction="none")


def smoothed(amount):
    return nn.CrossEntropyLoss(reduction="none", label_smoothing=amount)


def ignoring(index):
    return nn.CrossEntropyLoss(reduction="none", ignore_index=index)


def partial(**changes):
    return functools.partial(F.cross_entropy, reduction="none", **changes)


FUNCTIONS = {
    "default": (with_default, 1.0, 2.0),
    "keyword default": (with_keyword_default, 1.0, 2.0),
    "closed-over number": (closed_over, 1.0, 2.0),
    "closed-over tensor": (closed_over, torch.ones(2), torch.zeros(2)),
    "closed-over function": (closed_over_function, F.mse_loss, F.l1_loss),
    "argument of a partial": (lambda amount: partial(label_smoothing=amount), 0.0, 0.1),
    "buffer of a module": (lambda weight: weighted(1.0, weight), 1.0, 2.0),
    "label smoothing of a module": (smoothed, 0.0, 0.1),
    "ignored index of a module": (ignoring, -100, 0),
    "attribute of an object": (Focal, 1.0, 2.0),
    "object of a method": (lambda gamma: Focal(gamma).method, 1.0, 2.0),
}


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_function_that_differs_in_this_has_another_digest(what):
    make, one, other = FUNCTIONS[what]
    assert code_digest(make(one)) == code_digest(make(copy.deepcopy(one)))
    assert code_digest(make(one)) != code_digest(make(other))


class Trainer:
    """As trainers are: it knows its callbacks, which know it, and its loss is one of its methods."""

    def __init__(self, gamma):
        self.gamma, self.callbacks = gamma, [self]

    def loss(self, outputs, targets):
        return self.gamma * F.cross_entropy(outputs, targets, reduction="none")


def test_objects_that_know_themselves_have_digests():
    assert code_digest(Trainer(1.0).loss) == code_digest(Trainer(1.0).loss)
    assert code_digest(Trainer(1.0).loss) != code_digest(Trainer(2.0).loss)
    assert sample_digest(Trainer(1.0)) != sample_digest(Trainer(2.0))


class WithLoss(nn.Module):
    """A model that brings its own loss."""

    def __init__(self, value):
        super().__init__()
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight.fill_(value)
            self.head.bias.fill_(0.0)

    def loss(self, outputs, targets):
        return (self.head(outputs) - targets).square().sum(1)


def test_the_loss_of_a_module_goes_by_its_weights_but_not_by_its_mode():
    assert code_digest(WithLoss(1.0).loss) == code_digest(WithLoss(1.0).loss)
    assert code_digest(WithLoss(1.0).loss) != code_digest(WithLoss(2.0).loss)
    assert code_digest(WithLoss(1.0).loss) == code_digest(WithLoss(1.0).eval().requires_grad_(False).loss)


def test_functions_that_call_each_other_have_digests():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)

    assert code_digest(even) == code_digest(even) != code_digest(odd)


def test_a_function_goes_by_its_text():
    def first(outputs, targets):
        return outputs - targets

    def second(outputs, targets):
        return targets - outputs

    assert code_digest(first) != code_digest(second)
    assert code_digest(None) == "default"
    assert code_digest(len) == code_digest(len) != code_digest(sum)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_go_by_their_numbers_and_their_kind():
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    made_of_two = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.5, 0.5], (2, 2))
    assert sample_digest(dense.to_sparse()) == sample_digest(made_of_two)
    assert len({sample_digest(each) for each in (dense, dense.to_sparse(), (2 * dense).to_sparse())}) == 3
