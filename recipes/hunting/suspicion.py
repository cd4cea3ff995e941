"""Every score of suspicion: self-influence, influence on clean samples, training dynamics, and the baselines.

Of the influence on clean samples there are two sums. “Opponents” sums all of it: what a sample does for those of its
class and against others cancels, whether its label is right or wrong. “Harm” sums the negative scores alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_influence import InfluenceFunction, TracIn, TracInLast, TracInWE
from lightning_influence.estimators.tracin import Preconditioner
from lightning_influence.gradients import unpack
from recipes.hunting.fitting import Fit

SELF, OPPONENTS, HARM, DYNAMICS, SIMPLE = "self-influence", "opponents", "harm", "dynamics", "baseline"
MARGIN, LAST, OUT_OF_FOLD, RANDOM = "mean margin", "TracIn-Last", "out of fold", "random"
_ASKED = ("TracIn-WE", LAST, "TracIn, all layers", "IF, last layer", "IF, all layers")  # about held-out samples too


@dataclass(frozen=True)
class Suspicion:
    """How suspicious every training sample is.

    Args:
        kind: what the score is made of.
        name: of the method.
        scores: high for what looks wrong, (N,) float64.
        seconds: that it took.
    """

    kind: str
    name: str
    scores: Tensor
    seconds: float

    @property
    def title(self) -> str:
        """Kind and name."""
        return self.name if self.kind in (DYNAMICS, SIMPLE) else f"{self.kind}, {self.name}"


def suspicions(fit: Fit, seed: int) -> Iterator[Suspicion]:
    """All scores, each once it is there."""
    estimators = _estimators(fit)
    for name, estimator in estimators.items():
        yield _timed(SELF, name, partial(_self_influence, fit, estimator))
    yield _timed(SELF, "gradient norm", lambda: gradient_norm(fit))
    for name in (name for name in estimators if name in _ASKED):
        began = time.perf_counter()
        influence = fit.ask(estimators[name]())
        pairs = torch.cat([influence.scores(batch) for batch in fit.held_out]).double()  # (Q, N)
        seconds = time.perf_counter() - began
        yield Suspicion(OPPONENTS, name, -pairs.sum(0), seconds)  # minus group_scores(held_out)
        yield Suspicion(HARM, name, -pairs.clamp(max=0).sum(0), seconds)
    for name, score in _DYNAMICS.items():
        yield _timed(DYNAMICS, name, partial(_noted, fit, score))
    yield _timed(SIMPLE, OUT_OF_FOLD, fit.hunted.doubt)
    generator = torch.Generator().manual_seed(seed)
    yield _timed(SIMPLE, RANDOM, lambda: torch.rand(len(fit.hunted), generator=generator))


def gradient_norm(fit: Fit) -> Tensor:
    """Norm of each sample's gradient at the last checkpoint, (N,), all parameters."""
    squares = torch.zeros(len(fit.hunted), dtype=torch.float64)
    for shard in fit.store.shards(fit.store.checkpoints()[-1]):
        for block in unpack(shard.tensors).values():
            squares[shard.sample_ids] += block.norm().double().square()
    return squares.sqrt()


@dataclass(frozen=True)
class Record:
    """What the callback noted at every checkpoint: loss, margin and probability of each sample's label, (C, N)."""

    loss: Tensor
    margin: Tensor
    probability: Tensor


def forgetting(margin: Tensor) -> Tensor:
    """How often a sample went from right to wrong between two checkpoints, (N,); margins (C, N).

    One that was never right is taken for the most forgettable, as Toneva et al. 2018 (1812.05159) do.

    >>> forgetting(torch.tensor([[1.0, -1.0, 1.0], [-1.0, -2.0, 2.0], [1.0, -1.0, 3.0]]))
    tensor([1., 3., 0.], dtype=torch.float64)
    """
    right = margin > 0
    events = (right[:-1] & ~right[1:]).sum(0)
    return torch.where(right.any(0), events, len(margin)).double()


_DYNAMICS: dict[str, Callable[[Record], Tensor]] = {
    MARGIN: lambda record: -record.margin.mean(0),
    "mean probability": lambda record: -record.probability.mean(0),
    "final loss": lambda record: record.loss[-1],
    "forgetting events": lambda record: forgetting(record.margin),
    "variability": lambda record: record.probability.std(0, correction=0),
}


def _self_influence(fit: Fit, estimator: Callable[[], TracIn | InfluenceFunction]) -> Tensor:
    return fit.ask(estimator()).self_influence()


def _noted(fit: Fit, score: Callable[[Record], Tensor]) -> Tensor:
    return score(_record(fit))


def _record(fit: Fit) -> Record:
    noted = [fit.store.dynamics(checkpoint) for checkpoint in fit.store.checkpoints()]
    return Record(*(torch.stack([at[name].double() for at in noted]) for name in ("loss", "margin", "probability")))


def _estimators(fit: Fit) -> dict[str, Callable[[], TracIn | InfluenceFunction]]:
    """What makes sense for the model: TracIn in the metric of its optimizer, where that has one."""
    adaptive = getattr(fit.module, "optimizer_name", "sgd").startswith("adam")
    metric: Preconditioner = "optimizer" if adaptive else None
    tracin = partial(TracIn, preconditioner=metric)
    found: dict[str, Callable[[], TracIn | InfluenceFunction]] = {}
    if hasattr(fit.module, "embedding"):
        found["TracIn-WE"] = partial(TracInWE, preconditioner=metric)
        found["TracIn-WE, top 10 words"] = partial(TracInWE, preconditioner=metric, top_words=10)
        found["TracIn, convolutions"] = partial(tracin, "convolutions.*")
        last: str = "head.*"
    else:
        layers = [name for name, _ in fit.module.named_parameters()]
        last = f"{layers[-1].rpartition('.')[0]}.*"
        found["TracIn, first convolution"] = partial(tracin, f"{layers[0].rpartition('.')[0]}.*")
    found[LAST] = partial(TracInLast, preconditioner=metric)
    found["TracIn, all layers"] = tracin
    found["IF, last layer"] = partial(InfluenceFunction, parameters=last)
    found["IF, all layers"] = InfluenceFunction
    return found


def _timed(kind: str, name: str, score: Callable[[], Tensor]) -> Suspicion:
    began = time.perf_counter()
    scores = score().detach().double()
    return Suspicion(kind, name, scores, time.perf_counter() - began)
