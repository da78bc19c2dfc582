"""From a model and two loaders to a task: the loaders' data sets by index, never the order in which they draw."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate, default_convert

from infl_cache.config import short
from infl_cache.errors import BadInput
from infl_cache.maths.digest import code_digest
from infl_cache.maths.samples import batches, groups_of
from infl_cache.maths.task import Task, blaming, targets_as_numbers
from infl_cache.progress import progress
from infl_cache.ptif.config import Config

log = logging.getLogger("infl_cache")

Loss = Callable[[Any, Any], Tensor]
OWN = {"model", "train", "test", "loss"}


def class_loss(outputs: Any, targets: Any) -> Tensor:
    """The cross entropy of each sample, as the old package's loss: what `loss=None` stands for."""
    return cross_entropy(outputs, targets, reduction="none")


def data_of(loader: Any) -> Any:
    """The data set of a loader; a data set is its own."""
    return loader.dataset if isinstance(loader, DataLoader) else loader


def collate_of(loader: Any) -> Callable[[list[Any]], Any]:
    """What makes a batch of samples."""
    own = loader.collate_fn if isinstance(loader, DataLoader) else default_collate
    if own is default_convert:
        return default_collate
    # A loader with batch_size=None makes no batches: its function is called on what its data set has, single samples.
    return own if not isinstance(loader, DataLoader) or loader.batch_sampler is not None else _each_by(own)


def _each_by(own: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    def collate(samples: list[Any]) -> Any:
        return default_collate([own(sample) for sample in samples])

    return collate


def batch_of(loader: Any) -> int | None:
    """How many samples the loader puts into a batch."""
    return loader.batch_size if isinstance(loader, DataLoader) else None


def task_of(model: nn.Module, train_loader: Any, test_loader: Any, loss: Loss | None = None, **task: Any) -> Task:
    """The task that a model and two loaders are; `task` are further fields of `infl_cache.Task`.

    Raises `BadInput` for loaders that make batches in two ways, and as `Task` does.
    """
    known = {each.name for each in dataclasses.fields(Task)} - OWN
    for key in task:
        if key not in known:
            raise BadInput(f"{key}: expected a field of infl_cache.Task ({', '.join(sorted(known))}), found none")
    first, second = collate_of(train_loader), collate_of(test_loader)
    if "collate" not in task and first is not second and code_digest(first) != code_digest(second):
        raise BadInput(
            "trainloader, testloader: expected one collate_fn for both, found two; give both the same, or collate="
        )
    for name, loader in (("trainloader", train_loader), ("testloader", test_loader)):
        _look_at_sampler(name, loader)
    given = {"collate": first, **task}
    return Task(model=model, train=data_of(train_loader), test=data_of(test_loader), loss=loss or class_loss, **given)


def _look_at_sampler(name: str, loader: Any) -> None:
    sampler = getattr(loader, "sampler", None)
    if sampler is None or not hasattr(sampler, "__len__") or not hasattr(loader.dataset, "__len__"):
        return
    if len(sampler) != len(loader.dataset):
        log.warning(
            f"{name}: its sampler draws {len(sampler):,} of {len(loader.dataset):,} samples, all of which are taken;"
            " for a part, give it torch.utils.data.Subset"
        )


def asked_tests(config: Config, task: Task) -> list[int]:
    """The ids of the test samples that the config asks for, in ascending order."""
    count = len(task.test)
    if config.test_sample_ids is not None:
        if max(config.test_sample_ids) >= count:
            raise BadInput(
                f"config['test_sample_ids']: expected ids from 0 to {count - 1}, found {max(config.test_sample_ids)}"
            )
        return sorted(config.test_sample_ids)
    if not config.test_sample_num and not config.start:
        return list(range(count))
    by_class = _by_class(task.test, task.collate, task.targets, config.display_progress)
    chosen = _chosen(by_class, config.test_sample_num, config.num_classes, config.start)
    found = sorted(index for ids in chosen.values() for index in ids)
    if not found:
        most = max(map(len, by_class.values()))
        raise BadInput(
            f"config['test_sample_start_per_class']: expected fewer than the {most} test samples of the largest class,"
            f" found {config.start}"
        )
    return found


def get_dataset_sample_ids(
    num_samples: int | bool | None, test_loader: Any, num_classes: int | None = None, start_index: int | bool = 0
) -> tuple[dict[int, list[int]], list[int]]:
    """Ids of `num_samples` test samples of each class (False: all), after the first `start_index` of each.

    Returns them by class and as one ascending list; `num_classes` keeps to the classes 0 to num_classes - 1.

    >>> data = [(torch.zeros(1), label) for label in (1, 0, 1, 1, 0)]
    >>> get_dataset_sample_ids(1, data, start_index=1)
    ({0: [4], 1: [2]}, [2, 4])
    """
    for name, value, least in (("num_samples", num_samples, 1), ("start_index", start_index, 0)):
        if value is not None and value is not False and (type(value) is not int or value < least):
            raise BadInput(f"{name}: expected False or a whole number of at least {least}, found {short(value)}")
    found = _by_class(data_of(test_loader), collate_of(test_loader), _last, show=False)
    chosen = _chosen(found, num_samples, num_classes, int(start_index or 0))
    return chosen, sorted(index for ids in chosen.values() for index in ids)


def get_dataset_sample_ids_per_class(
    class_id: int, num_samples: int | bool | None, test_loader: Any, start_index: int | bool = 0
) -> list[int]:
    """Ids of `num_samples` test samples of one class (False: all), after its first `start_index`.

    >>> data = [(torch.zeros(1), label) for label in (1, 0, 1, 1, 0)]
    >>> get_dataset_sample_ids_per_class(1, 2, data)
    [0, 2]
    """
    return get_dataset_sample_ids(num_samples, test_loader, None, start_index)[0].get(class_id, [])


def _last(batch: Any) -> Any:
    return batch[-1]


def _chosen(
    by_class: dict[int, list[int]], count: int | bool | None, classes: int | None, start: int
) -> dict[int, list[int]]:
    stop = start + int(count) if count else None
    return {
        label: ids[start:stop] for label, ids in sorted(by_class.items()) if classes is None or 0 <= label < classes
    }


def _by_class(
    dataset: Any, collate: Callable[[list[Any]], Any], targets: Callable[[Any], Any], show: bool
) -> dict[int, list[int]]:
    """The ids of each class, in the order of the data set."""
    task = Task(nn.Identity(), dataset, dataset, class_loss, collate=collate, targets=targets)
    found: dict[int, list[int]] = {}
    groups: Sequence[range] = groups_of(0, len(dataset), 1)
    with progress("classes", len(dataset), unit="test sample", show=show) as bar:
        for index, batch in enumerate(batches(dataset, "test", collate, groups, torch.device("cpu"))):
            with blaming(f"targets, on test sample {index},"):
                label = float(targets_as_numbers(task, batch.data, 1)[0])
            if not label.is_integer():
                raise BadInput(
                    f"test[{index}]: expected an integer label, to choose by class, found {short(label)};"
                    " choose by config['test_sample_ids']"
                )
            found.setdefault(int(label), []).append(index)
            bar.advance(1)
    return found
