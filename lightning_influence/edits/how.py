"""How an edit is computed: weight decay, linear steps, and the part of the training set that H is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_influence.errors import QueryError
from lightning_influence.objective import PerSample


@dataclass(frozen=True)
class How:
    """How an edit is computed.

    Attributes:
        weight_decay: of the training: the factor of θ in the gradient of the mean loss, for all parameters or by name;
            `None` reads it off the module's optimizers.
        steps: linear steps. With several, each solves anew at the weights that the one before has led to
            (re-linearised); repeating one and the same linear step is `apply(step=...)`.
        hessian_samples: take H over a random part of so many samples (recorded); `None` is all.
        seed: of that part.
        batch_size: samples a batch in products with H; `None` is that of the loader.
        per_sample_loss: (module, batch) -> (N,), where `training_step` does not tell it.
    """

    weight_decay: float | Mapping[str, float] | None = None
    steps: int = 1
    hessian_samples: int | None = None
    seed: int = 0
    batch_size: int | None = None
    per_sample_loss: PerSample | None = None

    def __post_init__(self) -> None:
        for name, least, none in (
            ("steps", 1, False),
            ("hessian_samples", 1, True),
            ("seed", 0, False),
            ("batch_size", 1, True),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (none and value is None):
                raise QueryError(
                    f"{name} must be a whole number",
                    expected=f"{least} or more",
                    found=repr(value),
                    hint=f"leave {name} out for the default",
                )
        if self.per_sample_loss is not None and not callable(self.per_sample_loss):
            raise QueryError(
                "per_sample_loss is no function",
                expected="(module, batch) -> (N,)",
                found=repr(self.per_sample_loss),
                hint="leave it out where training_step tells the loss of one sample",
            )
