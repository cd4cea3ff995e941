"""How old the checkpoint is, in optimizer steps, at which a query's gradient meets a record made in flight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass
class Staleness:
    """Steps between the weights of a record and those of the last checkpoint before it, over all samples recorded.

    Attributes:
        checkpoint: optimizer steps at the last checkpoint.
    """

    checkpoint: int = 0
    count: int = 0
    total: int = 0
    largest: int = 0

    def add(self, step: int, samples: int) -> None:
        """Note a batch of `samples` that was trained on after `step` optimizer steps."""
        age = step - self.checkpoint
        self.count, self.total = self.count + samples, self.total + age * samples
        self.largest = max(self.largest, age)

    def fact(self) -> dict[str, float]:
        """Mean and maximum, as the manifest keeps them."""
        return {"mean_steps": self.total / max(1, self.count), "max_steps": float(self.largest)}

    def state_dict(self) -> dict[str, int]:
        """What a resumed run needs to go on."""
        return dict(vars(self))

    @classmethod
    def from_state(cls, state: Mapping[str, int]) -> Staleness:
        """The staleness of an interrupted run."""
        return cls(**state)
