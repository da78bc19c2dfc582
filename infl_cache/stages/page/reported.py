"""All that a finished run is reported by: the table, the picture, the page."""

from __future__ import annotations

from infl_cache.disk.run import RunFolder
from infl_cache.maths.task import Task
from infl_cache.stages.page.choosing import PageOptions
from infl_cache.stages.page.writing import require_page, write_page
from infl_cache.stages.report import report


def reported(folder: RunFolder, task: Task | None, page: PageOptions | None, note: str = "", show: bool = True) -> str:
    """The text of `report`; with `page` also `report/index.html`, whose path is the last line.

    `note` says in the page why there is no task. The matrix and the task's samples are compared with their records
    before anything is drawn: `DamagedStore`, `ForeignRun`. First of all `BadInput` where the page cannot be written.
    """
    if page is not None:
        require_page(folder)
    text = report(folder, task)
    return text if page is None else f"{text}\n{write_page(folder, task, page, note, show)}"
