"""Which training samples made my PyTorch model say this? Influence functions, cached on disk, resumable, exact.

>>> from infl_cache import Run, Task
"""

from infl_cache.config import Options
from infl_cache.errors import (
    BadInput,
    DamagedStore,
    DiskFull,
    ForeignRun,
    IncompleteStore,
    InflCacheError,
    Interrupted,
    Locked,
)
from infl_cache.maths import measures
from infl_cache.maths.load import load_task
from infl_cache.maths.task import Task
from infl_cache.pipeline import Run
from infl_cache.stages.rank import Ranking
from infl_cache.stages.validation import Validation

__version__ = "0.1.0"

__all__ = [
    "BadInput",
    "DamagedStore",
    "DiskFull",
    "ForeignRun",
    "IncompleteStore",
    "InflCacheError",
    "Interrupted",
    "Locked",
    "Options",
    "Ranking",
    "Run",
    "Task",
    "Validation",
    "load_task",
    "measures",
]
