"""Plans on paper of three large jobs: an H100, a disk of 7 GB/s, models on the `meta` device, nothing computed.

python scripts/plan_on_paper.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from measuring import table
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workloads import ResNet, token_loss

from infl_cache import Run, Task
from infl_cache.progress import human_bytes
from infl_cache.stages.plan.words import duration

CLASSES, VOCABULARY, LENGTH = 1000, 32_000, 512
WIDTH, HEADS, LAYERS = 2048, 16, 18


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which a shortcut leads."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.inner = nn.Sequential(
            nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps to maps."""
        out: Tensor = self.relu(self.inner(x) + self.shortcut(x))
        return out


def resnet50() -> nn.Module:
    """ResNet-50 for 224x224."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers: list[nn.Module] = []
    before = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(before, 64 * 2**stage, 2 if stage and not block else 1))
            before = 256 * 2**stage
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


class Block(nn.Module):
    """Attention and two linear layers, each with a norm before and a shortcut around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.gelu, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same."""
        normed = self.norm1(x)
        q, k, v = (
            each(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        scores = (q @ k.transpose(2, 3) / math.sqrt(WIDTH // HEADS)).softmax(3)
        x = x + self.out((scores @ v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(self.gelu(self.up(self.norm2(x))))
        return out


def transformer() -> nn.Module:
    """A language model of about a billion parameters; positions are left out, they cost nothing."""
    blocks = [Block() for _ in range(LAYERS)]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))


def on_meta(make: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: object, parameters: object = None) -> Task:
    """A task of a model without weights and of two samples, whose shapes are all that counts."""
    with torch.device("meta"):
        model = make()
    data = TensorDataset(x, y)
    return Task(model=model.eval(), train=data, test=data, loss=loss, parameters=parameters)  # type: ignore[arg-type]


def jobs() -> dict[str, tuple[Task, int, int]]:
    """Each job's task, training samples, test samples."""
    cross = nn.CrossEntropyLoss(reduction="none")
    one = torch.zeros(2, dtype=torch.long)
    words = torch.zeros(2, LENGTH, dtype=torch.long)
    last = [f"{LAYERS}.*"]
    return {
        "ResNet-110, CIFAR-10": (
            on_meta(lambda: ResNet((16, 32, 64), blocks=18), torch.zeros(2, 3, 32, 32), one, cross), 50_000, 10_000
        ),
        "ResNet-50, ImageNet": (on_meta(resnet50, torch.zeros(2, 3, 224, 224), one, cross), 1_281_167, 50_000),
        "transformer, 512 tokens": (on_meta(transformer, words, words, token_loss), 10**6, 1000),
        "the same, last block only": (on_meta(transformer, words, words, token_loss, last), 10**6, 1000),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan each job and print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="h100", help="a machine of the table")
    parser.add_argument("--disk", default="7GB/s", help="what its disk reads and writes")
    settings = parser.parse_args(arguments)
    rows = []
    for name, (task, n_train, n_test) in jobs().items():
        plan = Run("nowhere", task, progress=False).plan(
            n_train=n_train, n_test=n_test, device=settings.device, disk=settings.disk
        )
        rows.append([
            name, f"{plan.grads.n_params:,}", f"{n_train:,} x {n_test:,}", human_bytes(plan.grads.n_bytes),
            human_bytes(plan.stest.n_bytes), human_bytes(plan.influence.n_bytes), duration(plan.grads.seconds),
            duration(plan.stest.seconds), duration(plan.influence.seconds), human_bytes(plan.memory),
        ])  # fmt: skip
    head = ["", "parameters", "train x test", "grad_z", "s_test", "matrix", "grads", "stest", "influence", "memory"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
