"""CIFAR-10 by the functions of the old package: a small CNN, and the influences on some test images by both modes.

    python scripts/ptif_cifar10.py FOLDER [TRAIN] [TESTS_PER_CLASS]

FOLDER holds CIFAR-10's "binary version" (data_batch_*.bin, test_batch.bin), which needs no unpickling.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import infl_cache.ptif as ptif


def images(folder, pattern, count):
    """The first images of some files as normalised float tensors, with their labels."""
    rows = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, 3073) for path in sorted(folder.glob(pattern))])
    pixels = torch.from_numpy(rows[:count, 1:].reshape(-1, 3, 32, 32)).float() / 127.5 - 1
    return TensorDataset(pixels, torch.from_numpy(rows[:count, 0]).long())


def trained(loader, weights, epochs=8):
    """Two convolutions and three linear layers, trained, or read from the file of the last time."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    if weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-3)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), weights)
    return model


if __name__ == "__main__":
    folder, (n_train, per_class) = Path(sys.argv[1]), [*map(int, sys.argv[2:]), 500, 4][:2]
    train, test = images(folder, "data_batch_*.bin", n_train), images(folder, "test_batch.bin", 1000)
    trainloader, testloader = DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=32)
    ptif.init_logging()
    config = ptif.get_default_config()
    # The curvature's largest eigenvalue is some 50: LiSSA would need tens of thousands of steps at this damping.
    config.update(test_sample_num=per_class, num_classes=10, solver="cg")
    model = trained(trainloader, Path(f"runs/weights/ptif_cifar10_{n_train}.pt"))
    for name in ("calc_img_wise", "calc_all_grad_then_test"):
        config["outdir"], started = f"runs/ptif_cifar10/{name}", time.perf_counter()
        influences, harmful, helpful = getattr(ptif, name)(config, model, trainloader, testloader)
        print(f"{name}: {time.perf_counter() - started:.1f} s; helpful {helpful[:5]}, harmful {harmful[:5]}")
