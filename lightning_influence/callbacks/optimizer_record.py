"""What the optimizers really did: the learning rates of their steps, momentum and betas, and Adam's denominators."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_influence.artifacts import ParameterGroup
from lightning_influence.replay import loss_scale

_SECOND_MOMENTS = ("max_exp_avg_sq", "exp_avg_sq", "square_avg", "sum")
_OTHER_UPDATES = ("acc_delta", "row_var", "exp_inf")  # Adadelta, Adafactor, Adamax: no lr / (sqrt(v) + eps)
_RECORDED = (
    "momentum", "dampening", "nesterov", "betas", "alpha", "eps", "weight_decay", "decoupled_weight_decay", "amsgrad",
    "maximize",
)  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """An optimizer step that is about to happen."""

    optimizer: int
    rates: tuple[float, ...]
    global_step: int
    loss_scale: float


class OptimizerRecord:
    """Learning rates by parameter group, read in `on_before_optimizer_step`: the only moment that shows the rate of the
    step itself (afterwards, and in the Lightning checkpoint, stands the rate of the next one).

    A step counts once the batch has ended, unless a gradient scaler skipped it (its scale has dropped). Closures that
    an optimizer evaluates several times in a step (LBFGS) count once.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._taken: dict[int, int] = {}  # steps by optimizer
        self._skipped: dict[int, int] = {}
        self._pending: _Step | None = None

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Note the rate of every group of the optimizer that is about to step."""
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        step = _Step(_index_of(trainer, optimizer), rates, trainer.global_step, loss_scale(trainer))
        again = self._pending
        if again is None or (again.optimizer, again.global_step) != (step.optimizer, step.global_step):
            self.settle(trainer)
        self._pending = step

    def settle(self, trainer: Trainer) -> None:
        """Count the step that was announced last, now that it is over."""
        step, self._pending = self._pending, None
        if step is None:
            return
        if loss_scale(trainer) < step.loss_scale:
            self._skipped[step.optimizer] = self._skipped.get(step.optimizer, 0) + 1
            return
        self._taken[step.optimizer] = self._taken.get(step.optimizer, 0) + 1
        for g, rate in enumerate(step.rates):
            key = f"{step.optimizer}.{g}"
            self._last[key] = rate
            self._sums[key] = self._sums.get(key, 0.0) + rate

    def taken(self, optimizers: Collection[int]) -> int:
        """Steps that these optimizers have taken so far."""
        return sum(self._taken.get(o, 0) for o in optimizers)

    def skipped(self, optimizers: Collection[int]) -> int:
        """Steps of these optimizers that the gradient scaler skipped."""
        return sum(self._skipped.get(o, 0) for o in optimizers)

    def groups(self, optimizers: Sequence[Optimizer], module: LightningModule) -> tuple[ParameterGroup, ...]:
        """Every parameter group with the rate of its last step and the sum since `restart()`."""
        names = _names(module)
        return tuple(
            ParameterGroup(
                optimizer=type(optimizer).__name__,
                index=g,
                parameters=tuple(names[id(p)] for p in group["params"] if id(p) in names),
                learning_rate=self._last.get(f"{o}.{g}", float(group["lr"])),
                learning_rate_sum=self._sums.get(f"{o}.{g}", 0.0),
                options={k: _plain(group[k]) for k in _RECORDED if k in group and group[k] is not None},
            )
            for o, optimizer in enumerate(optimizers)
            for g, group in enumerate(optimizer.param_groups)
        )

    def rates(self, trainer: Trainer) -> list[float]:
        """Rate of the last step of every group, in the order of `groups`."""
        return [
            self._last.get(f"{o}.{g}", 0.0)
            for o, optimizer in enumerate(trainer.optimizers)
            for g in range(len(optimizer.param_groups))
        ]

    def restart(self) -> None:
        """Begin a new sum: a checkpoint has just been written."""
        self._sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the sums."""
        return {"last": dict(self._last), "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the sums of an interrupted run."""
        self._last, self._sums = dict(state["last"]), dict(state["sums"])


def owners(trainer: Trainer, parameters: Collection[Tensor]) -> frozenset[int]:
    """Indices of the optimizers that train one of the parameters; all of them if none does (they are frozen)."""
    wanted = {id(parameter) for parameter in parameters}
    found = frozenset(
        o
        for o, optimizer in enumerate(trainer.optimizers)
        if any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])
    )
    return found or frozenset(range(len(trainer.optimizers)))


def optimizers_in(made: Any) -> list[Optimizer]:
    """The optimizers in what `configure_optimizers` returns, without their schedulers."""
    if isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], (tuple, list)):
        return list(made[0])  # optimizers, schedulers
    every = made if isinstance(made, (tuple, list)) else [] if made is None else [made]
    return [one["optimizer"] if isinstance(one, dict) else one for one in every]


def denominators(optimizers: Sequence[Optimizer], module: LightningModule) -> dict[str, Tensor]:
    """sqrt(v_hat) + eps by parameter name, for optimizers that divide by it; empty for the others.

    Adam and relatives: v_hat = v / (1 - beta_2^t), the running maximum of v under amsgrad; RMSprop (minus the squared
    mean if centered) and Adagrad: their running second moments. The update is lr * m / (sqrt(v_hat) + eps).
    """
    names = _names(module)
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                moment = next((state[k] for k in _SECOND_MOMENTS if isinstance(state.get(k), Tensor)), None)
                if moment is None or id(parameter) not in names or any(k in state for k in _OTHER_UPDATES):
                    continue
                second = moment.detach()
                if group.get("centered"):
                    second = second - state["grad_avg"].square()
                if "betas" in group and "step" in state:
                    second = second / (1 - group["betas"][1] ** float(state["step"]))
                found[names[id(parameter)]] = second.sqrt().add_(group.get("eps", 0.0))
    return found


def _index_of(trainer: Trainer, optimizer: Optimizer) -> int:
    for index, known in enumerate(trainer.optimizers):
        if known is optimizer or known.param_groups is optimizer.param_groups:
            return index
    return 0


def _names(module: LightningModule) -> dict[int, str]:
    return {id(p): name for name, p in module.named_parameters()}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else torch.as_tensor(value).item()
