"""The rows of a comparison as a table and as a picture: mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_COLOURS = {"GIF": "#1b7837", "FIF": "#762a83", "PIF": "#e08214", "IF": "#555555", "SIF": "#999999"}


@dataclass(frozen=True)
class Row:
    """What one model came out with.

    Args:
        method: its name.
        share: part of the parameters that it changes; None for models that were trained.
        seed: of the model.
        values: what was measured on the test images.
        step: what the line search on the validation images chose.
        seconds: of the solve.
        left: part of the gradient that the linear model leaves over, where there is one linear step and it is known.
    """

    method: str
    share: float | None
    seed: int
    values: Mapping[str, float]
    step: float | None = None
    seconds: float | None = None
    left: float | None = None


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float | None], list[Row]]:
    """Rows by method and share, in the order in which they first appear."""
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.method, row.share), []).append(row)
    return groups


def table(rows: Sequence[Row], percent: Sequence[str]) -> str:
    """Markdown: a line a method, mean ± standard deviation over the seeds; the measures `percent` in per cent."""
    names = list(rows[0].values)
    heads = ["method", "parameters", *names, "gradient left", "step", "solve, s"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for (method, share), members in grouped(rows).items():
        cells = [method, "" if share is None else f"{share:.0%}"]
        cells += [_spread([row.values[name] for row in members], 100 if name in percent else 1) for name in names]
        for values, digits in (
            ([row.left for row in members], 3),
            ([row.step for row in members], 2),
            ([row.seconds for row in members], 0),
        ):
            told = [value for value in values if value is not None]
            cells.append(f"{statistics.mean(told):.{digits}f}" if told else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(
    path: Path, title: str, command: str, remarks: Sequence[str], rows: Sequence[Row], percent: Sequence[str]
) -> None:
    """Write a result with the command that made it."""
    seeds = sorted({row.seed for row in rows})
    told = [*remarks, "", f"Seeds: {', '.join(map(str, seeds))}."]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([f"# {title}", "", f"`{command}`", "", *told, "", table(rows, percent), ""]))


def plot(rows: Sequence[Row], measures: Sequence[str], path: Path) -> None:
    """A panel a measure: it by the share of the parameters, a line a method, trained models as level lines.

    Without matplotlib nothing is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(4.2 * len(measures), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for (method, share), members in grouped(rows).items():
            values = [row.values[measure] for row in members]
            middle, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            if share is None:
                style = "--" if method == "retrained" else ":"
                axis.axhline(middle, color="black", linestyle=style, linewidth=1, label=method)
            else:
                lines.setdefault(method, []).append((share, middle, spread))
        for method, points in lines.items():
            x, y, spread_of = zip(*sorted(points), strict=True)
            axis.errorbar(
                x, y, spread_of, marker="o", markersize=4, capsize=2, label=method, color=_COLOURS.get(method)
            )
        axis.set_xscale("log")
        shares = sorted({share for _, share in grouped(rows) if share is not None})
        axis.set_xticks(shares, [f"{share:.0%}" for share in shares])
        axis.minorticks_off()
        axis.set_xlabel("parameters that may change")
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def _spread(values: Sequence[float], factor: float) -> str:
    digits = 2 if factor == 100 else 4
    middle = f"{factor * statistics.mean(values):.{digits}f}"
    return middle if len(values) < 2 else f"{middle} ± {factor * statistics.stdev(values):.{digits}f}"
