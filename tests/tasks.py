"""Small tasks that many tests use: each function gives the same task for the same arguments, in the dtype asked for.

They differ in what a gradient method can get wrong: positions, padding, in-place writes, sharing, buffers, layout.
All have few parameters, so that a dense Hessian of any of them takes well under a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, default_collate

from infl_cache import Task

N_TRAIN, N_TEST = 10, 4

cross_entropy = nn.CrossEntropyLoss(reduction="none")


class Samples:
    """A map-style dataset made of ready samples."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def built(make: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model whose weights depend on nothing but the seed; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(dtype)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """The same normal numbers in every dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(count: int, classes: int = 3, seed: int = 2) -> Tensor:
    """Class labels, (count,)."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def split(*columns: Tensor, n_train: int) -> tuple[TensorDataset, TensorDataset]:
    """The first `n_train` rows to train on, the rest to test on."""
    return TensorDataset(*(c[:n_train] for c in columns)), TensorDataset(*(c[n_train:] for c in columns))


def classified(model: nn.Module, inputs: Tensor, n_train: int, classes: int = 3, /, **changes: Any) -> Task:
    """A classification task on the rows of `inputs`."""
    train, test = split(inputs, labels(len(inputs), classes), n_train=n_train)
    return Task(**{"model": model, "train": train, "test": test, "loss": cross_entropy, **changes})


def logistic(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """Multinomial logistic regression: the model is one bare `nn.Linear`, and convex."""
    model = built(lambda: nn.Linear(5, 3), dtype)
    return classified(model, normal(n_train + n_test, 5, dtype=dtype), n_train, **changes)


def badly_scaled(
    dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any
) -> Task:
    """Logistic regression whose features differ in size by a factor of a hundred."""
    sizes = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0], dtype=dtype)
    model = built(lambda: nn.Linear(5, 3), dtype)
    with torch.no_grad():
        model.weight.div_(sizes)
    return classified(model, normal(n_train + n_test, 5, dtype=dtype) * sizes, n_train, **changes)


def mlp(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """Three linear layers with smooth activations, and dropout that eval mode switches off."""
    model = built(
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 4, bias=False), nn.GELU(), nn.Linear(4, 3)
        ),
        dtype,
    )
    return classified(model, normal(n_train + n_test, 6, dtype=dtype), n_train, **changes)


def inplace(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """`ReLU(inplace=True)` writes over the outputs of the linear layers; LayerNorm has parameters without a rule."""
    model = built(
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 5), nn.ReLU(inplace=True),
            nn.Linear(5, 3),
        ),
        dtype,
    )  # fmt: skip
    return classified(model, normal(n_train + n_test, 6, dtype=dtype), n_train, **changes)


def convnet(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """A convolution, batch norm with running statistics, pooling, a linear layer."""

    def make() -> nn.Module:
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        )
        model[1].running_mean = torch.tensor([0.1, -0.2])
        model[1].running_var = torch.tensor([0.5, 1.5])
        return model

    return classified(built(make, dtype), normal(n_train + n_test, 1, 6, 6, dtype=dtype), n_train, **changes)


class Tokens(nn.Module):
    """Token ids with padding (0): embedding, two linear layers at every position, mean over the real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 5, padding_idx=0)
        self.up = nn.Linear(5, 8)
        self.down = nn.Linear(8, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = hidden + self.down(F.gelu(self.up(hidden)))
        real = (ids > 0).unsqueeze(-1).to(hidden.dtype)
        pooled: Tensor = self.head((hidden * real).sum(1) / real.sum(1))
        return pooled


def tokens(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """Linear layers applied to (B, T, d), T = 3, of which one to three positions are real."""
    count = n_train + n_test
    ids = 1 + labels(3 * count, 5, seed=3).reshape(count, 3)
    lengths = 1 + labels(count, 3, seed=4)
    ids = ids * (torch.arange(3) < lengths.unsqueeze(1))
    return classified(built(Tokens, dtype), ids, n_train, **changes)


class Attention(nn.Module):
    """One causal attention layer of two heads by torch's fused kernel, a loss at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        size, positions, _ = hidden.shape
        heads = [f(hidden).view(size, positions, 2, 2).transpose(1, 2) for f in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        predicted: Tensor = self.head(hidden + mixed.transpose(1, 2).reshape(size, positions, 4))
        return predicted


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the positions whose target is not -100: one value a sample."""
    each = F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return each.sum(1) / (targets != -100).sum(1)


def attention(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """A language-model-like task: T = 4 positions, some of them without a target."""
    count = n_train + n_test
    targets = labels(4 * count, 3, seed=5).reshape(count, 4)
    targets[::2, -1] = -100
    train, test = split(normal(count, 4, 3, dtype=dtype), targets, n_train=n_train)
    return Task(**{"model": built(Attention, dtype), "train": train, "test": test, "loss": token_loss, **changes})


class Twice(nn.Module):
    """The same layer object is called twice in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(torch.tanh(self.inner(x))))
        return out


def twice(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """A layer called twice."""
    return classified(built(Twice, dtype), normal(n_train + n_test, 5, dtype=dtype), n_train, **changes)


class Tied(nn.Module):
    """Two linear layers share one weight, and the embedding shares its weight with the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 5, bias=False)
        self.second.weight = self.first.weight
        self.decoder.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.second(torch.tanh(self.first(self.embed(ids)))).mean(1))
        return out


def tied(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """Tied weights, with three token ids a sample."""
    ids = labels(3 * (n_train + n_test), 5, seed=6).reshape(-1, 3)
    return classified(built(Tied, dtype), ids, n_train, 5, **changes)


class Reused(nn.Module):
    """The weight of a linear layer is also used by hand, which a hook on the layer cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        out: Tensor = self.head(F.linear(hidden, self.inner.weight))
        return out


def reused(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """The rule for linear layers gives a wrong gradient for `inner.weight`."""
    return classified(built(Reused, dtype), normal(n_train + n_test, 5, dtype=dtype), n_train, **changes)


class BatchSecond(nn.Module):
    """Works on (T, B, d) inside, as recurrent networks do by default."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.inner(x.transpose(0, 1)))).mean(0)
        return out


def batch_second(
    dtype: torch.dtype = torch.float64,
    n_train: int = N_TRAIN,
    n_test: int = N_TEST,
    positions: int = 4,
    **changes: Any,
) -> Task:
    """The batch is the second axis of every layer's input; with B = T the shapes alone do not tell."""
    inputs = normal(n_train + n_test, positions, 3, dtype=dtype)
    return classified(built(BatchSecond, dtype), inputs, n_train, **changes)


class DictModel(nn.Module):
    """Takes a dict, gives a dict whose leaves are floats, integers, tuples and None."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Any]:
        hidden = torch.tanh(self.inner(features["x"]) * features["weight"].unsqueeze(1))
        logits = self.head(hidden)
        return {"guess": logits.argmax(1), "logits": logits, "extra": (None, 3, hidden), "name": "model"}


def dict_forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    """Everything but the label goes in."""
    return model({"x": batch["x"], "weight": batch["weight"]})


def dict_loss(outputs: dict[str, Any], targets: Tensor) -> Tensor:
    """Uses two of the float outputs."""
    return cross_entropy(outputs["logits"], targets) + 0.1 * outputs["extra"][2].square().sum(1)


def dict_targets(batch: dict[str, Any]) -> Tensor:
    """The label."""
    label: Tensor = batch["label"]
    return label


def dicts(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """Samples are dicts with a text among the tensors, outputs are dicts."""
    count = n_train + n_test
    x, weight, label = normal(count, 4, dtype=dtype), normal(count, dtype=dtype, seed=7).abs(), labels(count)
    samples = [{"x": x[i], "weight": weight[i], "label": label[i], "id": f"sample {i}"} for i in range(count)]
    return Task(
        **{
            "model": built(DictModel, dtype), "train": Samples(samples[:n_train]), "test": Samples(samples[n_train:]),
            "loss": dict_loss, "collate": default_collate, "forward": dict_forward, "targets": dict_targets, **changes,
        }
    )  # fmt: skip


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance of each sample."""
    return 0.5 * (outputs - targets).square().sum(1)


def regression(
    dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any
) -> Task:
    """Two inputs a sample, two real targets."""

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.left(a) + self.right(b)))
            return out

    count = n_train + n_test
    columns = [normal(count, width, dtype=dtype, seed=seed) for width, seed in ((3, 8), (2, 9), (2, 10))]
    train, test = split(*columns, n_train=n_train)
    return Task(**{"model": built(TwoInputs, dtype), "train": train, "test": test, "loss": squared_error, **changes})


