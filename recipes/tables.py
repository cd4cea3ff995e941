"""How an experiment begins and ends: its configuration, rows as a table with the command that made it, pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from omegaconf import DictConfig, OmegaConf

Interval: TypeAlias = tuple[float, float, float]  # middle, low, high


def chosen(config: DictConfig) -> Any:
    """The configuration with what `quick` overrides, after one thread was chosen."""
    quiet()
    return OmegaConf.merge(config, config.when_quick) if config.quick else config


def quiet() -> None:
    """One thread, and none of the warnings that a network is not quite at rest: the tables judge that."""
    torch.set_num_threads(1)
    for start in (".*stationary", ".*has not converged", ".*did not converge", ".*IProgress", ".*damp"):
        warnings.filterwarnings("ignore", message=f"(?s){start}")


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown, a column for every name in the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(_shown(row.get(name, "")) for name in names) + " |" for row in rows)])


def write(path: Path, title: str, command: str, parts: Sequence[str]) -> None:
    """Write a result with the command that made it, and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", f"`{command}`", *parts]) + "\n"
    path.write_text(text)
    print(text, flush=True)


def picture(path: Path, panels: Sequence[Callable[[Any], object]], width: float = 4.4, height: float = 3.6) -> None:
    """Draw panels, three beside each other; without matplotlib nothing is drawn."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes[: len(panels)], panels, strict=True):
        panel(axis)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def paired_bars(axis: Any, names: Sequence[str], pairs: Mapping[str, Sequence[Interval]]) -> None:
    """Two bars with their intervals for each name.

    Args:
        pairs: what is measured -> one interval for each name, of two measures.
    """
    for shift, (what, values) in zip((-0.18, 0.18), pairs.items(), strict=True):
        reach = [[middle - low for middle, low, _ in values], [high - middle for middle, _, high in values]]
        places = [place + shift for place in range(len(names))]
        axis.barh(places, [middle for middle, _, _ in values], 0.34, xerr=reach, label=what, error_kw={"lw": 0.7})
    axis.set_yticks(range(len(names)), names, fontsize=6)
    axis.invert_yaxis()
    axis.legend(fontsize=7)


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        value = float(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
