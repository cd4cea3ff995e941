"""The methods of the scoreboard, ours and the peers', each with what it takes beside the plain training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache, partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch import Callback
from torch import Tensor

from lightning_influence import (
    FactorProjection,
    GradientSnapshot,
    InfluenceFunction,
    ProjectedGram,
    Random,
    TracIn,
    TracInLast,
    TracInWE,
)
from recipes.benchmarks.measuring import Clocked, ClockedCurvature, ClockedGradients, cpu_seconds
from recipes.benchmarks.peers.all import peers
from recipes.benchmarks.peers.asked import Peer, Trained
from recipes.deletions.fitting import Explained, SetUp, fitted
from recipes.deletions.methods import Scorer, gradient_cosine, methods
from recipes.truths.retraining import Samples

BASELINES = (
    "BM25, signed by the label",
    "tf-idf, signed by the label",
    "embedding cosine, signed by the label",
)
_HELD_OUT = 400  # texts by which a damping is chosen
Stores = Callable[[SetUp, Path], Sequence[Clocked]]  # a set-up and the folder of its store -> callbacks


@dataclass(frozen=True)
class Answer:
    """What a method says.

    Args:
        values: scores (Q, N), positive for proponents; or self-influence (N,).
        seconds: CPU seconds of all that the plain training would not have needed.
        size: bytes that are kept on disk for it, beside the weights of checkpoints.
    """

    values: Tensor
    seconds: float
    size: int


@dataclass(frozen=True)
class Contestant:
    """A method.

    Args:
        name: of it.
        scores: (Q, N) of all questions of a set-up, trained with a seed; what it keeps goes into an empty folder.
        self_influence: (N,) of the training texts; None where the method has none.
    """

    name: str
    scores: Callable[[SetUp, int, Path], Answer]
    self_influence: Callable[[SetUp, int, Path], Answer] | None = None


def contestants() -> list[Contestant]:
    """Ours, the baselines and the peers."""
    words, everything = partial(_gradients, "word_embeddings"), partial(_gradients, "all")
    final, curvature = partial(_final, "all"), partial(_curvature, "all")
    known = {method.name: method.scores for method in methods()}
    trained = cache(_trained)  # the peers share one training
    return [
        _ours("TracIn-WE", words, lambda _: TracInWE()),
        _ours("TracIn-Last", partial(_gradients, "last_layer"), lambda _: TracInLast()),
        _ours("TracIn, all layers", everything, lambda _: TracIn()),
        _ours(
            "influence function, last layer",
            partial(_curvature, "last_layer"),
            lambda _: InfluenceFunction(parameters="head.*"),
        ),
        _ours("influence function, EK-FAC", curvature, lambda _: InfluenceFunction()),
        _ours("influence function, EK-FAC, chosen damping", curvature, _chosen_damping),
        _ours("projected to rank 16 (LoGra)", _projected, lambda _: InfluenceFunction(ProjectedGram())),
        _ours("gradient dot product", final, lambda _: TracIn()),
        Contestant("gradient cosine", partial(_scored, "final", final, gradient_cosine)),
        Contestant("random", partial(_without_store, words, _random)),
        *(Contestant(name, partial(_without_store, words, known[name])) for name in BASELINES),
        *(_peer(peer, trained) for peer in peers()),
    ]


def _gradients(parameters: str, set_up: SetUp, folder: Path) -> list[Clocked]:
    return [ClockedGradients(folder, parameters, every_n_epochs=set_up.every_n_epochs)]


def _final(parameters: str, set_up: SetUp, folder: Path) -> list[Clocked]:
    return [ClockedGradients(folder, parameters, every_n_epochs=set_up.recipe.epochs)]


def _curvature(parameters: str, set_up: SetUp, folder: Path) -> list[Clocked]:
    return [*_final(parameters, set_up, folder), ClockedCurvature(folder, "ekfac", parameters=parameters)]


def _projected(set_up: SetUp, folder: Path) -> list[Clocked]:
    return [ClockedGradients(folder, "all", every_n_epochs=set_up.recipe.epochs, projection=FactorProjection(16))]


def _chosen_damping(fit: Explained) -> InfluenceFunction:
    """An influence function whose damping is chosen by removals that are trained, judged on texts nobody asks about."""
    texts, asked = fit.set_up.texts, set(fit.set_up.positions.tolist())
    held_out = [i for i in range(len(texts.test)) if i not in asked][:_HELD_OUT]
    fit.ask("final", InfluenceFunction()).choose_damping([texts.batch(held_out)])
    return InfluenceFunction(damping="auto")


def _ours(name: str, stores: Stores, estimator: Callable[[Explained], TracIn | InfluenceFunction]) -> Contestant:
    def scores(fit: Explained, count: int) -> Tensor:
        return fit.scores("final", estimator(fit), count)

    def self_influence(fit: Explained, _: int) -> Tensor:
        return fit.ask("final", estimator(fit)).self_influence()

    return Contestant(
        name, partial(_scored, "final", stores, scores), partial(_scored, "final", stores, self_influence)
    )


def _scored(kind: str, stores: Stores, scores: Scorer, set_up: SetUp, seed: int, folder: Path) -> Answer:
    """What a method says after a fit with its own callbacks; the weights are the same with all of them."""
    clocked = stores(set_up, folder / kind)
    callbacks = [callback for callback in clocked if isinstance(callback, Callback)]
    fit = fitted(set_up, seed, folder, callbacks)
    began = cpu_seconds()
    values = scores(fit, len(set_up.positions))
    seconds = cpu_seconds() - began + sum(callback.seconds for callback in clocked)
    return Answer(values.detach(), seconds, size_of(folder))


def _without_store(stores: Stores, scores: Scorer, set_up: SetUp, seed: int, folder: Path) -> Answer:
    """What a method says that compares inputs alone: the store is asked for the order of the training texts only."""
    fit = fitted(set_up, seed, folder, [c for c in stores(set_up, folder / "ends") if isinstance(c, Callback)])
    began = cpu_seconds()
    values = scores(fit, len(set_up.positions))
    return Answer(values.detach(), cpu_seconds() - began, 0)


def _peer(peer: Peer, trained: Callable[[SetUp, int], tuple[Trained, Samples]]) -> Contestant:
    def ask(answer: Callable[[Trained, Samples, Path], Tensor], set_up: SetUp, seed: int, folder: Path) -> Answer:
        given, queries = trained(set_up, seed)
        began = cpu_seconds()
        try:
            with redirect_stderr(StringIO()) as said:  # bars for every batch, and warnings, which are passed on
                values = answer(given, queries, folder)
        finally:
            lines = said.getvalue().splitlines()
            sys.stderr.writelines(f"{peer.name}: {line}\n" for line in lines if "Warning" in line)
        return Answer(values.detach(), cpu_seconds() - began, size_of(folder))

    def hunted(given: Trained, _: Samples, folder: Path) -> Tensor:
        assert peer.self_influence is not None
        return peer.self_influence(given, folder)

    hunt = None if peer.self_influence is None else partial(ask, hunted)
    return Contestant(peer.name, partial(ask, peer.scores), hunt)


def _random(fit: Explained, count: int) -> Tensor:
    return fit.scores("ends", Random(fit.seed), count)


def _trained(set_up: SetUp, seed: int) -> tuple[Trained, Samples]:
    """The very training that our callbacks saw: weights and learning rates of the checkpoints; and the questions."""
    with TemporaryDirectory() as folder:
        callback = GradientSnapshot(Path(folder) / "ends", "last_layer", every_n_epochs=set_up.every_n_epochs)
        fit = fitted(set_up, seed, Path(folder), [callback])
        store = fit.ask("ends", TracInLast()).store
        weights = [store.weights(checkpoint) for checkpoint in store.checkpoints()]
    rates = [set_up.recipe.learning_rate] * len(weights)
    return Trained(fit.module, weights, rates, set_up.texts.train), fit.queries


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder but the weights of checkpoints, which every method needs in some form."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files if not file.name.startswith(("weights", "checkpoint-")))
