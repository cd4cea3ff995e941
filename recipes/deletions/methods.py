"""Every way that names training texts as reasons of a prediction: TracIn-WE and relatives, and the baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_influence import (
    BM25,
    EmbeddingCosine,
    InfluenceFunction,
    Random,
    TfIdf,
    TracIn,
    TracInLast,
    TracInWE,
)
from recipes.deletions.fitting import Explained

Scorer = Callable[[Explained, int], Tensor]  # a fit and how many of its questions -> scores (Q, N)
SHARED_RANKINGS = 8  # of "random": its rankings know nothing of the query, so queries may share them


@dataclass(frozen=True)
class Method:
    """A line of the tables.

    Args:
        name: of the method.
        scores: of the first questions of a fit.
        everywhere: asked at every point and seed, from the store of the first and the last layer; else at fewer.
    """

    name: str
    scores: Scorer
    everywhere: bool = False


def methods(frequent: int = 50) -> list[Method]:
    """All methods.

    Args:
        frequent: words that “no common words” leaves out, the most frequent ones and the special ones.
    """
    common = range(3 + frequent)  # words are numbered by their frequency, after the special ones
    uncommon = partial(TracInWE, exclude_tokens=common, unmatched="zeros")
    return [
        Method("TracIn-WE", _asked("ends", TracInWE), everywhere=True),
        Method("TracIn-Last", _asked("ends", TracInLast), everywhere=True),
        Method("random", random, everywhere=True),
        Method("TracIn-WE, top 10 words", _asked("ends", partial(TracInWE, top_words=10))),
        Method("TracIn-WE, no common words", _asked("ends", uncommon)),
        Method("TracIn-WE, synonyms", _asked("ends", partial(TracInWE, synonyms=0.8))),
        Method("TracIn-WE, in flight", _asked("in_flight", TracInWE)),
        Method("TracIn, all layers", _asked("all", TracIn)),
        Method("influence function, last layer", _asked("final", partial(InfluenceFunction, parameters="head.*"))),
        Method("influence function, EK-FAC", _asked("final", InfluenceFunction)),
        Method("gradient dot product", _asked("final", TracIn)),
        Method("gradient cosine", gradient_cosine),
        Method("BM25, signed by the label", _signed(BM25)),
        Method("tf-idf, signed by the label", _signed(TfIdf)),
        Method("embedding cosine, signed by the label", _signed(EmbeddingCosine)),
    ]


def random(fit: Explained, count: int) -> Tensor:
    """Scores without meaning; the queries take turns in using a few rankings."""
    drawn = fit.scores("ends", Random(fit.seed), min(count, SHARED_RANKINGS))
    return drawn[torch.arange(count) % len(drawn)]


def gradient_cosine(fit: Explained, count: int) -> Tensor:
    """Cosines of the gradients at the final weights, up to a factor for each query, which no ranking sees."""
    final = fit.ask("final", TracIn())
    return final.scores(fit.batch(count)) / final.self_influence().clamp(min=1e-30).sqrt()


def _asked(kind: str, estimator: Callable[[], TracIn | InfluenceFunction]) -> Scorer:
    return lambda fit, count: fit.scores(kind, estimator(), count)


def _signed(estimator: Callable[[], BM25 | TfIdf | EmbeddingCosine]) -> Scorer:
    """A similarity, negated where the training text has another label than the model says of the query."""

    def scores(fit: Explained, count: int) -> Tensor:
        same = fit.set_up.texts.train.labels == fit.queries.labels[:count].unsqueeze(1)  # (Q, N)
        return fit.scores("ends", estimator(), count) * torch.where(same, 1.0, -1.0)

    return scores
