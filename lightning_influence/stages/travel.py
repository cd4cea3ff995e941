"""How far finetuning can have gone from where it began, and so how firmly its start is held: 2α of every parameter."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, ParameterGroup, StageLink
from lightning_influence.errors import QueryError

Held: TypeAlias = Mapping[str, float | Tensor]  # 2α by parameter name, one number or one for each entry

_PLAIN = ("SGD", "ASGD")


def travelled(
    checkpoints: Sequence[Checkpoint], preconditioned: Collection[str], summed_over: int = 1
) -> dict[str, float]:
    """Σ_t η_t/(1 − β) of every parameter that the optimizers of a run have trained, in units of the mean loss.

    Under SGD with momentum β and dampening d a step of rate η goes η (1 − d)/(1 − β) in the end; optimizers that divide
    by √v̂+ε count their rates alone. Those that do neither (LBFGS, Adadelta) say nothing about it, and are left out.

    Args:
        checkpoints: of the whole run: each has the sum of the rates since the one before.
        preconditioned: parameters whose optimizer divides by √v̂+ε.
        summed_over: samples whose losses `training_step` adds up instead of averaging.
    """
    travel: dict[str, float] = {}
    for checkpoint in checkpoints:
        for group in checkpoint.groups:
            for name in group.parameters:
                factor = _factor(group, name in preconditioned)
                if factor is not None and group.learning_rate_sum:
                    travel[name] = travel.get(name, 0.0) + factor * group.learning_rate_sum * summed_over
    return travel


def held_by_training(store: ArtifactStore, link: StageLink, at: Checkpoint, names: Sequence[str]) -> Held:
    """2α of parameters as the run itself says it: 1/Σ_t η_t/(1 − β), or (√v̂+ε)/Σ_t η_t.

    K steps of gradient descent keep exp(−ηKσ) of where they began along an eigenvector of eigenvalue σ, the proximal
    model 2α/(σ + 2α): they agree to first order in σ at 2α = 1/(ηK).

    Raises:
        QueryError: an optimizer whose steps are not known to go along the gradient.
    """
    if unknown := [name for name in names if not link.travel.get(name, 0.0) > 0]:
        raise QueryError(
            f"how far finetuning went is not known for {', '.join(unknown[:5])}",
            expected="SGD, or an optimizer that divides by √v̂+ε",
            found=", ".join(link.optimizers) or "no optimizer",
            hint="say how firmly the start is held: MultiStage(..., link=Proximity(alpha)); SmallProximity() ranks",
        )
    scales = store.preconditioner(at) if any(name in link.preconditioned for name in names) else {}
    return {
        name: scales[name].double() / link.travel[name] if name in scales else 1 / link.travel[name] for name in names
    }


def _factor(group: ParameterGroup, preconditioned: bool) -> float | None:
    options: dict[str, Any] = dict(group.options)
    momentum = float(options.get("momentum", 0.0) or 0.0)
    if preconditioned:
        return 1 / (1 - momentum)  # of RMSprop; the first moment of Adam is a mean
    if group.optimizer in _PLAIN:
        dampening = float(options.get("dampening", 0.0) or 0.0) if momentum else 0.0
        return (1 - dampening) / (1 - momentum)
    return None
