"""Scores of one training batch: every gradient meets the queries inside the hook that brings it, and is dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_influence.estimators.estimator import restricted
from lightning_influence.gradients import GradientBlock, GradientCapture, LowRankGradients, Selection, inner
from lightning_influence.objective import Objective
from lightning_influence.replay import autocast, loss_scale
from lightning_influence.streaming.prepared import Part


def batch_scores(
    module: LightningModule,
    selection: Selection,
    part: Part,
    num_samples: int,
    objective: Callable[[], Objective],
    trainer: Trainer | None,
) -> Tensor:
    """(Q, B), from one forward and backward pass at the module's present weights.

    Blocks are contracted as they arrive where all terms are linear in them; else (`TracInWE(top_words=...)`) they are
    collected first. Where the Trainer has a gradient scaler, the backward pass is scaled, and again with less if it
    overflows.
    """
    scale = loss_scale(trainer)
    in_hook = all(term.linear for term in part.terms)
    held = [block for term in part.terms for block in term.queries.values()]
    thin = any(isinstance(block, LowRankGradients) or block.dtype == torch.bfloat16 for block in held)
    while True:
        scores = _Scores(part)
        capture = GradientCapture(selection, factored=thin, consumer=scores.add if in_hook else None)
        with capture:
            capture.begin(num_samples)
            with autocast(trainer):
                found = objective()
            capture.backward(found.total if scale == 1 else found.total * scale)
            gradients = capture.collect(require_finite=False)
        factors = (found.scale / scale).to(torch.float64)
        if in_hook:
            total = scores.total * factors.to(scores.total)
        else:
            own = {name: block.scaled(factors) for name, block in gradients.items()}
            total = torch.stack(
                [inner(t.train_transform(restricted(own, t.parameters)), t.queries) for t in part.terms]
            ).sum(0)
        if scale == 1 or bool(torch.isfinite(total).all()):
            return total
        scale = max(1.0, scale / 16)


class _Scores:
    """A sum of products over the parameters, in units of the batch's loss."""

    def __init__(self, part: Part) -> None:
        self._queries = [term.queries for term in part.terms]
        self._total: Tensor | None = None

    def add(self, name: str, block: GradientBlock) -> None:
        """Contract one block with all queries."""
        for queries in self._queries:
            if name in queries:
                product = block.inner(queries[name])
                self._total = product if self._total is None else self._total + product

    @property
    def total(self) -> Tensor:
        """(Q, B)."""
        assert self._total is not None  # the selection is what the queries name
        return self._total
