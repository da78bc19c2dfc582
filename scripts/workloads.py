"""The five workloads of the benchmarks: models with synthetic data, the same on every machine, nothing downloaded.

infl-cache grads --task scripts/workloads.py:task --task-args.workload W3 --run runs/w3
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

if TYPE_CHECKING:
    from infl_cache import Task

CLASSES, FLIPPED = 10, 0.1
VOCABULARY, LENGTH, WIDTH = 1000, 64, 128
# Data are drawn in pieces of this many samples, so that sample i is the same whatever the size of the set.
PIECE = 1000

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Workload:
    """A trained model in eval mode, its data, and `loss(outputs, targets) -> (B,)`."""

    name: str
    title: str
    model: nn.Module
    train: TensorDataset
    test: TensorDataset
    loss: Loss

    @property
    def n_params(self) -> int:
        """How many parameters the model has; a shared one counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def task(self, n_train: int | None = None) -> Task:
        """The task over the first `n_train` training samples, or all."""
        # Imported here, so that other libraries can be measured in an environment of their own.
        from infl_cache import Task

        train = TensorDataset(*(tensor[:n_train] for tensor in self.train.tensors))
        return Task(model=self.model, train=train, test=self.test, loss=self.loss)


class SmallCNN(nn.Module):
    """Two 3x3 convolutions with pooling and two fully connected layers, for 3x32x32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(32 * 8 * 8, 64)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to logits (B, 10)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(self.flatten(x))))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which a shortcut leads: the identity, or a 1x1 convolution where shapes differ."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n_in, H, W) to (B, n_out, H / stride, W / stride)."""
        inner = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(inner + self.shortcut(x))
        return out


class ResNet(nn.Module):
    """A residual network for 32x32 images: stages of `blocks` basic blocks, all but the first halving the map."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        layers: list[nn.Module] = []
        before = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(BasicBlock(before, width, 2 if stage and not block else 1))
                before = width
        self.layers = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(before, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, 32, 32) to logits (B, 10)."""
        logits: Tensor = self.fc(self.flatten(self.pool(self.layers(self.relu(self.bn(self.conv(x)))))))
        return logits


class Transformer(nn.Module):
    """A causal language model of two encoder layers, whose output layer shares its weight with the embedding."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 512, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.output.weight = self.embedding.weight
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 64) to logits (B, 64, 1000) of the token that follows each."""
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.output(x)
        return logits


def mlp(n_train: int = 200_000, n_test: int = 20, n_fit: int = 2000) -> Workload:
    """W1: an MLP 784-512-256-10, fitted to `n_fit` samples."""
    with seeded():
        hidden = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(256, CLASSES))
    return classifier("W1", "MLP 784-512-256-10", model, (784,), (n_train, n_test, n_fit), epochs=4)


def small_cnn(n_train: int = 30_000, n_test: int = 20, n_fit: int = 2000) -> Workload:
    """W2: two convolutions and two linear layers on 3x32x32."""
    with seeded():
        model = SmallCNN()
    return classifier("W2", "small CNN on 3x32x32", model, (3, 32, 32), (n_train, n_test, n_fit), epochs=4)


def resnet20(n_train: int = 5000, n_test: int = 8, n_fit: int = 1000) -> Workload:
    """W3: ResNet-20 for CIFAR."""
    with seeded():
        model = ResNet((16, 32, 64), blocks=3)
    return classifier("W3", "ResNet-20 on 3x32x32", model, (3, 32, 32), (n_train, n_test, n_fit), epochs=3)


def resnet18(n_train: int = 1024, n_test: int = 8, n_fit: int = 256) -> Workload:
    """W4: ResNet-18 for CIFAR; a few steps of training only."""
    with seeded():
        model = ResNet((64, 128, 256, 512), blocks=2)
    return classifier("W4", "ResNet-18 on 3x32x32", model, (3, 32, 32), (n_train, n_test, n_fit), epochs=1)


