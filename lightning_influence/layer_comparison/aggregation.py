"""One ranking from those of several layers: by mean rank, or by the layers' votes (after 2511.04715)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_influence.metrics.ranks import mean_ranks


def rank_scores(scores: Tensor) -> Tensor:
    """The mean over the layers of each sample's rank, (Q, N) from (L, Q, N): N for a sample that is first everywhere.

    Equal scores share their mean rank. Layers of large and of small gradients count alike.

    >>> rank_scores(torch.tensor([[[0.1, 0.3, 0.2]], [[9.0, 8.0, 7.0]]]))
    tensor([[2.0000, 2.5000, 1.5000]], dtype=torch.float64)
    """
    return torch.stack([mean_ranks(layer) for layer in scores]).mean(0)


def vote_scores(scores: Tensor, k: int) -> Tensor:
    """In how many layers each sample is among the first k, plus its mean rank over N + 1, which decides between
    samples of as many votes: (Q, N) from (L, Q, N). Equal scores of a layer go in dataset order.

    >>> vote_scores(torch.tensor([[[0.1, 0.3, 0.2]], [[9.0, 8.0, 7.0]]]), 2)
    tensor([[1.5000, 2.6250, 1.3750]], dtype=torch.float64)
    """
    first = scores.argsort(dim=2, descending=True, stable=True)[:, :, :k]
    votes = torch.zeros(scores.shape, dtype=torch.float64).scatter_(2, first, 1.0).sum(0)
    return votes + rank_scores(scores) / (scores.shape[2] + 1)
