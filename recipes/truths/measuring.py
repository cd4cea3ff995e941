"""What models say of queries: the loss and the log-odds of every query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recipes.truths.samples import Samples

_QUERIES = 1000  # of a forward pass


@dataclass(frozen=True)
class Truth:
    """What the retrained models say: float64, lower is better in both.

    Args:
        losses: cross-entropy (S, seeds, Q).
        log_odds: −log(p/(1 − p)) of the true class (S, seeds, Q), the measurement of TRAK and LoGra, negated.
    """

    losses: Tensor
    log_odds: Tensor


def measure(model: nn.Module, queries: Samples) -> Truth:
    """What one model, put into eval mode, says of the queries, (Q,) each."""
    model.eval()
    with torch.no_grad():
        parts = [model(queries.inputs_of(part)) for part in torch.split(torch.arange(len(queries)), _QUERIES)]
    return of_logits(torch.cat(parts), queries.labels)


def of_logits(logits: Tensor, labels: Tensor) -> Truth:
    """Loss and log-odds (Q,) of the labels (Q,) under logits (Q, C)."""
    logits, own = logits.double(), labels.unsqueeze(1)
    losses = -logits.log_softmax(1).gather(1, own).squeeze(1)
    others = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return Truth(losses, others - logits.gather(1, own).squeeze(1))  # log((1 − p)/p) without computing 1 − p
