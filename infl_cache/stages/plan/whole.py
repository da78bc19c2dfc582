"""The three stages together: what they write, hold and take, and whether it fits on the disk."""

from __future__ import annotations

from dataclasses import dataclass

from infl_cache.errors import DiskFull
from infl_cache.progress import human_bytes
from infl_cache.stages.plan.grads import GradsPlan
from infl_cache.stages.plan.influence import InfluencePlan
from infl_cache.stages.plan.stest import StestPlan
from infl_cache.stages.plan.words import as_text

# What must be left over on the disk, of what is written.
SPARE = 0.05


@dataclass(frozen=True)
class Plan:
    """All stages on paper. `written` are the bytes that the run folder has already, `base` those of the process.

    `machine` says where it would run, `assumed` what was not measured.
    """

    machine: str
    grads: GradsPlan
    stest: StestPlan
    influence: InfluencePlan
    budget: int
    base: float
    free: float
    written: float
    assumed: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> float:
        """On the disk when all is done."""
        return self.grads.n_bytes + self.stest.n_bytes + self.stest.chosen.disk + self.influence.n_bytes

    @property
    def to_write(self) -> float:
        """What is still to be written."""
        return max(0.0, self.n_bytes - self.written)

    @property
    def fits(self) -> bool:
        """Whether the disk has room, with a twentieth to spare."""
        return (1 + SPARE) * self.to_write <= self.free

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return self.grads.seconds + self.stest.seconds + self.influence.seconds

    @property
    def memory(self) -> float:
        """Bytes of the process at most."""
        return self.base + max(self.grads.memory, self.stest.memory, self.influence.memory)

    def require_room(self) -> None:
        """`DiskFull` if the disk is too small, with what would make it fit."""
        if not self.fits:
            raise DiskFull(
                f"plan: expected {human_bytes((1 + SPARE) * self.to_write)} free for what is still to be written,"
                f" found {human_bytes(self.free)}; use another disk, --dtype bfloat16, --codec zstd, --no-cache,"
                " parameters= or fewer test samples"
            )

    def __str__(self) -> str:
        return as_text(self)
