"""What a comparison of layers comes out with: scores with their verdicts, a table to read, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_influence.metrics import MislabelsFound, QueryMean
from lightning_influence.metrics.drawing import COLOURS, FAINT, axes
from lightning_influence.metrics.intervals import with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class JudgedScores:
    """Scores and what is known of them; verdicts are `None` where there was nothing to judge by.

    Attributes:
        name: whose scores these are.
        scores: (Q, N), positive for proponents; sums of inner products, or of ranks and votes.
        self_influence: (N,), of every training sample for its own loss.
        found_by_self: how well high self-influence finds the flagged samples.
        found_as_opponents: how well a low mean score over the queries finds them; of votes, those for the
            last k, which samples of large gradients get whatever their sign is on the mean.
        removals: rank correlation of the scores' sums with the true changes of m, per query, over removed parts.
        deletion: true change of each query's m when the samples with the highest mean scores over the queries are
            removed, as many as a random part has; it should be well above that of random parts.
    """

    name: str
    scores: Tensor
    self_influence: Tensor | None = None
    found_by_self: MislabelsFound | None = None
    found_as_opponents: MislabelsFound | None = None
    removals: QueryMean | None = None
    deletion: QueryMean | None = None


@dataclass(frozen=True, kw_only=True)
class LayerResult(JudgedScores):
    """Scores from the gradients of one layer.

    Attributes:
        parameters: full names of those whose gradients took part.
        size: how many numbers they have.
        cancellations: (C,), at each checkpoint (in flight: over the records up to the next one)
            Σ_p Σ_i |∂ℓ_i/∂p| / Σ_p |Σ_i ∂ℓ_i/∂p| over the training samples i and the entries p of the layer; 1 where
            all samples pull the same way (Yeh et al. 2022, 2202.11844).
    """

    parameters: tuple[str, ...]
    size: int
    cancellations: Tensor

    @property
    def cancellation(self) -> float:
        """The mean of the ratio over the checkpoints."""
        return float(self.cancellations.mean())


@dataclass(frozen=True)
class ShortTrainings:
    """Short trainings that a comparison made.

    Attributes:
        count: random parts of the training set that were removed.
        size: samples in each.
        steps: optimizer steps of each training.
        changes: (count,), change of m after each removal, the mean over the queries.
    """

    count: int
    size: int
    steps: int
    changes: Tensor


@dataclass(frozen=True)
class LayerComparison:
    """What `compare_layers` found.

    Attributes:
        layers: one result a layer, in the order of the model or as they were named.
        whole: the estimator's own scores, of all its parameters.
        by_rank: mean over the layers of each sample's rank among the N, N for the highest.
        by_vote: number of layers in which a sample is among the first k, plus its mean rank over N + 1.
        missing: layers without gradients in the store, or in the estimator.
        k: samples that each layer votes for.
        flagged: how many samples were flagged; `None` without flags.
        trained: what was trained to judge removals; `None` if nothing was.
    """

    layers: tuple[LayerResult, ...]
    whole: JudgedScores
    by_rank: JudgedScores
    by_vote: JudgedScores
    missing: tuple[str, ...]
    k: int
    flagged: int | None = None
    trained: ShortTrainings | None = None

    def __getitem__(self, name: str) -> LayerResult:
        """The result of a layer by its name."""
        return {layer.name: layer for layer in self.layers}[name]

    def __iter__(self) -> Iterator[JudgedScores]:
        """All that was judged: the layers, the whole, and what was aggregated."""
        return iter((*self.layers, self.whole, self.by_rank, self.by_vote))

    def __str__(self) -> str:
        """A Markdown table with a row for each layer and aggregate, and what the columns are."""
        return "\n".join([*_table(self._rows()), "", *self._notes()])

    def _rows(self) -> list[list[str]]:
        heads = ["layer", "parameters", "cancellation"]
        by_self, opponents = self.whole.found_by_self is not None, self.whole.found_as_opponents is not None
        heads += ["AUC by self-influence"] * by_self + ["AUC as opponents"] * opponents
        heads += ["removals"] * (self.whole.removals is not None) + ["m after deletion"] * (self.trained is not None)
        rows = [heads]
        for one in self:
            row = [one.name]
            row += [f"{one.size:,}", f"{one.cancellation:.1f}"] if isinstance(one, LayerResult) else ["", ""]
            for found in (one.found_by_self, one.found_as_opponents):
                row += [] if found is None else [found.area]
            if one.removals is not None:
                row.append(with_interval(one.removals.mean, one.removals.low, one.removals.high, 2))
            row += [] if one.deletion is None else [f"{one.deletion.mean:+.4f}"]
            rows.append(row)
        return rows

    def _notes(self) -> list[str]:
        queries, samples = self.whole.scores.shape
        checkpoints = len(self.layers[0].cancellations)
        notes = [
            f"{queries} queries, {samples} training samples. Cancellation: the mean of {checkpoints} checkpoints. "
            f"Votes are for the first {self.k}."
        ]
        if self.flagged is not None:
            notes.append(
                f"AUC: {self.flagged} flagged samples among all, 0.5 by chance; by high self-influence, and by a low "
                "mean score over the queries; in brackets the 95% interval over the samples."
            )
        if self.whole.removals is not None:
            notes.append(
                "Removals: rank correlation, the mean over the queries, of the summed scores of a removed part with "
                "the change of m; in brackets the 95% interval over the removed parts."
            )
        if self.trained is not None:
            t = self.trained
            notes.append(
                f"Removed were {t.count} random parts of {t.size} samples, and copies of the model trained on without "
                f"them for {t.steps} steps. Deletion: mean change of m without the {t.size} samples of the highest "
                f"mean scores; of the random parts {t.changes.mean():+.4f}, from {t.changes.min():+.4f} to "
                f"{t.changes.max():+.4f}."
            )
        if self.missing:
            notes.append(f"Not compared, since their gradients are not there: {', '.join(self.missing)}.")
        return notes

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """The verdicts of every layer and aggregate as points; behind them, on an axis of their own at the right, the
        layers' cancellation ratios as bars.

        Raises:
            UnsupportedError: matplotlib is not installed.
        """
        figure, ax = axes(ax)
        names, places = [one.name for one in self], list(range(len(self.layers) + 3))
        behind = ax.twinx()
        ratios = [layer.cancellation if isfinite(layer.cancellation) else 0.0 for layer in self.layers]
        behind.bar(places[: len(ratios)], ratios, color="#e5e5e5", width=0.6)
        behind.set_ylabel("cancellation ratio (bars)", color=FAINT)
        behind.tick_params(colors=FAINT, which="both")
        ax.set_zorder(behind.get_zorder() + 1)
        ax.patch.set_visible(False)
        drawn = 0
        for label, marker, colour, values in (
            ("AUC by self-influence", "o", COLOURS[0], [one.found_by_self for one in self]),
            ("AUC as opponents", "s", COLOURS[1], [one.found_as_opponents for one in self]),
        ):
            told = [(f.auroc, f.auroc_low, f.auroc_high) for f in values if f is not None]
            if told:
                _points(ax, places, told, marker, colour, label)
                drawn += 1
        correlations = [one.removals for one in self if one.removals is not None]
        if correlations:
            told = [(f.mean, f.low, f.high) for f in correlations]
            _points(ax, places, told, "D", COLOURS[2], "correlation of removals")
            drawn += 1
        if drawn:
            for level in [0.5] * (self.flagged is not None) + [0.0] * bool(correlations):
                ax.axhline(level, color=FAINT, linestyle="--", linewidth=0.8)  # by chance
            ax.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=drawn)
        else:
            ax.set_yticks([])
        ax.set_xticks(places, names, rotation=30, ha="right", fontsize=8)
        return figure, ax


def _points(
    ax: Axes, places: Sequence[int], told: Sequence[tuple[float, float, float]], marker: str, colour: str, label: str
) -> None:
    """Values with their intervals."""
    values, reach = [value for value, *_ in told], [[v - low for v, low, _ in told], [high - v for v, _, high in told]]
    ax.errorbar(places, values, reach, fmt=marker, color=colour, capsize=2, label=label)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown with columns of one width, the first to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(
        1, "|" + "|".join("-" * (w + 2) if not place else "-" * (w + 1) + ":" for place, w in enumerate(widths)) + "|"
    )
    return lines
