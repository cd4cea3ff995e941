"""How a finetuned network's queries are attributed to its pretraining samples, by multi-stage influence and else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from lightning_influence import (
    InfluenceFunction,
    InfluenceModule,
    MultiStage,
    Proximity,
    SmallProximity,
    Source,
    TracIn,
)
from lightning_influence.curvature import Dense
from lightning_influence.gradients import Gradients
from lightning_influence.stages import Answer, Link, Trained
from recipes.stages.fitting import StagedClassifier, TwoFits
from recipes.stages.network import is_shared
from recipes.truths.retraining import Samples

Scorer = Callable[[TwoFits, Samples, Samples], Tensor]  # fits, queries, pretraining samples -> (Q, N)


class AsItIs(Link):
    """No link at all: the query's gradient at the finetuned weights, as if it had been taken at the pretrained ones."""

    def answer(self, trained: Trained, v: Gradients) -> Answer:
        """The shared part of v."""
        return Answer(v, {name: v[name] for name in trained.tuned if name in v})

    def held_names(self, trained: object, tuned: object) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass(frozen=True)
class Method:
    """A line of the tables.

    Args:
        name: of the method.
        scores: of queries and pretraining samples, from two fits.
        baseline: whether it is one to be ahead of.
    """

    name: str
    scores: Scorer
    baseline: bool = False


def methods(frozen: bool, exact: float | None) -> list[Method]:
    """All methods for an embedding that was frozen, or tuned.

    Args:
        exact: damping of the exact Gauss–Newton matrix; None leaves out the methods that use it.
    """
    links: list[tuple[str, Link]] = [("", Proximity())]
    if not frozen:
        links = [("proximity, ", Proximity()), ("small proximity, ", SmallProximity()), ("SOURCE, ", Source())]
    found = [Method(f"multi-stage, {name}EK-FAC", multi_stage(link)) for name, link in links]
    if exact is not None:
        for name, link in (link for link in links if link[1].amounts):
            found.append(Method(f"multi-stage, {name}EK-FAC, then exact", multi_stage(link, finetuned=exact)))
            found.append(Method(f"multi-stage, {name}exact", multi_stage(link, pretrained=exact, finetuned=exact)))
    found.append(Method(f"multi-stage, {links[-1][0]}TracIn inside", multi_stage(links[-1][1], inner=TracIn())))
    without = multi_stage(ignore_cross_terms=True) if frozen else multi_stage(AsItIs())
    found.append(Method("influence function without a link, EK-FAC", without, baseline=True))
    return [
        *found,
        Method("gradient dot product", gradient_dot, baseline=True),
        Method("cosine of the features", feature_cosine, baseline=True),
        Method("random", random, baseline=True),
    ]


def multi_stage(
    link: Link | None = None,
    *,
    inner: TracIn | None = None,
    pretrained: float | None = None,
    finetuned: float | None = None,
    ignore_cross_terms: bool = False,
) -> Scorer:
    """Multi-stage influence through `InfluenceModule`.

    Args:
        link: how finetuning answers.
        inner: how the pretraining run is asked, where not by an influence function.
        pretrained: damping of the exact Gauss–Newton matrix of pretraining; None takes EK-FAC at its default one.
        finetuned: likewise of finetuning.
        ignore_cross_terms: of a frozen embedding.
    """

    def scores(fits: TwoFits, queries: Samples, samples: Samples) -> Tensor:
        asked = estimator(fits, link, inner, pretrained, finetuned, ignore_cross_terms)
        return asked.scores((queries.inputs, queries.labels)).double()

    return scores


def estimator(
    fits: TwoFits,
    link: Link | None = None,
    inner: TracIn | None = None,
    pretrained: float | None = None,
    finetuned: float | None = None,
    ignore_cross_terms: bool = False,
) -> InfluenceModule:
    """The finetuned network, ready to be asked about its pretraining samples."""
    method = MultiStage(
        inner or _influence(pretrained),
        link,
        finetuned=_influence(finetuned),
        module=fits.first.module,
        train_loader=fits.first.loader,
        ignore_cross_terms=ignore_cross_terms,
    )
    return InfluenceModule(fits.second.module, fits.second.store, method, train_loader=fits.second.loader)


def gradient_dot(fits: TwoFits, queries: Samples, samples: Samples) -> Tensor:
    """⟨∇_W m(θ_finetuned), ∇_W ℓ(z; θ_pretrained)⟩ over the shared parameters."""
    return per_sample_gradients(fits.second.module, queries) @ per_sample_gradients(fits.first.module, samples).t()


def feature_cosine(fits: TwoFits, queries: Samples, samples: Samples) -> Tensor:
    """Cosine of what goes into the head of the finetuned network."""
    with torch.no_grad():
        asked, given = (F.normalize(fits.second.module.embedding(s.inputs).double()) for s in (queries, samples))
    return asked @ given.t()


def random(fits: TwoFits, queries: Samples, samples: Samples) -> Tensor:
    """Normal numbers."""
    return torch.randn(len(queries), len(samples), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def per_sample_gradients(module: StagedClassifier, samples: Samples) -> Tensor:
    """Gradients of every sample's loss with respect to the embedding, (N, P)."""
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    shared = {name: value for name, value in parameters.items() if is_shared(name)}
    others = {name: value for name, value in parameters.items() if name not in shared}

    def loss(own: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, {**own, **others}, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0))(shared, samples.inputs, samples.labels)
    return torch.cat([found[name].flatten(1) for name in shared], 1).double()


def _influence(damping: float | None) -> InfluenceFunction:
    return InfluenceFunction("ekfac") if damping is None else InfluenceFunction(Dense("ggn"), damping=damping)
