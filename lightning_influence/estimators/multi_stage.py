"""Multi-stage influence: from a finetuned model's prediction back to the samples that it was pretrained on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.artifacts import ArtifactStore, StageLink
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Attributor, Estimator, Queries, ScoreBlock, Stage, Term
from lightning_influence.estimators.finetuning import FinetuningProblem, reached_gradients, trained_as, zeros
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.fitted import check_model, check_training_data
from lightning_influence.gradients import Dense, Gradients, Rows, select, word_embeddings
from lightning_influence.objective import PerSample
from lightning_influence.replay import TrainingData
from lightning_influence.stages import (
    Answer,
    Link,
    Proximity,
    held_by_training,
    link_of,
    parent_of,
    pulled_back,
)


class MultiStage(Attributor):
    """Which pretraining samples made the finetuned model do this (Chen et al. 2020, 2007.09081).

        score(q, z) = vᵀ T ∇ℓ_pre(z; θ_pre),    v = the query pulled back through finetuning (see `stages.pull_back`)

    T is the transform of the inner estimator: (H_pre + λI)⁻¹ of an `InfluenceFunction`, Σ_c η_c of `TracIn` and
    `TracInWE`. Which parameters are shared, and which of them stayed frozen, stands in the store of the finetuning run,
    where `StageLinker` has put it. Scores are −dm/dε as everywhere; sample ids are positions in the pretraining set.

        estimator = MultiStage(InfluenceFunction("ekfac"))
        influence = InfluenceModule(finetuned, "finetuning/influence", estimator, train_loader=finetuning_loader)
        Trainer().predict(influence, query_loader)

    Args:
        inner: how the pretraining run is asked; another `MultiStage` goes one run further back.
        link: how finetuning answers for shared parameters that it tuned: `Proximity()`, `Proximity(alpha)`,
            `SmallProximity()` or `Source()`. Frozen ones need no such choice.
        finetuned: curvature and damping of the finetuning run; `None` is `InfluenceFunction()`, the one in its store.
            The damping is added beside 2α, and shrinks what arrives at tuned parameters by 2α/(2α + λ) at least.
        module: the pretraining module; needed where nothing stored will do: `MatrixFree`, streaming, and in a stage in
            the middle the cross term.
        train_loader: its training data, where they are read again.
        per_sample_loss: (module, batch) -> (N,), if the pretraining run was given one.
        store: folder of the pretraining run, where it is no longer beside the finetuning one or where it was.
        ignore_cross_terms: of frozen shared parameters take ∇m alone, as if the new ones did not answer; where all of
            them are frozen, no curvature of the finetuning run is needed.

    Raises:
        StoreError: no link, a missing or other pretraining store, shared weights that moved though declared frozen.
        QueryError: no training data for the cross term; an optimizer that does not say how far it went; an inner
            estimator of parameters that are not shared.
        CurvatureError: a curvature that is missing, or cannot be inverted.
    """

    def __init__(
        self,
        inner: Attributor,
        link: Link | None = None,
        *,
        finetuned: InfluenceFunction | None = None,
        module: LightningModule | None = None,
        train_loader: Any = None,
        per_sample_loss: PerSample | None = None,
        store: str | os.PathLike[str] | None = None,
        ignore_cross_terms: bool = False,
    ) -> None:
        for name, value, kinds, hint in (
            ("inner", inner, (Estimator, MultiStage), "MultiStage(InfluenceFunction('ekfac')), or TracInWE() inside"),
            ("link", link, (Link, type(None)), "link=Proximity(), SmallProximity() or Source()"),
            ("finetuned", finetuned, (InfluenceFunction, type(None)), "finetuned=InfluenceFunction('ekfac')"),
            ("module", module, (LightningModule, type(None)), "module=pretrained_module"),
            ("store", store, (str, os.PathLike, type(None)), "store='folder of the pretraining run'"),
        ):
            if not isinstance(value, kinds):
                raise QueryError(
                    f"MultiStage cannot use this as {name}=",
                    expected=" or ".join(kind.__name__ for kind in kinds if kind is not type(None)),
                    found=repr(value),
                    hint=f"write {hint}",
                )
        if finetuned is not None and not finetuned.takes_all:
            raise QueryError(
                "a query is pulled back through all that finetuning trained",
                expected="finetuned=InfluenceFunction(...), without parameters= and target parameters",
                found=repr(finetuned),
                hint="these belong into the inner estimator",
            )
        self.inner, self.link = inner, link or Proximity()
        self.finetuned = finetuned or InfluenceFunction()
        self.module, self.train_loader, self.store = module, train_loader, store
        self.ignore_cross_terms, self._per_sample_loss = ignore_cross_terms, per_sample_loss
        self.counterfactual = inner.counterfactual and self.link.amounts
        self._found: tuple[str, ArtifactStore] | None = None  # identity of the finetuning store, and its parent

    # -- who answers ------------------------------------------------------------------------------------------------

    def parent(self, stage: Stage) -> Stage:
        """The pretraining run.

        Raises:
            StoreError: it is not there, or the module or data are not its own.
        """
        link, identity = link_of(stage.store), stage.store.identity
        if self._found is None or self._found[0] != identity:
            store = parent_of(stage.store, link, self.store)
            if self.module is not None:
                check_model(self.module, store)
            if self.train_loader is not None:
                check_training_data(self.train_loader, store)
            if self.module is not None and not any(p.requires_grad for p in self.module.parameters()):
                raise QueryError(
                    "no parameter of the pretraining module requires gradients",
                    expected="those that pretraining trained",
                    found="a module that is frozen as a whole",
                    hint="call requires_grad_(True) on what was trained",
                )
            self._found = identity, store
        if self.module is not None and stage.module is not None:
            self.module.to(stage.module.device)
        return Stage(
            self._found[1], self.module, self.train_loader, per_sample_loss=self._per_sample_loss, stored=stage.stored
        )

    def answering(self, stage: Stage) -> tuple[Attributor, Stage]:
        """The inner estimator and the pretraining run; where stages nest, the innermost."""
        return self.inner.answering(self.parent(stage))

    def __getstate__(self) -> dict[str, Any]:
        """All but the open store of the pretraining run, which is found again."""
        return {**self.__dict__, "_found": None}

    def asked(self, stage: Stage, queries: Queries) -> Queries:
        """The queries pulled back to that run."""
        return self.inner.asked(self.parent(stage), self.pulled(stage, queries))

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """Scores of the pretraining samples, by the inner estimator."""
        yield from self.inner.score_blocks(self.parent(stage), self.pulled(stage, queries))

    def check(self, largest: Tensor, query_ids: Tensor) -> None:
        """What the inner estimator refuses."""
        self.inner.check(largest, query_ids)

    # -- the pull-back ----------------------------------------------------------------------------------------------

    def pulled(self, stage: Stage, queries: Queries, *, of_any: bool = False) -> Queries:
        """The same queries as the pretraining run sees them: their gradients are pulled back once, when they are first
        asked for, and are the same at all of its checkpoints.

        Args:
            of_any: give zeros where none of the parameters that are asked for is shared, instead of refusing.
        """
        shapes = {name: spec.shape for name, spec in self.parent(stage).store.manifest.parameters.items()}

        @cache
        def back() -> Gradients:
            return self._back(stage, queries)

        def gradients_at(at: Any, names: Collection[str]) -> Gradients:
            found = back()
            if not of_any and not any(name in found for name in names):
                raise QueryError(
                    "the inner estimator looks at parameters alone that finetuning did not take over",
                    expected=f"some of {', '.join(found)}",
                    found=", ".join(names),
                    hint="select shared parameters in the pretraining run's callbacks and in the inner estimator",
                )
            like = next(iter(found.values()))
            return {name: found[name] if name in found else zeros(like, shapes[name]) for name in names}

        return Queries(queries.batches, queries.sizes, gradients_at)

    def _back(self, stage: Stage, queries: Queries) -> Gradients:
        link = link_of(stage.store)
        frozen = [name for name in link.shared if name in link.frozen]
        if self.ignore_cross_terms and len(frozen) == len(link.shared):  # nothing is to be solved for
            v = reached_gradients(stage, queries, stage.checkpoints[-1], (), frozen)
            return pulled_back(v, Answer({}, {}), link.shared, frozen, {})
        problem = self.problem(stage)
        with problem.as_trained():
            v = reached_gradients(stage, queries, problem.found.at, problem.trained, frozen)
            answer = problem.answer({name: v[name] for name in problem.trained})
            with stage.at(problem.found.at):
                walked = frozen and not self.ignore_cross_terms
                through = problem.cross(frozen, self.train_data(stage))(answer.moved) if walked else {}
                fixed = [v[name] for name in frozen] + list(through.values())
                if not self.link.amounts and any(bool(block.norm().any()) for block in fixed):
                    answer = Answer(answer.moved, {})  # with 2α left out, tuned ones are nothing beside frozen ones
                found = pulled_back(v, answer, problem.link.shared, frozen, through)
        for name in _tables(stage.module, problem.link):  # of a look-up every sample touches a few rows
            if isinstance(block := found.get(name), Dense):
                found[name] = Rows.from_dense(block.values)
        return found

    def problem(self, stage: Stage) -> FinetuningProblem:
        """The finetuning run as what a gradient is pulled back through."""
        link, finetuning = link_of(stage.store), replace(stage, stored=False)
        if stage.module is None:
            raise QueryError(
                "a query is pulled back through the finetuned model",
                expected="the module of every run but the first",
                found="none",
                hint="give the inner MultiStage the module of its own finetuning run: MultiStage(MultiStage(...), "
                "module=..., train_loader=...)",
            )
        with trained_as(stage.module, link.frozen):
            found = self.finetuned.recorded(finetuning)
        damping = self.finetuned.damping_of(finetuning, found)
        problem = FinetuningProblem(finetuning, link, found, damping, self.link, {})
        problem.check(needs_all=any(name in link.frozen for name in link.shared) and not self.ignore_cross_terms)
        tuned = problem.tuned
        wanted = [name for name in problem.trained if name in self.link.held_names(problem.trained, tuned)]
        alpha = link.alpha if self.link.alpha is None and isinstance(self.link, Proximity) else self.link.alpha
        if alpha is not None:
            return replace(problem, held=dict.fromkeys(wanted, 2 * alpha))
        return replace(problem, held=held_by_training(stage.store, link, found.at, wanted))

    def own(self) -> Estimator:
        """Who scores the finetuning run's own samples by the same account of it: ∇mᵀ (∇²F + λ + 2αE)⁻¹ ∇f(x)."""
        return _Finetuned(self)

    def train_data(self, stage: Stage) -> TrainingData:
        """The finetuning data, which the cross term walks.

        Raises:
            QueryError: they were not given.
        """
        if stage.train_loader is None:
            raise QueryError(
                "the shared parameters stayed frozen: how the new ones answer to them is a product with the finetuning "
                "loss",
                expected="the finetuning data",
                found="none",
                hint="pass InfluenceModule(..., train_loader=finetuning_loader), for a stage in the middle MultiStage("
                "..., train_loader=...); or leave that part out: MultiStage(..., ignore_cross_terms=True)",
            )
        return TrainingData.of(stage.train_loader, forked=True)

    def __repr__(self) -> str:
        ignoring = ", ignore_cross_terms=True" if self.ignore_cross_terms else ""
        return f"MultiStage({self.inner!r}, {self.link!r}, finetuned={self.finetuned!r}{ignoring})"