def multilabel_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over the labels of a sample."""
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)


def multilabel(
    dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any
) -> Task:
    """Four yes-or-no labels a sample."""
    count = n_train + n_test
    targets = (normal(count, 4, seed=11) > 0).to(dtype)
    train, test = split(normal(count, 5, dtype=dtype), targets, n_train=n_train)
    model = built(lambda: nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 4)), dtype)
    return Task(**{"model": model, "train": train, "test": test, "loss": multilabel_loss, **changes})


class Branching(nn.Module):
    """Looks at the numbers of each row before it decides what to do with it: vmap cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [torch.tanh(self.inner(row)) if row.sum().item() > 0 else self.inner(row) for row in x]
        out: Tensor = self.head(torch.stack(rows))
        return out


def branching(dtype: torch.dtype = torch.float64, n_train: int = N_TRAIN, n_test: int = N_TEST, **changes: Any) -> Task:
    """A branch that depends on the data of one sample, by `.item()`."""
    return classified(built(Branching, dtype), normal(n_train + n_test, 5, dtype=dtype), n_train, **changes)


class Around(nn.Module):
    """One layer on each entry of axis 1 of its input, with the batch first, second, or folded with the positions."""

    def __init__(self, layer: nn.Module, way: str = "first", inplace: bool = False) -> None:
        super().__init__()
        self.layer, self.way, self.inplace = layer, way, inplace

    def forward(self, x: Tensor) -> Tensor:
        found = [self.once(part) / (1 + place) for place, part in enumerate(x.unbind(1))]
        return torch.stack(found, 1)

    def once(self, x: Tensor) -> Tensor:
        given = x.transpose(0, 1) if self.way == "second" else x.flatten(0, 1) if self.way == "folded" else x
        out: Tensor = self.layer(given)
        if self.inplace:
            out = out.sigmoid_()
        return out.transpose(0, 1) if self.way == "second" else out.unflatten(0, x.shape[:2]) if (
            self.way == "folded"
        ) else out  # fmt: skip


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A smooth number of each sample in which every output counts differently; a sample of zero weights has none."""
    return (torch.tanh(outputs) * targets).flatten(1).sum(1)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Another one, which does not look at the weights."""
    return (outputs.square() * (1 + outputs.sigmoid())).flatten(1).sum(1)


def around(layer: nn.Module, inputs: Tensor, way: str = "first", inplace: bool = False, **changes: Any) -> Task:
    """A task whose model is one layer; its inputs `(n, calls, ...)`, and the second sample's loss ignores it."""
    model = Around(layer, way, inplace).eval()
    with torch.no_grad():
        shape = model(inputs).shape
    weights = normal(*shape, seed=12)
    weights[1:2] = 0
    data = TensorDataset(inputs, weights)
    return Task(**{"model": model, "train": data, "test": data, "loss": weighted, "measure": squared, **changes})


MakeTask = Callable[..., Task]

TASKS: dict[str, MakeTask] = {
    make.__name__: make
    for make in (
        logistic, badly_scaled, mlp, inplace, convnet, tokens, attention, twice, tied, reused, batch_second, dicts,
        regression, multilabel, branching,
    )
}  # fmt: skip
"""Every task by its name, for tests that must hold on all of them."""
