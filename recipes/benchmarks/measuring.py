"""How the benchmarks measure: CPU seconds, interleaved variants, ratios within a round, and a table of results."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_influence import CurvatureSnapshot, GradientSnapshot

Row = Mapping[str, str | float | int]


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished children (the workers of a loader) since they started."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(work: Callable[[], object]) -> float:
    """CPU seconds that a piece of work takes."""
    start = cpu_seconds()
    work()
    return cpu_seconds() - start


class Clocked:
    """Mixed into a callback: it counts the CPU seconds of all its hooks.

    >>> class Waiting(Clocked):
    ...     def on_fit_end(self):
    ...         return sum(range(10**6))
    >>> callback = Waiting()
    >>> callback.on_fit_end() > 0 and callback.seconds > 0
    True
    """

    seconds = 0.0
    _within = False

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name not in ("setup", "teardown") and not name.startswith("on_"):
            return value

        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self._within:  # a hook that calls another one
                return value(*args, **kwargs)
            self._within, start = True, cpu_seconds()
            try:
                return value(*args, **kwargs)
            finally:
                self._within = False
                self.seconds += cpu_seconds() - start

        return clocked


class ClockedGradients(Clocked, GradientSnapshot):
    """The callback, with the CPU seconds of its hooks."""


class ClockedCurvature(Clocked, CurvatureSnapshot):
    """The callback, with the CPU seconds of its hooks."""


@dataclass(frozen=True)
class Rounds:
    """CPU seconds of every variant in every round."""

    seconds: Mapping[str, Sequence[float]]

    def row(self, name: str, to: str, **extra: str | float) -> Row:
        """A line of the table: the median of the ratios to another variant of the same round, and their range."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)]
        return {
            "what": name,
            "CPU s": round(statistics.median(self.seconds[name]), 4),
            "ratio": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
            **extra,
        }


def interleaved(variants: Mapping[str, Callable[[], float]], rounds: int) -> Rounds:
    """Run every variant once a round, in turn, beginning with another one each time; each says its own CPU seconds.

    A machine that grows slower for a while does so for all variants of a round, so that ratios within a round hold
    where seconds do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(variants[name]())
        print(f"round {turn + 1}: " + ", ".join(f"{n} {s[-1]:.3f} s" for n, s in seconds.items()), flush=True)
    return Rounds(seconds)


def report(title: str, rows: Sequence[Row], out: Path | None, **settings: Any) -> None:
    """Print the results as a table; write them to `out` as JSON, or as markdown where its name ends in `.md`."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in cells)
    where = f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {_processor()}"
    print(f"\n{title} ({where})\n{table}", flush=True)
    if out is None:
        return
    if out.suffix == ".md":
        listed = ", ".join(f"{key} {value}" for key, value in settings.items())
        out.write_text(f"### {title}\n\n{where}; {listed}\n\n{table}\n")
    else:
        found = {"title": title, "where": where, "settings": settings, "rows": rows}
        out.write_text(json.dumps(found, indent=1) + "\n")


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
