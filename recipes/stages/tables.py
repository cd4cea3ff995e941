"""Rows of any kind as a table with the command that made it, and pictures of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from recipes.stages.data import Tasks
from recipes.stages.methods import quiet
from recipes.truths.retraining import Samples


def chosen(config: DictConfig) -> Any:
    """The configuration with what `quick` overrides, after one thread was chosen."""
    quiet()
    return OmegaConf.merge(config, config.when_quick) if config.quick else config


def tasks_of(config: Any) -> Tasks:
    """The two tasks of a configuration."""
    made: Tasks = instantiate(config.tasks, images=instantiate(config.images))
    return made


def part(samples: Samples, positions: Any) -> Samples:
    """Some of the samples, by a slice, a mask or positions."""
    return Samples(samples.inputs[positions].contiguous(), samples.labels[positions].contiguous())


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


def picture(path: Path, panels: Sequence[Callable[[Any], None]], width: float = 4.4, height: float = 3.6) -> None:
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


def _shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        value = float(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
