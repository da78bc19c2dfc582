"""Sentences of praise and blame, made by a grammar, some with the wrong label; a transformer of one layer reads them.

infl-cache run --task scripts/sentiment.py:sentiment --run runs/sentiment
infl-cache self-influence --task scripts/sentiment.py:sentiment --run runs/sentiment --solver fisher
"""

import itertools
import random

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import trained

from infl_cache import Task

THINGS = ("film", "plot", "cast", "music", "ending", "script", "hero", "villain", "camera", "humour", "pace", "talk")
BAD, GOOD = ("dull", "clumsy", "flat", "weak", "noisy", "stale"), ("moving", "clever", "funny", "warm", "rich", "fresh")
FRAMES = "the {} is {}", "i found the {} {}", "what a {} , {}", "to me the {} was {} throughout"
WORDS = ["", "not", "very", *THINGS, *BAD, *GOOD, *sorted(set(" ".join(FRAMES).replace("{}", "").split()))]
LENGTH, N_TRAIN, N_TEST, N_WRONG = 8, 400, 100, 20


def sentiment(epochs: int = 30) -> Task:
    """400 sentences to train on, the labels of 20 of them turned, and 100 to ask about."""
    texts, labels = sentences(N_TRAIN + N_TEST)
    words = [(text.split() + [""] * LENGTH)[:LENGTH] for text in texts]
    x, y = torch.tensor([[WORDS.index(word) for word in each] for each in words]), torch.tensor(labels)
    y[turned()] = 1 - y[turned()]
    train, test = TensorDataset(x[:N_TRAIN], y[:N_TRAIN]), TensorDataset(x[N_TRAIN:], y[N_TRAIN:])
    model = trained(Reader, train, lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), epochs)
    return Task(
        model=model, train=train, test=test, loss=nn.CrossEntropyLoss(reduction="none"), classes=("blame", "praise"),
        render=lambda sample: " ".join(WORDS[word] for word in sample[0]).strip(),
    )  # fmt: skip


def sentences(count: int) -> tuple[list[str], list[int]]:
    """So many different sentences, and whether they praise."""
    every = itertools.product(FRAMES, THINGS, ("", "not ", "very "), BAD + GOOD)
    chosen = random.Random(0).sample(list(every), count)
    texts = [frame.format(thing, how + word) for frame, thing, how, word in chosen]
    return texts, [int((word in GOOD) != (how == "not ")) for _, _, how, word in chosen]


def turned() -> list[int]:
    """The training sentences whose label is wrong."""
    return random.Random(1).sample(range(N_TRAIN), N_WRONG)


class Reader(nn.Module):
    """Embedding, one layer of a transformer, mean over the words, two logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(len(WORDS), 32), nn.Linear(32, 2)
        self.layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens)).mean(1))
