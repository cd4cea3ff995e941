"""Ranks and correlations in float64, with ties at their mean rank and nan where a correlation is undefined."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from lightning_influence.metrics.intervals import NORMAL


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlations (Q,) of the columns of two matrices (S, Q), ties at their mean rank; nan where undefined.

    torchmetrics' `spearman_corrcoef` adds 1e-6 to the denominator and ranks in float32: it calls the correlation with
    a constant 0, which is undefined, and that of three equal ranks 0.9999985. Elsewhere the two agree.

    >>> spearman(torch.tensor([[1.0, 2.0], [5.0, 2.0], [6.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 2.0], [9.0, 3.0]]))
    tensor([1., nan], dtype=torch.float64)
    """
    return pearson(_columns(a), _columns(b))


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlations (Q,) of the columns of two matrices (S, Q); nan where a column is constant or has a nan.

    >>> pearson(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[-2.0], [-4.0], [-8.0]]))
    tensor([-1.], dtype=torch.float64)
    """
    a, b = a.double(), b.double()
    constant = (a == a[:1]).all(0) | (b == b[:1]).all(0)  # their rounded mean may differ from them all
    a, b = ((side - side.mean(0)) for side in (a, b))
    a, b = (side / side.abs().amax(0).clamp_min(torch.finfo(side.dtype).tiny) for side in (a, b))
    scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
    found = ((a * b).sum(0) / scale).clamp(-1, 1)
    return found.masked_fill(constant, torch.nan)


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, smallest first, within each row (Q, N), equal values at their mean rank; a row with a nan is nan.

    >>> mean_ranks(torch.tensor([[0.3, 0.1, 0.3]]))
    tensor([[2.5000, 1.0000, 2.5000]], dtype=torch.float64)
    """
    values = values.contiguous()
    ascending = values.sort(dim=1).values
    below = torch.searchsorted(ascending, values)
    upto = torch.searchsorted(ascending, values, right=True)
    ranks = (below + upto + 1).double() / 2
    return ranks.masked_fill(values.isnan().any(1, keepdim=True), torch.nan)


def found_among_first(scores: Tensor, sought: Tensor) -> Tensor:
    """How many of the sought (Q, N) are among the first k by score, highest first: (Q, N + 1) for k = 0 … N.

    Equal scores have no order: what is counted is the mean over all orders of them. Of a group of g equal scores with
    p sought, each place in the group counts p/g.

    >>> found_among_first(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([[False, True, False]]))
    tensor([[0.0000, 0.0000, 0.5000, 1.0000]], dtype=torch.float64)
    """
    ordered, order = scores.sort(dim=1, descending=True)
    hits = sought.double().gather(1, order).cumsum(1)
    hits = torch.cat([hits.new_zeros(len(hits), 1), hits], 1)  # (Q, N + 1)
    ascending = (-ordered).contiguous()
    first = torch.searchsorted(ascending, ascending)  # where the group of each place begins
    after = torch.searchsorted(ascending, ascending, right=True)  # and ends
    before, upto = hits.gather(1, first), hits.gather(1, after)
    place = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    expected = before + (upto - before) * (place - first) / (after - first)
    return torch.cat([hits[:, :1], expected], 1)


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve of scores (N,) for truths (N,), equal scores counted half; nan if all are of one kind.

    >>> auroc(torch.tensor([900.0, 800.0, 100.0]), torch.tensor([True, False, False]))
    1.0
    """
    if not _both(positive):
        return torch.nan
    return float(binary_auroc(_as_probabilities(scores), positive.long(), validate_args=False))


def auroc_interval(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """The 95% interval of `auroc` over the drawing of samples: DeLong et al. 1988 (Biometrics 44), equal scores half.

    A positive's place is the share of the negatives that it is above, a negative's that of the positives above it. Both
    have the area as their mean, and the area's variance is var(places) / count, added over the two kinds. Nan with
    fewer than two of a kind; no width where the area is 0 or 1.

    >>> scores, positive = torch.tensor([5.0, 3.0, 4.0, 1.0]), torch.tensor([True, True, False, False])
    >>> tuple(round(end, 3) for end in auroc_interval(scores, positive))
    (0.057, 1.0)
    """
    kinds = scores[positive], scores[~positive]
    if min(len(kind) for kind in kinds) < 2:
        return torch.nan, torch.nan
    ranks = mean_ranks(scores.unsqueeze(0))[0]
    within = [mean_ranks(kind.unsqueeze(0))[0] for kind in kinds]
    above = (ranks[positive] - within[0]) / len(kinds[1])
    below = 1 - (ranks[~positive] - within[1]) / len(kinds[0])
    half = NORMAL * sum(float(places.var()) / len(places) for places in (above, below)) ** 0.5
    area = float(above.mean())
    return max(0.0, area - half), min(1.0, area + half)


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Σ (R_t − R_{t−1}) P_t over the distinct scores t, of scores (N,) for truths (N,); nan if all are of one kind.

    >>> average_precision(torch.tensor([900.0, 800.0, 100.0]), torch.tensor([False, True, False]))
    0.5
    """
    if not _both(positive):
        return torch.nan
    return float(binary_average_precision(_as_probabilities(scores), positive.long(), validate_args=False))


def _as_probabilities(scores: Tensor) -> Tensor:
    """The same order within (0, 1): torchmetrics puts other scores through a sigmoid, which makes large ones equal."""
    return mean_ranks(scores.unsqueeze(0))[0] / (len(scores) + 1)


def _both(positive: Tensor) -> bool:
    return bool(positive.any()) and not bool(positive.all())


def _columns(values: Tensor) -> Tensor:
    return mean_ranks(values.t()).t()