def transformer(n_train: int = 5000, n_test: int = 8, n_fit: int = 512) -> Workload:
    """W5: a causal transformer of two layers over 64 tokens, with a tied embedding."""
    with seeded():
        model = Transformer()
    x, y = tokens(max(n_train, n_fit), seed=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    fit(model, (x[:n_fit], y[:n_fit]), token_loss, optimizer, epochs=2)
    test = TensorDataset(*tokens(n_test, seed=2))
    title = "2-layer transformer, 64 tokens"
    return Workload("W5", title, model, TensorDataset(x[:n_train], y[:n_train]), test, token_loss)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "W1": mlp,
    "W2": small_cnn,
    "W3": resnet20,
    "W4": resnet18,
    "W5": transformer,
}


def task(workload: str = "W1", n_train: int | None = None) -> Task:
    """A workload by its name, for the command line."""
    make = WORKLOADS[workload]
    return (make() if n_train is None else make(n_train=n_train)).task()


def classifier(
    name: str, title: str, model: nn.Module, shape: tuple[int, ...], sizes: tuple[int, int, int], epochs: int
) -> Workload:
    """A classifier of synthetic images, fitted; `sizes` are n_train, n_test and the samples it is fitted to."""
    n_train, n_test, n_fit = sizes
    x, y = images(max(n_train, n_fit), shape, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    loss = nn.CrossEntropyLoss(reduction="none")
    fit(model, (x[:n_fit], y[:n_fit]), loss, optimizer, epochs)
    test = TensorDataset(*images(n_test, shape, seed=2))
    return Workload(name, title, model, TensorDataset(x[:n_train], y[:n_train]), test, loss)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over a sample's tokens: (B, T, V) and (B, T) to (B,)."""
    return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


@contextmanager
def seeded() -> Iterator[None]:
    """Weights drawn inside are always the same; the global generator is put back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def fit(model: nn.Module, data: Data, loss: Loss, optimizer: torch.optim.Optimizer, epochs: int) -> None:
    """A few epochs of training, so that activations and gradients look like those of a trained model."""
    x, y = data
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs if len(x) else 0):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).mean().backward()
            optimizer.step()
    optimizer.zero_grad()
    settle_norms(model, x)
    model.eval()


def settle_norms(model: nn.Module, x: Tensor) -> None:
    """Make the running statistics of every BatchNorm those of `x` at the weights as they are now."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms or not len(x):
        return
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over all batches
    with torch.no_grad():
        for batch in x.split(64):
            model(batch)
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before


def pieces(count: int, seed: int) -> Iterator[tuple[slice, torch.Generator]]:
    """The rows of each piece of a data set of `count` samples, and the generator that draws them."""
    for piece, start in enumerate(range(0, count, PIECE)):
        yield slice(start, min(start + PIECE, count)), torch.Generator().manual_seed(10**6 * seed + piece)


def images(count: int, shape: tuple[int, ...], seed: int) -> Data:
    """Class centres plus noise, (count, *shape), and labels of which a tenth is drawn anew."""
    size = math.prod(shape)
    centres = 0.5 * torch.randn(CLASSES, size, generator=torch.Generator().manual_seed(0))
    x, y = torch.empty(count, size), torch.empty(count, dtype=torch.long)
    for rows, generator in pieces(count, seed):
        n = rows.stop - rows.start
        labels = torch.randint(CLASSES, (PIECE,), generator=generator)
        others = torch.randint(CLASSES, (PIECE,), generator=generator)
        flipped = torch.rand(PIECE, generator=generator) < FLIPPED
        y[rows] = torch.where(flipped, others, labels)[:n]
        x[rows] = torch.randn(PIECE, size, generator=generator).add_(centres[labels])[:n]
    return x.view(count, *shape), y


def tokens(count: int, seed: int) -> Data:
    """Sequences in which one of four tokens follows each, but for a tenth drawn at random: inputs and next tokens."""
    successors = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(0))
    drawn = torch.empty(count, LENGTH + 1, dtype=torch.long)
    for rows, generator in pieces(count, seed):
        random = torch.randint(VOCABULARY, (PIECE, LENGTH + 1), generator=generator)
        which = torch.randint(4, (PIECE, LENGTH), generator=generator)
        lost = torch.rand(PIECE, LENGTH, generator=generator) < FLIPPED
        for t in range(LENGTH):
            followed = successors[random[:, t], which[:, t]]
            random[:, t + 1] = torch.where(lost[:, t], random[:, t + 1], followed)
        drawn[rows] = random[: rows.stop - rows.start]
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()
