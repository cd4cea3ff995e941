"""The path of an edit: linear steps one after the other, each at the weights that the one before has led to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.edits.linearised import Linearised
from lightning_influence.edits.module_state import copied, moved
from lightning_influence.errors import QueryError


@dataclass(frozen=True)
class Path:
    """Where the steps have led.

    Attributes:
        reached: by parameter name the changes (steps, *shape) after each step, in float32 or wider.
        before: by parameter name the weights before the first step.
        steps: what there is to say of each step, as plain JSON.
        left: of the whole path, what is left of the gradient: `left` and `left_frozen`.
    """

    reached: dict[str, Tensor]
    before: dict[str, Tensor]
    steps: list[dict[str, Any]]
    left: dict[str, float | None]


def followed(module: LightningModule, problem: Linearised) -> Path:
    """Take all steps, on a copy of the module.

    What is left of one step is ‖g − (H + λI) δ‖/‖g‖. Of several it is measured where they end, by one more walk over
    what stays: ‖∇J_new(θ) − ∇J_old(θ₀)‖/‖g‖, without λ.

    Raises:
        QueryError: a change is NaN or infinite.
    """
    work, count = copied(module), problem.how.steps
    parameters = {name: p for name, p in work.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    first = g = problem.gradient(work)
    unrest = {} if count == 1 else _plus(problem.slope(work), g, 1.0)  # ∇J_old(θ₀), what training had left
    reached: dict[str, list[Tensor]] = {}
    told: list[dict[str, Any]] = []
    for number in range(count):
        if number:
            g = _plus(unrest, problem.slope(work), -1.0)  # what still has to leave
        answer, facts = problem.answer(work, {name: value / (count - number) for name, value in g.items()})
        told.append(facts)
        for name, block in answer.change.items():
            weight = parameters[name]
            change = block.dense()[0].to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            _refuse_not_finite(name, change)
            so_far = reached.setdefault(name, [])
            so_far.append(so_far[-1] + change if so_far else change)
            with torch.no_grad():
                weight.copy_(moved(start[name], so_far[-1]))
    if count == 1:
        left = {name: told[0][name] for name in ("left", "left_frozen")}
    else:
        left = problem.left(_plus(unrest, problem.slope(work), -1.0), first)
    path = {name: torch.stack(changes).cpu() for name, changes in reached.items()}
    return Path(path, {name: start[name].cpu() for name in path}, told, left)


def _plus(left: Mapping[str, Tensor], right: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: left[name] + factor * value for name, value in right.items()}


def _refuse_not_finite(name: str, change: Tensor) -> None:
    if not bool(change.isfinite().all()):
        raise QueryError(
            f"the change of {name!r} is NaN or infinite",
            expected="finite changes",
            found="NaN or infinity",
            hint="damp more, take fewer iterations, or another solver",
        )
