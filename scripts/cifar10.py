"""CIFAR-10 from its own files, and a small residual network with batch normalisation.

infl-cache run --task scripts/cifar10.py:cifar10 --task-args.data FOLDER --run runs/cifar10 --solver fisher
"""

import torch
from image_files import Images
from image_files import cifar10 as pictures_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import trained

from infl_cache import Task

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(data: str, n_train: int = 2000, n_test: int = 50, epochs: int = 30, width: int = 16) -> Task:
    """The first images of data_batch_*.bin (or data_batch_*) and test_batch, in `data` or its cifar-10-batches-*.

    It is trained once, in some minutes, and its weights are kept in runs/weights.
    """
    train, test = as_tensors(pictures_of(data, "train", n_train)), as_tensors(pictures_of(data, "test", n_test))
    model = trained(lambda: resnet(width), train, objective, epochs, decay=1e-2, keep="cifar10")
    return Task(model=model, train=train, test=test, loss=nn.CrossEntropyLoss(reduction="none"), classes=CLASSES)


def objective(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """What is minimised: the mean cross entropy of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def as_tensors(images: Images) -> TensorDataset:
    """Colours from -1 to 1, and labels."""
    return TensorDataset(
        torch.tensor(images[0], dtype=torch.float32) / 127.5 - 1, torch.tensor(images[1], dtype=torch.int64)
    )


class Residual(nn.Module):
    """Two convolutions beside a shortcut; the second block of two halves the picture."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(into, out, 3, stride=out // into, padding=1, bias=False)
        self.second = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        self.short = nn.Identity() if into == out else nn.Conv2d(into, out, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inner)) + self.short(x))


def resnet(width: int) -> nn.Module:
    """Seven convolutions in three blocks, the mean over the picture, and ten logits."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width, width), Residual(width, 2 * width), Residual(2 * width, 4 * width)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
