"""Before anything runs: what each stage writes, holds and takes, on this machine or on one that is not here.

`asked` holds plan's own options, `grads`, `stest` and `influence` the plans of the stages, `trial` times the second on
a few samples, `costs` reckons its solvers, `machines` is a table of others, `counts` counts operations for them and
`reckoned` makes the plan of it; `making` makes it of measurements, `whole` puts all together, `words` prints it.
"""

from infl_cache.stages.plan.asked import PlanOptions, asked_of
from infl_cache.stages.plan.making import plan
from infl_cache.stages.plan.whole import Plan

__all__ = ["Plan", "PlanOptions", "asked_of", "plan"]
