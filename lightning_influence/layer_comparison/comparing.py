"""The comparison itself: layers are found, the store is walked once, and every layer's scores are judged alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.artifacts import UNBOUNDED
from lightning_influence.attribution import refuse_not_finite
from lightning_influence.damping_choice import Removals, true_changes
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Estimator, Stage
from lightning_influence.layer_comparison.aggregation import rank_scores, vote_scores
from lightning_influence.layer_comparison.layers import Layer, held, layers_of, named_layers
from lightning_influence.layer_comparison.one_pass import LayerSums, summed_by_layer
from lightning_influence.layer_comparison.removal_truth import RemovalTruth
from lightning_influence.layer_comparison.results import JudgedScores, LayerComparison, LayerResult, ShortTrainings
from lightning_influence.metrics import mislabel_detection, query_mean
from lightning_influence.queries import QueryGradients
from lightning_influence.questions import Questions, checked_k
from lightning_influence.replay import TrainingData, isolated
from lightning_influence.streaming import batches_of

_EXAMINED = (0.1,)  # share of the training set


def compare_layers(
    influence: Questions,
    queries: Iterable[Any],
    *,
    flags: Sequence[bool] | Tensor | None = None,
    layers: Sequence[str] | None = None,
    removals: Removals | RemovalTruth | None = None,
    k: int | None = None,
) -> LayerComparison:
    """From which layer should influence be taken? Scores of every layer of one run, and how good they are on its data.

    The first layer is better than the last because gradients of the last cancel (Yeh et al. 2022, 2202.11844); middle
    layers are better on some tasks, and layers can be aggregated by rank or vote (2511.04715). Neither is a constant of
    nature, so it is measured here, from one pass over the store:

        score_l(q, z) = Σ_c Σ_{p in l} < [T_c ∇m(q; θ_c)]_p, ∇_p ℓ(z; θ_c) >

    for TracIn the estimator restricted to the parameters p of layer l, for an InfluenceFunction the share of its score
    that goes through them (the same where the curvature treats layers apart). Over all layers they sum to the
    estimator's own score. Three cheap proxies judge them: whether flagged samples (known or injected wrong labels)
    stand out by self-influence, and as opponents; whether the scores foretell what short trainings without random parts
    of the training set do to the queries; and what such a training does without the samples that come first.

    Args:
        influence: the finished run, with an estimator of the bilinear family, such as `TracIn()`; `train_loader` is
            needed if `removals` are to be trained.
        queries: a loader of queries, or a list of batches.
        flags: whether each training sample is one that should stand out, (N,) booleans.
        layers: names of modules, or what `GradientSnapshot(parameters=...)` takes (`"word_embeddings"`, `"last_layer"`,
            globs over parameters), one layer each; `None` takes the word embeddings, every block (the children of
            ModuleLists and of Sequentials that repeat a type) and each other module that has parameters.
        removals: `Removals()` trains a copy of the model for each random part and for each layer's first samples, from
            the last checkpoint on; a `RemovalTruth` is judged by as it is.
        k: samples that each layer votes for; `None` is that of `influence`.

    Returns:
        A `LayerComparison`: `print` it, or `plot()` it.

    Raises:
        QueryError: a store without gradients, or with projected ones; an estimator without parts (`BM25`, ...) or of an
            earlier run (`MultiStage`); layers that the model does not have, or without gradients; flags or k that do
            not fit the training set.
    """
    stage, estimator = influence.stage, _of_one_run(influence)
    length = _length(stage)
    k = checked_k(influence.k if k is None else k, length)
    flagged = None if flags is None else _checked_flags(flags, length)
    compared, missing = _compared(stage, estimator, influence.user, layers)
    if isinstance(removals, Removals) and influence.train_loader is None:
        raise QueryError(
            "removals are trained, and there are no training data",
            expected="the training data",
            found="train_loader=None",
            hint="pass InfluenceModule(..., train_loader=train_loader)",
        )
    with isolated(influence.user):
        batches = batches_of(queries)
    gradients = QueryGradients(stage, influence.measurement)
    asked = gradients.of(batches, None, None)
    if isinstance(removals, RemovalTruth):
        removals.check(len(asked), length)

    sums = summed_by_layer(stage, estimator, asked, compared, self_influence=flagged is not None)
    for scores in sums.scores:
        refuse_not_finite(scores)
    estimator.check(sums.scores[-1].abs().amax(1), torch.arange(len(asked)))
    candidates = _candidates(sums, [layer.name for layer in compared], k)
    truth, trained, deleted = None, None, None
    if isinstance(removals, RemovalTruth):
        truth = removals
    elif removals is not None:
        firsts = [_first(one.scores, removals.parts(length)[0].numel()) for one, _ in candidates]
        truth, trained, deleted = _short_trainings(
            stage, removals, firsts, lambda module: gradients.measured(module, batches)
        )
    judged = [
        _judged(one, against, flagged, truth, None if deleted is None else deleted[place])
        for place, (one, against) in enumerate(candidates)
    ]
    specs = stage.store.manifest.parameters
    results = [
        LayerResult(
            **vars(one),
            parameters=layer.parameters,
            size=sum(math.prod(specs[name].shape) for name in layer.parameters),
            cancellations=cancellations,
        )
        for one, layer, cancellations in zip(judged, compared, sums.cancellations, strict=False)
    ]
    whole, by_rank, by_vote = judged[len(results) :]
    count = None if flagged is None else int(flagged.sum())
    return LayerComparison(tuple(results), whole, by_rank, by_vote, missing, k, count, trained)


def _candidates(sums: LayerSums, names: Sequence[str], k: int) -> list[tuple[JudgedScores, Tensor]]:
    """The scores of every layer, of all together, by rank and by vote, not judged yet; with each, how much samples
    work against the queries, (Q, N): the scores turned round, of votes those for the last k."""
    own = sums.self_influence
    found = []
    for place, name in enumerate([*names, "all together"]):
        scores = sums.scores[place]
        mine = None if own is None else own[place]
        found.append((JudgedScores(name=name, scores=scores, self_influence=mine), -scores))
    of_layers, own_of_layers = sums.scores[:-1], None if own is None else own[:-1].unsqueeze(1)  # (L, 1, N)
    for name, aggregated in (("by rank", rank_scores), ("by vote", partial(vote_scores, k=k))):
        mine = None if own_of_layers is None else aggregated(own_of_layers)[0]
        one = JudgedScores(name=name, scores=aggregated(of_layers), self_influence=mine)
        found.append((one, aggregated(-of_layers)))
    return found


def _judged(
    one: JudgedScores,
    against: Tensor,
    flagged: Tensor | None,
    truth: RemovalTruth | None,
    deleted: Tensor | None,
) -> JudgedScores:
    """The same scores with all verdicts that there is something to judge by for."""
    by_self = opponents = None
    if flagged is not None and one.self_influence is not None:
        by_self = mislabel_detection(one.self_influence, flagged, at=_EXAMINED)
        opponents = mislabel_detection(against.double().mean(0), flagged, at=_EXAMINED)
    return replace(
        one,
        found_by_self=by_self,
        found_as_opponents=opponents,
        removals=None if truth is None else truth.agreement(one.scores),
        deletion=None if deleted is None else query_mean(deleted),
    )


def _short_trainings(
    stage: Stage, removals: Removals, firsts: Sequence[Tensor], measured: Callable[[LightningModule], Tensor]
) -> tuple[RemovalTruth, ShortTrainings, Tensor]:
    """The true changes of m by random parts, as a truth and in short; and by the first samples of each candidate (a row
    each)."""
    at, length = stage.checkpoints[-1], stage.store.manifest.dataset_length
    parts, steps = removals.parts(length), removals.steps or max(1, at.step // 3)
    with stage.at(at) as module:
        data = TrainingData.of(stage.train_loader, forked=True)
        changes, _ = true_changes(module, data, [*parts, *firsts], measured, removals, steps)
    random, deleted = changes[: len(parts)], changes[len(parts) :]
    return RemovalTruth(parts, random), ShortTrainings(len(parts), len(parts[0]), steps, random.mean(1)), deleted


def _first(scores: Tensor, count: int) -> Tensor:
    """The samples of the highest mean scores over the queries, ascending."""
    return scores.double().mean(0).argsort(descending=True, stable=True)[:count].sort().values


def _of_one_run(influence: Questions) -> Estimator:
    estimator, stage = influence.answering
    if not isinstance(estimator, Estimator) or stage.store is not influence.store:
        raise QueryError(
            "layers are compared within one run, by an estimator whose scores are sums over parameters",
            expected="TracIn(), InfluenceFunction(), ...",
            found=type(influence.estimator).__name__,
            hint="ask with InfluenceModule(module, store, TracIn()); of two runs, each for itself",
        )
    return estimator


def _length(stage: Stage) -> int:
    """N, of a store that has gradients as they were captured."""
    manifest = stage.store.manifest
    if not manifest.selected or stage.projection is not None or manifest.dataset_length >= UNBOUNDED:
        if not manifest.selected:
            found = "no gradients"
        else:
            found = "those of a stream" if stage.projection is None else f"gradients projected by {stage.projection}"
        raise QueryError(
            "layers are compared by the gradients of a training set in the store, as they were captured",
            expected="per-sample gradients of several layers",
            found=f"{found} in {stage.store.root}",
            hint='fit with GradientSnapshot(store, parameters="all", projection=None)',
        )
    return manifest.dataset_length


def _compared(
    stage: Stage, estimator: Estimator, module: LightningModule, wanted: Sequence[str] | None
) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    layers = layers_of(module) if wanted is None else named_layers(module, wanted)
    known = {name for term in estimator.terms(stage) for name in term.parameters}
    there, missing = held(layers, known)
    if not there:
        raise QueryError(
            "none of these layers has gradients here",
            expected=f"gradients of {', '.join(missing)}",
            found=f"gradients of {', '.join(sorted(known))}",
            hint='fit with GradientSnapshot(store, parameters="all"), or take an estimator of all parameters: TracIn()',
        )
    return there, missing


def _checked_flags(flags: Sequence[bool] | Tensor, length: int) -> Tensor:
    flagged = torch.as_tensor(flags).detach().cpu()
    if flagged.dtype != torch.bool or tuple(flagged.shape) != (length,) or int(flagged.sum()) in (0, length):
        raise QueryError(
            "these flags do not tell samples of the training set apart",
            expected=f"one boolean for each of {length} training samples, some of them true and some false",
            found=f"{int(flagged.bool().sum())} true, {flagged.dtype} of shape {tuple(flagged.shape)}",
            hint="flags=[label != true_label for every training sample, in dataset order]",
        )
    return flagged
