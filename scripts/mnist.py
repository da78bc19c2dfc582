"""MNIST from its own files (*-ubyte.gz), and a small convolutional network.

infl-cache run --task scripts/mnist.py:mnist --task-args.data FOLDER --run runs/mnist
"""

import torch
from image_files import Images
from image_files import mnist as pictures_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import trained

from infl_cache import Task


def mnist(data: str, n_train: int = 5000, n_test: int = 100, epochs: int = 10) -> Task:
    """The first images of the training set and of the test set.

    Where `data` has the 10,000 test images only, the first of them to train on and the last to ask about.
    It is trained once, in a minute or so, and its weights are kept in runs/weights.
    """
    train, test = as_tensors(pictures_of(data, "train", n_train)), as_tensors(pictures_of(data, "test", n_test))

    def objective(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return Task(
        model=trained(network, train, objective, epochs, decay=1e-2, keep="mnist"),
        train=train,
        test=test,
        loss=nn.CrossEntropyLoss(reduction="none"),
    )


def as_tensors(images: Images) -> TensorDataset:
    """Greys from 0 to 1, and labels."""
    return TensorDataset(torch.tensor(images[0], dtype=torch.float32) / 255, torch.tensor(images[1], dtype=torch.int64))


def network() -> nn.Module:
    """28 x 28 pixels in two convolutions to 16 maps of 7 x 7, and from there to the ten digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip
