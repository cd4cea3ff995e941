"""How far finetuning can have gone from where it began, and so how firmly its start is held: 2α of every parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, StageLink
from lightning_influence.errors import QueryError

Held: TypeAlias = Mapping[str, float | Tensor]  # 2α by parameter name, one number or one for each entry

_PLAIN = ("SGD", "ASGD")


def step_length(group: Mapping[str, Any]) -> float:
    """How far a step of a parameter group goes in the end, in units of its gradient: η (1 − d)/(1 − β) under momentum β
    with dampening d; for Adam and its relatives η, their first moment being a mean."""
    momentum = float(group.get("momentum", 0.0) or 0.0)
    dampening = float(group.get("dampening", 0.0) or 0.0) if momentum else 0.0
    return float(group["lr"]) * (1 - dampening) / (1 - momentum)


def goes_along_the_gradient(optimizer: str, preconditioned: bool) -> bool:
    """Whether an optimizer's steps are its rate times the gradient, if need be over √v̂+ε."""
    return preconditioned or optimizer in _PLAIN


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
