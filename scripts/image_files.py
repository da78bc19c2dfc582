"""Pictures from the files that MNIST and CIFAR-10 come in: nothing is downloaded, and nothing is unpickled."""

from __future__ import annotations

import gzip
import pickletools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PIXELS = 3 * 32 * 32

Images = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class NoPictures(Exception):
    """There are none where they were looked for, or not enough."""


def mnist(folder: str | Path, split: str, count: int) -> Images:
    """The first images (count, 1, 28, 28) and labels of MNIST; where there is no training set, of its test set.

    The test images are then the last ones of that set.
    """
    has_train = (Path(folder) / "train-images-idx3-ubyte.gz").exists()
    part = "train" if split == "train" and has_train else "t10k"
    images, labels = (idx(Path(folder) / f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    rows = slice(count) if split == "train" or has_train else slice(-count, None)
    return _enough(images[rows, None], labels[rows], count, folder)


def idx(file: Path) -> NDArray[np.uint8]:
    """The array of a gzipped idx file of bytes: its number of axes, its shape, its values."""
    if not file.exists():
        raise NoPictures(f"expected {file.name} in {file.parent}, found none")
    raw = gzip.decompress(file.read_bytes())
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def cifar10(folder: str | Path, split: str, count: int) -> Images:
    """The first images (count, 3, 32, 32) and labels of CIFAR-10: of its binary version, or of the one for Python."""
    names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    for kind, ending, read in (("bin", ".bin", binary_batch), ("py", "", python_batch)):
        for place in (Path(folder), Path(folder) / f"cifar-10-batches-{kind}"):
            if (place / f"{names[0]}{ending}").exists():
                images, labels = np.empty((0, 3, 32, 32), np.uint8), np.empty(0, np.uint8)
                for name in names:
                    if len(labels) < count:
                        more = read(place / f"{name}{ending}")
                        images, labels = np.concatenate((images, more[0])), np.concatenate((labels, more[1]))
                return _enough(images[:count], labels[:count], count, folder)
    raise NoPictures(f"expected {names[0]}.bin or {names[0]} in {folder}, found neither")


def binary_batch(file: Path) -> Images:
    """A batch of the binary version: a byte of label, 3,072 of pixels, and so on."""
    rows = np.frombuffer(file.read_bytes(), np.uint8).reshape(-1, 1 + PIXELS)
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def python_batch(file: Path) -> Images:
    """A batch of the version for Python, a pickle: its instructions are read, not carried out."""
    pixels, labels, key = b"", bytearray(), b""
    for instruction, value, _ in pickletools.genops(file.read_bytes()):
        if isinstance(value, (bytes, bytearray, str)):
            key = value.encode("latin-1") if isinstance(value, str) else bytes(value)
            pixels = key if len(key) >= PIXELS and len(key) % PIXELS == 0 else pixels
        elif key == b"labels" and instruction.name == "BININT1":
            labels.append(value)
    return np.frombuffer(pixels, np.uint8).reshape(-1, 3, 32, 32), np.frombuffer(labels, np.uint8)


def _enough(images: NDArray[np.uint8], labels: NDArray[np.uint8], count: int, folder: str | Path) -> Images:
    if not len(images) == len(labels) == count:
        raise NoPictures(f"expected {count} images and labels in {folder}, found {len(images)} and {len(labels)}")
    return images, labels
