"""Damping: the λ that is added to every eigenvalue of a curvature before it is inverted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_influence.errors import CurvatureError


class Damping(ABC):
    """A rule that says λ of one block of a curvature."""

    @abstractmethod
    def of(self, mean_eigenvalue: float) -> float:
        """λ of a block whose eigenvalues have this mean."""

    @abstractmethod
    def times(self, factor: float) -> Damping:
        """The rule with a λ that many times as large."""

    def record(self) -> dict[str, float]:
        """The rule as plain JSON: `{"relative": factor}` or `{"absolute": value}`."""
        return {type(self).__name__.lower(): next(iter(vars(self).values()))}

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Damping:
        """The rule that `record` wrote."""
        return Relative(float(record["relative"])) if "relative" in record else Absolute(float(record["absolute"]))


@dataclass(frozen=True)
class Relative(Damping):
    """λ = factor · mean(Λ), block by block (Grosse et al. 2023, 2308.03296, section 3.2, take a tenth)."""

    factor: float = 0.1

    def __post_init__(self) -> None:
        _refuse_negative("the factor of a relative damping", self.factor)

    def of(self, mean_eigenvalue: float) -> float:
        """`factor` times the mean.

        Raises:
            CurvatureError: a negative mean, as of an indefinite Hessian: λ would make it less positive.
        """
        if not mean_eigenvalue >= 0:
            raise CurvatureError(
                "a damping relative to the mean eigenvalue has no meaning here",
                expected="a mean eigenvalue of 0 or more",
                found=f"{mean_eigenvalue:.3g}: the Hessian is indefinite",
                hint='pass an absolute damping, for example damping=1e-3, or take matrix="ggn"',
            )
        return self.factor * mean_eigenvalue

    def times(self, factor: float) -> Relative:
        """With another factor."""
        return Relative(self.factor * factor)


@dataclass(frozen=True)
class Absolute(Damping):
    """The same λ for every block, in units of the Hessian of the mean loss."""

    value: float

    def __post_init__(self) -> None:
        _refuse_negative("a damping", self.value)

    def of(self, mean_eigenvalue: float) -> float:
        """`value`, whatever the mean."""
        return self.value

    def times(self, factor: float) -> Absolute:
        """With another value."""
        return Absolute(self.value * factor)


DampingLike: TypeAlias = Damping | float | None


def as_damping(damping: DampingLike) -> Damping:
    """A number is absolute, `None` is a tenth of the mean eigenvalue of each block."""
    if damping is None:
        return Relative()
    if isinstance(damping, Damping):
        return damping
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise CurvatureError(
            "this is no damping",
            expected="a number, Relative(factor), Absolute(value) or None",
            found=repr(damping),
            hint="pass for example damping=1e-3, or damping=Relative(0.1)",
        )
    return Absolute(float(damping))


def _refuse_negative(what: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise CurvatureError(
            f"{what} cannot be negative",
            expected="a finite number, 0 or more",
            found=value,
            hint="damping makes a curvature more positive: pass a positive number, or None for the default",
        )
