"""How far each parameter can have gone: the rates of the steps in which it had a gradient, summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_influence.replay import loss_scale
from lightning_influence.stages import step_length


@dataclass(frozen=True)
class _Step:
    """An optimizer step that is about to happen."""

    optimizer: int
    global_step: int
    loss_scale: float
    lengths: Mapping[str, float]


class TravelRecord:
    """Σ_t η_t/(1 − β) by parameter name. A parameter that is frozen for a while does not move meanwhile, whatever the
    rate of its group; a step that a gradient scaler skips does not count, one whose closure runs several times does
    once."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self._pending: _Step | None = None

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Note the step that an optimizer is about to take."""
        names = {id(p): name for name, p in module.named_parameters()}
        lengths = {
            names[id(p)]: step_length(group)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) in names
        }
        step = _Step(id(optimizer), trainer.global_step, loss_scale(trainer), lengths)
        again = self._pending
        if again is None or (again.optimizer, again.global_step) != (step.optimizer, step.global_step):
            self.settle(trainer)
        self._pending = step

    def settle(self, trainer: Trainer) -> None:
        """Count the step that was announced last, now that it is over."""
        step, self._pending = self._pending, None
        if step is None or loss_scale(trainer) < step.loss_scale:
            return
        for name, length in step.lengths.items():
            if length:
                self.sums[name] = self.sums.get(name, 0.0) + length

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on."""
        return dict(self.sums)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the sums of an interrupted run."""
        self.sums = {str(name): float(value) for name, value in state.items()}
