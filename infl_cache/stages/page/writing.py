"""`RUN/report/index.html`: as many test samples and as large pictures as fit into one file that any browser opens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infl_cache.disk.durable import make_folders, require_folder, require_writable, write_atomically
from infl_cache.disk.inside import refuse_links
from infl_cache.disk.run import RunFolder
from infl_cache.errors import BadInput
from infl_cache.maths.task import Task
from infl_cache.progress import human_bytes
from infl_cache.stages.page.assembly import assembled
from infl_cache.stages.page.choosing import PageOptions, candidates, chosen
from infl_cache.stages.page.content import Known, known, layers, of_tests, of_trains, suspects
from infl_cache.stages.page.overview import overview
from infl_cache.stages.page.showing import Place, entries, typical
from infl_cache.stages.selection import count_of_tests

PAGE = "report/index.html"
LIMIT = 20_000_000
# Longest sides of pictures in pixels, the first that lets the page stay under the limit.
SIDES = (128, 96, 64, 48, 32)
# In place of a page that is too large for its numbers alone.
TOO_MANY = b""


def require_page(folder: RunFolder) -> None:
    """`BadInput` unless the page could be written, `DamagedStore` for a link in its place: said before the work."""
    path = folder.path / PAGE
    require_folder(path.parent)
    refuse_links(path.parent)
    if path.parent.exists():
        require_writable(path)


def write_page(folder: RunFolder, task: Task | None, asked: PageOptions, note: str = "", show: bool = True) -> Path:
    """Write the page of a finished run whose matrix and task have been compared with their records.

    Without a task no samples are shown, and `note` says why. Raises `BadInput` where the page cannot be written, does
    not fit, or the task's `render` gives something that is no sample; errors of damaged stores as whoever reads them.
    """
    require_page(folder)
    have = known(folder)
    among = candidates(asked, have.tests, count_of_tests(folder))
    head = {**overview(folder, have, show), "classes": class_names(task), "layers": layers(have)}
    head["notes"] = [*([note] if note else []), *head["notes"]]
    hopeless = 0
    for count, side in attempts(asked, len(among), task is not None):
        if count == hopeless:
            continue
        page = _page(folder, task, have, asked, (head, among, count, side), show)
        hopeless = count if page == TOO_MANY else 0
        if page:
            make_folders((folder.path / PAGE).parent)
            write_atomically(folder.path / PAGE, page)
            return folder.path / PAGE
    raise BadInput(
        f"report: expected a page under {human_bytes(LIMIT)}, found a larger one even for one test sample; fewer"
        " --neighbours, or shorter texts of the task's render"
    )


def attempts(asked: PageOptions, count: int, pictures: bool) -> Iterator[tuple[int, int]]:
    """Numbers of test samples and sides of pictures, the most that is asked for first.

    >>> list(attempts(PageOptions(most_tests=2), 9, True))[-2:]
    [(1, 48), (1, 32)]
    """
    count = _wanted(asked, count)
    while count:
        yield from ((count, side) for side in (SIDES if pictures else SIDES[:1]))
        count //= 2


def _wanted(asked: PageOptions, count: int) -> int:
    """How many of `count` test samples are shown if there is room for them."""
    return count if asked.tests is not None else min(count, asked.most_tests)


def class_names(task: Task | None) -> list[str] | None:
    """The names of integer labels, where the task has them."""
    return [str(name) for name in task.classes] if task is not None and task.classes is not None else None


def _page(
    folder: RunFolder, task: Task | None, have: Known, asked: PageOptions, attempt: Any, show: bool
) -> bytes | None:
    """The page of an attempt (what its head says, test samples to choose from, how many, side); None if too large.

    `TOO_MANY` if even without a sample it is, so that no smaller pictures help.
    """
    head, among, count, side = attempt
    tests, words = chosen(among, have.test["loss"][among], count)
    shown_tests, suspected = of_tests(folder, have, tests.tolist(), asked, show), suspects(have)
    near = {int(pair[0]) for each in shown_tests for end in ("helpful", "harmful") for pair in each[end]}
    trains = sorted(near | set(suspected["ids"]))
    notes = [*head["notes"]]
    if words:
        notes.insert(0, _chosen_in_words(len(tests), len(among), words, count < _wanted(asked, len(among))))
    content = {**head, "tests": shown_tests, "suspects": suspected, "trains": of_trains(have, trains)}
    page = assembled({**content, "notes": notes, "samples": None})
    if len(page) > LIMIT or task is None:
        return page if len(page) <= LIMIT else TOO_MANY
    places: list[Place] = [*(("test", test) for test in tests.tolist()), *(("train", train) for train in trains)]
    room = LIMIT - len(page) - 10_000
    if typical(task, places, side) * len(places) > room:
        return None
    samples = entries(task, places, side, room, show)
    if samples is None:
        return None
    largest = max((max(each["size"]) for group in samples.values() for each in group.values() if "png" in each),
                  default=0)  # fmt: skip
    if largest > side:
        notes.append(f"Pictures are shrunk to at most {side} pixels a side, from up to {largest:,}.")
    page = assembled({**content, "notes": notes, "samples": samples})
    return page if len(page) <= LIMIT else None


def _chosen_in_words(count: int, every: int, words: str, for_room: bool) -> str:
    why = f" More do not fit into {human_bytes(LIMIT)}." if for_room else ""
    return f"{count:,} of {every:,} test samples are shown: {words}.{why} --tests 3,17 shows others."
