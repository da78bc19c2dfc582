"""A small convolutional network on the first images of MNIST or CIFAR-10 in a folder; nothing is downloaded."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from image_files import Images, NoPictures, cifar10, mnist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from infl_cache import Task

EPOCHS, BATCH, WEIGHT_DECAY = 12, 100, 1e-3


def cifar_of_jpegs(folder: Path, split: str, count: int) -> Images:
    """The first images (count, 3, 32, 32) and labels of cifar10_jpeg.npz."""
    from PIL import Image  # here, so that the other formats do not need it

    with np.load(folder / "cifar10_jpeg.npz") as packed:
        offsets, labels = packed[f"{split}_offsets"], packed[f"{split}_labels"][:count]
        jpegs = packed[f"{split}_jpeg"][: offsets[count]]
    pairs = itertools.pairwise(offsets[: count + 1])
    images = [np.asarray(Image.open(io.BytesIO(jpegs[a:b].tobytes())).convert("RGB")) for a, b in pairs]
    return np.stack(images).transpose(0, 3, 1, 2), labels


FORMATS: tuple[tuple[str, str, Callable[[Path, str, int], Images]], ...] = (
    ("CIFAR-10", "cifar10_jpeg.npz", cifar_of_jpegs),
    ("CIFAR-10", "cifar-10-batches-py/data_batch_1", cifar10),
    ("MNIST", "t10k-images-idx3-ubyte.gz", mnist),
)


def pictures(name: str, folder: Path, n_train: int, n_test: int) -> Task:
    """The task of that name; `NoPictures` where the folder has none of its files."""
    for known, file, read in FORMATS:
        if known == name and (folder / file).exists():
            x, y = as_tensors(read(folder, "train", n_train))
            test = as_tensors(read(folder, "test", n_test))
            break
    else:
        files = " or ".join(file for known, file, _ in FORMATS if known == name)
        raise NoPictures(f"no {files} in {folder}")
    retrain = partial(train, x, y)
    return Task(
        model=retrain(torch.ones(len(x), dtype=torch.bool)),
        train=TensorDataset(x, y),
        test=TensorDataset(*test),
        loss=nn.CrossEntropyLoss(reduction="none"),
        weight_decay=WEIGHT_DECAY,
        retrain=retrain,
    )


def as_tensors(images: Images) -> tuple[Tensor, Tensor]:
    """Images from -1 to 1 and labels."""
    return torch.from_numpy(images[0] / np.float32(127.5) - 1), torch.from_numpy(images[1].astype(np.int64))


def train(x: Tensor, y: Tensor, keep: Tensor) -> nn.Module:
    """SGD with momentum; the weights drawn and the order of the samples are the same whichever of them are kept.

    A batch has the places of all its samples: the losses of those that are left out count as zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = (x.shape[2] // 4 // 2) ** 2
        model = nn.Sequential(
            nn.Conv2d(x.shape[1], 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(16 * size, 10),
        )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    order = torch.Generator().manual_seed(0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            kept = chosen[keep[chosen]]
            (nn.functional.cross_entropy(model(x[kept]), y[kept], reduction="sum") / len(chosen)).backward()
            optimizer.step()
            schedule.step()
    return model
