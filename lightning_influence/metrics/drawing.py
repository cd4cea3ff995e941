"""How metrics are drawn: curves with bands, and values with their intervals, for one method or several (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from lightning_influence.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_influence.metrics.intervals import QueryMean

COLOURS = ("#1b7837", "#b2182b", "#2166ac", "#8c6d31", "#762a83", "#4d4d4d")
FAINT = "#767676"


@dataclass(frozen=True)
class Curve:
    """A line with the band around it; without `low` and `high` there is no band.

    Args:
        x: (K,).
        y: (K,).
        low: (K,).
        high: (K,).
        style: of matplotlib's lines.
    """

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: str = "-"


def axes(ax: Axes | None) -> tuple[Figure, Axes]:
    """The axes given with their figure, or new ones.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    if ax is not None:
        figure: Any = ax.figure
        return figure, ax
    new: tuple[Figure, Axes] = pyplot().subplots(figsize=(5.4, 3.6), layout="constrained")
    return new


def pyplot() -> Any:
    """matplotlib's pyplot, imported when something is drawn.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot as drawn_by
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            "pictures need matplotlib",
            expected="the extra [plot]",
            found=str(error),
            hint='pip install "lightning-influence[plot]"',
        ) from error
    return drawn_by


def named(results: Any, name: str) -> dict[str, Any]:
    """One result by the name of its metric, or several by their own names."""
    return dict(results) if isinstance(results, Mapping) else {name: results}


def curves(drawn: Mapping[str, Sequence[Curve]], ax: Axes | None, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Lines with bands, those of one method in one colour; only the first of each method is in the legend."""
    figure, ax = axes(ax)
    for (name, lines), colour in zip(drawn.items(), cycle(COLOURS), strict=False):
        for number, line in enumerate(lines):
            ax.plot(line.x, line.y, line.style, color=colour, label=None if number else name)
            if line.low is not None and line.high is not None:
                ax.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    return figure, ax


def intervals(found: Mapping[str, QueryMean], ax: Axes | None, ylabel: str) -> tuple[Figure, Axes]:
    """A dot with its interval for each name."""
    figure, ax = axes(ax)
    for place, (one, colour) in enumerate(zip(found.values(), cycle(COLOURS), strict=False)):
        ax.plot([place, place], [one.low, one.high], color=colour)
        ax.plot([place], [one.mean], "o", color=colour)
    ax.set_xticks(range(len(found)), list(found))
    ax.set_xlim(-0.5, len(found) - 0.5)
    ax.set_ylabel(ylabel)
    return figure, ax
