"""Batches that are dicts, and a model that takes and returns what Hugging Face's do: where has it read this?

infl-cache run --task scripts/capitals.py:capitals --run runs/capitals
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from training import trained

from infl_cache import Task

PLACES = "peru lima kenya nairobi japan tokyo cuba havana ghana accra nepal kathmandu chile santiago france paris"
FACTS = list(zip(PLACES.split()[::2], PLACES.split()[1::2], strict=True))
FRAMES = "the capital of {} is {}", "{} is governed from {}", "all flights to {} land in the city of {}"
WORDS, LENGTH = ["", *sorted({*PLACES.split(), *" ".join(FRAMES).replace("{}", "").split()})], 10


def capitals(epochs: int = 60) -> Task:
    """Each fact in two of three sentences to train on, and in the third to ask about: fact k is test sample k."""
    every = [(k, f, frame.format(*fact)) for k, fact in enumerate(FACTS) for f, frame in enumerate(FRAMES)]
    train, test = ([sample(text) for k, f, text in every if (f == k % 3) == held] for held in (False, True))
    return Task(
        model=trained(Speaker, train, lambda model, batch: model(**batch).loss, epochs),
        train=train,
        test=test,
        loss=loss,
        forward=lambda model, batch: model(batch["input_ids"], batch["attention_mask"]).logits,
        targets=lambda batch: batch["labels"],
        render=lambda sample: " ".join(WORDS[word] for word in sample["input_ids"]).strip(),
    )


def sample(text: str) -> dict[str, Tensor]:
    """A sentence, padded to one length; what is to be learned of it is its last word, the others are labelled -100."""
    ids = [WORDS.index(word) for word in text.split()]
    rows = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * (len(ids) - 1) + ids[-1:]}
    return {name: torch.tensor((row + [-100 * (name == "labels")] * LENGTH)[:LENGTH]) for name, row in rows.items()}


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each sample (B,), summed over its words; the logits at a word are about the next one."""
    return cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100).sum(1)


class Speaker(nn.Module):
    """One layer of a decoder: what it says at a word is the next one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(len(WORDS), width), nn.Linear(width, 3 * width)
        self.think, self.head = nn.Linear(width, width), nn.Linear(width, len(WORDS))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x, causal = self.embed(input_ids), torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        x = x + scaled_dot_product_attention(*self.attend(x).chunk(3, -1), causal & attention_mask[:, None, :].bool())
        logits = self.head(x + torch.relu(self.think(x)))
        return SimpleNamespace(loss=None if labels is None else loss(logits, labels).mean(), logits=logits)