class _Finetuned(Estimator):
    """The samples of a finetuning run, held to its start as a `MultiStage` says."""

    counterfactual = True

    def __init__(self, through: MultiStage) -> None:
        self._through = through

    def terms(self, stage: Stage) -> Sequence[Term]:
        """One term, at the end of the run."""
        problem = self._through.problem(stage)
        problem.check(needs_all=True)
        held = stage.store.manifest.selected
        missing = [name for name in problem.trained if name not in held]
        stored = any(file.step == problem.found.at.step for file in stage.store.artifacts("gradients"))
        if missing or not stored:
            raise QueryError(
                f"the finetuning run's store holds no gradients of {', '.join(missing[:5]) or 'its last checkpoint'}",
                expected=f"gradients of {', '.join(problem.trained[:8])} at step {problem.found.at.step}",
                found=f"gradients of {', '.join(held) or 'no parameter'}",
                hint="fit it with GradientSnapshot(parameters='all') too",
            )

        def moved(v: Gradients) -> Gradients:
            with problem.as_trained():
                return problem.answer(v).moved

        return [Term(problem.found.at, problem.found.at, problem.trained, moved)]


def _tables(module: nn.Module | None, link: StageLink) -> list[str]:
    """The shared word embeddings, by the earlier run's names."""
    if module is None or not word_embeddings(module):
        return []
    return [link.shared[name] for name in select(module, "word_embeddings").names if name in link.shared]
