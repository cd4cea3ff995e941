"""StageLink: what a finetuning run's store says of the pretraining run that its weights came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.artifacts.json_values import Fields, Json

LINK = "stage_link"  # its key among the facts of a manifest


@dataclass(frozen=True)
class StageLink:
    """How a run continues an earlier one.

    Args:
        parent: content identity of the earlier run's store (`StoreReader.identity`).
        parent_folder: where that store was, absolute.
        parent_beside: the same relative to this store: both may have moved together.
        shared: this run's parameter name -> the earlier run's, for all that began at the earlier run's final weights.
        frozen: of this run's parameters those that stayed where they were, whether shared or not.
        moved_though_frozen: shared parameters that were declared frozen, and have changed all the same.
        travel: Σ_t η_t/(1 − β) of every parameter that SGD trained, Σ_t η_t of those whose optimizer divides by
            √v̂+ε, over the steps in which it had a gradient: how far training can go; empty until the fit has ended.
        preconditioned: the latter.
        optimizers: class names of the optimizers.
        alpha: α that `Proximity()` takes, if the run said one.
        converted: shared parameters whose type differs, as "float32 -> bfloat16".
        other_shapes: parameters of one name and other shapes, such as resized heads; they are not shared.
        start: 16 hex digits over the content of every parameter as this run began.
        complete: whether the fit reached its end.
    """

    parent: str
    parent_folder: str
    parent_beside: str
    shared: Mapping[str, str]
    frozen: tuple[str, ...] = ()
    moved_though_frozen: tuple[str, ...] = ()
    travel: Mapping[str, float] = field(default_factory=dict)
    preconditioned: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    alpha: float | None = None
    converted: Mapping[str, str] = field(default_factory=dict)
    other_shapes: tuple[str, ...] = ()
    start: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False

    def __str__(self) -> str:
        frozen = sum(name in self.frozen for name in self.shared)
        far = sorted({round(travel, 6) for name, travel in self.travel.items() if name in self.shared})
        steps = "" if not far else f", η·K {far[0]:.3g}" + (f" to {far[-1]:.3g}" if len(far) > 1 else "")
        state = "" if self.complete else ", the fit has not ended"
        return (
            f"{len(self.shared)} parameters of {self.parent_folder} ({self.parent[:12]}), {frozen} frozen, "
            f"{len(self.shared) - frozen} tuned by {', '.join(self.optimizers) or 'no optimizer yet'}{steps}{state}"
        )

    def to_json(self) -> dict[str, Json]:
        """As plain JSON."""
        return {
            name: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, record: Any) -> StageLink:
        """The link that `to_json` wrote.

        Raises:
            ValueError: it did not.
        """
        fields = Fields(record)

        def table(name: str) -> dict[str, str]:
            found = fields.object(name)
            return {str(key): Fields(found).text(key) for key in found}

        travel = fields.object("travel")
        return cls(
            parent=fields.text("parent"),
            parent_folder=fields.text("parent_folder"),
            parent_beside=fields.text("parent_beside"),
            shared=table("shared"),
            frozen=fields.texts("frozen"),
            moved_though_frozen=fields.texts("moved_though_frozen"),
            travel={str(name): Fields(travel).number(name) for name in travel},
            preconditioned=fields.texts("preconditioned"),
            optimizers=fields.texts("optimizers"),
            alpha=None if fields.record.get("alpha") is None else fields.number("alpha"),
            converted=table("converted"),
            other_shapes=fields.texts("other_shapes"),
            start=table("start"),
            complete=fields.record.get("complete") is True,
        )
