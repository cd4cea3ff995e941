"""What really happens to the queries when samples are removed, and how well scores foretell it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import QueryError
from lightning_influence.metrics import QueryMean, query_mean, spearman

_FEWEST = 4  # removals, of which a correlation is taken


@dataclass(frozen=True)
class RemovalTruth:
    """How the queries' measurements changed when parts of the training set were removed and a model was trained.

    Attributes:
        parts: the sample ids that each removal took away, (k,) int64.
        changes: (S, Q), m after training without the part less m after training with all: positive if m rose.
    """

    parts: Sequence[Tensor]
    changes: Tensor

    def check(self, num_queries: int, num_samples: int) -> None:
        """Refuse a truth that is not about these queries and samples.

        Raises:
            QueryError: too few removals, changes of another shape, ids that are no training samples.
        """
        if len(self.parts) < _FEWEST or tuple(self.changes.shape) != (len(self.parts), num_queries):
            raise QueryError(
                "these changes do not belong to the removals and queries",
                expected=f"at least {_FEWEST} removals S, and changes (S, {num_queries})",
                found=f"{len(self.parts)} removals, and changes {tuple(self.changes.shape)}",
                hint="one row for each removed part, one column for each query",
            )
        if not bool(self.changes.isfinite().all()):
            raise QueryError(
                "the changes of a removal are not finite",
                expected="the change of every query's measurement, finite numbers",
                found="NaN or infinity",
                hint="a training that diverged says nothing of its removal: leave it out",
            )
        ids = torch.cat([torch.as_tensor(part) for part in self.parts])
        if ids.is_floating_point() or not bool(((ids >= 0) & (ids < num_samples)).all()):
            raise QueryError(
                "a removal names what is no training sample",
                expected=f"ids from 0 to {num_samples - 1}",
                found=f"{ids.min()} to {ids.max()} of {ids.dtype}",
                hint="sample ids are positions in the training set",
            )

    def agreement(self, scores: Tensor) -> QueryMean:
        """Rank correlation over the removals between the summed scores of each part and the true change of m: of each
        query (Q,), and the mean over them.

        The 95% interval is over the removals, which all queries share, for the queries as they are: the jackknife,
        value ± t · sqrt((S − 1)/S · Σ_s (value without removal s − their mean)²).

        Args:
            scores: (Q, N), positive for proponents.
        """
        foretold = torch.stack([scores[:, part].double().sum(1) for part in self.parts])  # (S, Q)
        changes, count = self.changes.double().cpu(), len(self.parts)
        found = query_mean(spearman(foretold, changes), resamples=1)
        without = []
        for left_out in range(count):
            kept = [s for s in range(count) if s != left_out]
            without.append(float(spearman(foretold[kept], changes[kept]).nanmean()))
        spread = torch.tensor(without, dtype=torch.float64)
        error = math.sqrt((count - 1) / count * float((spread - spread.mean()).square().sum()))
        reach = error * _student(count - 1)
        if math.isnan(reach):
            return QueryMean(found.per_query, found.mean, math.nan, math.nan)
        return QueryMean(found.per_query, found.mean, max(-1.0, found.mean - reach), min(1.0, found.mean + reach))


def _student(degrees: int) -> float:
    """About the 97.5% quantile of Student's t: the first two terms of its expansion around the normal one's, z."""
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
