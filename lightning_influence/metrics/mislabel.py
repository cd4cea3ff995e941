"""Mislabel detection: are the samples with a wrong label among those examined first?

Koh & Liang 2017 (1703.04730), section 5.4, and Pruthi et al. 2020, TracIn (2002.08484), section 4.1: order the training
set by self-influence, or by any other score of suspicion, and look how many of the flipped labels come first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_influence.errors import MetricError
from lightning_influence.metrics.checks import Ids, booleans, check_ids, count_of, floats
from lightning_influence.metrics.drawing import FAINT, Curve, curves, named
from lightning_influence.metrics.intervals import with_interval
from lightning_influence.metrics.metric import InfluenceMetric
from lightning_influence.metrics.ranks import auroc, auroc_interval, average_precision, found_among_first

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RecallAt:
    """What is found among the samples examined first.

    Args:
        examined: how many are examined.
        found: how many of the sought are among them; with equal scores the mean over their orders, so a float.
        recall: the share of the sought that is found.
        chance: the share that a random order finds, examined / N.
    """

    examined: int
    found: float
    recall: float
    chance: float


@dataclass(frozen=True)
class MislabelsFound:
    """How well scores of suspicion find wrong labels.

    Args:
        auroc: area under the ROC curve; 0.5 by chance; equal scores count half.
        auroc_low: lower end of its 95% interval (DeLong et al. 1988); nan with fewer than two of a kind.
        auroc_high: its upper end.
        average_precision: Σ (R_t − R_{t−1}) P_t over the distinct scores; about the share of wrong labels by chance.
        at: recall at the numbers asked for.
        share_examined: of the detection curve, k/N for k = 0 … N, (N + 1,).
        share_found: of the wrong labels, (N + 1,), the mean over the orders of equal scores.
    """

    auroc: float
    auroc_low: float
    auroc_high: float
    average_precision: float
    at: tuple[RecallAt, ...]
    share_examined: Tensor
    share_found: Tensor

    @property
    def area(self) -> str:
        """The area under the ROC curve and its interval, as they are printed."""
        return with_interval(self.auroc, self.auroc_low, self.auroc_high)

    def __str__(self) -> str:
        recalls = "".join(f", {one.recall:.1%} in the first {one.examined}" for one in self.at)
        return f"AUROC {self.area}, average precision {self.average_precision:.3f}{recalls}"


def mislabel_detection(
    scores: Tensor,
    mislabeled: Tensor,
    *,
    at: Sequence[int | float] = (0.2,),
    ids: Ids | None = None,
    truth_ids: Ids | None = None,
) -> MislabelsFound:
    """Judge scores of suspicion (N,) by which labels are wrong (N,).

    Equal scores have no order: recall and curve are the means over all orders of them, the area counts them half, and
    the average precision takes them all at once.

    Args:
        scores: higher is more suspicious, as self-influence is.
        mislabeled: whether the label is wrong.
        at: how many are examined first; an int is a number of samples, a float a share of them.
        ids: of the scores' samples; compared with `truth_ids` where both are given.
        truth_ids: of the samples whose labels are known to be wrong or right.

    Raises:
        MetricError: shapes or ids that differ, no booleans, NaN, none or all mislabeled, k out of range.

    >>> found = mislabel_detection(torch.tensor([9.0, 1.0, 5.0, 2.0]), torch.tensor([True, False, False, True]), at=[1])
    >>> found.auroc, found.at
    (0.75, (RecallAt(examined=1, found=1.0, recall=0.5, chance=0.25),))
    """
    check_ids(ids, truth_ids)
    scores = floats(scores, "scores", "(N,)")
    mislabeled = booleans(mislabeled, "labels' being wrong", tuple(scores.shape)).to(scores.device)
    count, sought = len(scores), int(mislabeled.sum())
    if sought in (0, count):
        raise MetricError(
            "there is nothing to tell apart",
            expected="some wrong labels and some right ones",
            found=f"{sought} of {count} mislabeled",
            hint="pass labels != true_labels of the whole training set",
        )
    found = found_among_first(scores.unsqueeze(0), mislabeled.unsqueeze(0))[0].cpu()  # (N + 1,)
    recalls = []
    for k in at:
        examined = count_of(k, count)
        recalls.append(RecallAt(examined, float(found[examined]), float(found[examined]) / sought, examined / count))
    return MislabelsFound(
        auroc(scores, mislabeled),
        *auroc_interval(scores, mislabeled),
        average_precision(scores, mislabeled),
        tuple(recalls),
        torch.arange(count + 1, dtype=torch.float64) / count,
        found / sought,
    )


class MislabelDetection(InfluenceMetric):
    """`mislabel_detection` over batches of training samples, on one process or several.

    Args:
        at: how many are examined first; an int is a number of samples, a float a share of them.
        kwargs: of `torchmetrics.Metric`.

    >>> metric = MislabelDetection(at=[0.5])
    >>> metric.update(torch.tensor([9.0, 1.0]), torch.tensor([True, False]))
    >>> metric.update(torch.tensor([5.0, 2.0]), torch.tensor([False, True]))
    >>> print(metric.compute())
    AUROC 0.750 [0.057, 1.000], average precision 0.833, 50.0% in the first 2
    """

    higher_is_better = True

    def __init__(self, *, at: Sequence[int | float] = (0.2,), **kwargs: Any) -> None:
        super().__init__(("scores", "mislabeled"), **kwargs)
        self.at = tuple(at)

    def update(
        self, scores: Tensor, mislabeled: Tensor, *, ids: Ids | None = None, truth_ids: Ids | None = None
    ) -> None:
        """Add training samples: their scores (N,) and whether their labels are wrong (N,)."""
        check_ids(ids, truth_ids)
        scores = floats(scores, "scores", "(N,)")
        wrong = booleans(mislabeled, "labels' being wrong", tuple(scores.shape)).double()
        self._keep("scores", scores)
        self._keep("mislabeled", wrong)

    def compute(self) -> MislabelsFound:
        """What is found among all samples of all processes."""
        return mislabel_detection(self._kept("scores"), self._kept("mislabeled") > 0, at=self.at)

    def plot(
        self, val: MislabelsFound | Mapping[str, MislabelsFound] | None = None, ax: Axes | None = None
    ) -> tuple[Figure, Axes]:
        """The detection curve of one score or of several by name, and that of a random order."""
        found = named(self.compute() if val is None else val, "scores")
        drawn = {name: [Curve(one.share_examined.tolist(), one.share_found.tolist())] for name, one in found.items()}
        figure, ax = curves(drawn, ax, "share of the training set examined", "share of the wrong labels found")
        ax.plot([0, 1], [0, 1], color=FAINT, linestyle="--", label="random order")
        ax.legend(frameon=False, loc="lower right")
        return figure, ax
