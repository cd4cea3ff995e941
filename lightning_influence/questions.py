"""What can be asked of a finished fit directly: ranks, scores, words, tokens, groups, removals, and a damping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.artifacts import ArtifactStore
from lightning_influence.attribution import (
    Attribution,
    attribute,
    refuse_meaningless,
    removal_effects,
    score_matrix,
    self_influence,
)
from lightning_influence.curvature import Damping
from lightning_influence.damping_choice import DampingChoice, Removals, choose_damping, record_choice
from lightning_influence.errors import QueryError
from lightning_influence.estimators import InfluenceFunction
from lightning_influence.estimators.estimator import Attributor, Estimator, Queries, Stage, query_side
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.mixed import MixedAttribution, mixed_attribution
from lightning_influence.objective import Measurement, PerSample
from lightning_influence.queries import (
    Decoders,
    QueryGradients,
    TokenScores,
    WordContribution,
    readable,
    sets_of_ids,
    table_of_ids,
    token_scores,
    word_contributions,
)
from lightning_influence.replay import TrainingData, isolated
from lightning_influence.streaming import batches_of


class Questions:
    """The part of `InfluenceModule` that needs no Trainer.

    Attributes:
        user: the trained module.
        estimator, measurement, k, train_loader: as `InfluenceModule` was given them.
    """

    user: LightningModule
    estimator: Attributor
    measurement: Measurement | None
    k: int
    train_loader: Any
    _root: Path
    _per_sample_loss: PerSample | None
    _trainer: Trainer | None

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifacts that are asked."""
        return ArtifactStore.open(self._root)

    @property
    def stage(self) -> Stage:
        """The training run that is asked."""
        return Stage(self.store, self.user, self.train_loader, per_sample_loss=self._per_sample_loss)

    def query(self, batch: Any, k: int | None = None) -> Attribution:
        """Proponents and opponents of every query in the batch, k of each."""
        queries = self._queries([batch])
        answers = Attribution(
            torch.arange(len(queries)), *attribute(self.stage, self.estimator, queries, self._checked_k(k))
        )
        refuse_meaningless(self.estimator, answers)
        return answers

    def scores(self, batch: Any) -> Tensor:
        """All scores of the batch, (Q, N): positive for proponents, training samples in dataset order; for an
        InfluenceFunction changes of m per unit of a sample's weight, for TracIn no amounts.

        Samples that were never trained on, as far as records made in flight say, have columns of zeros; `query` does
        not rank them.
        """
        return score_matrix(self.stage, self.estimator, self._queries([batch]))

    def words(
        self, batch: Any, sample_ids: Tensor | Sequence[Sequence[int]], decode: Decoders = None
    ) -> list[list[list[WordContribution]]]:
        """The words that carry the scores between each query and some training samples.

        Args:
            sample_ids: (Q, k), such as `attribution.proponents.sample_ids`.
            decode: token id -> its piece as the vocabulary writes it, by which subwords are merged into words: of a
                Hugging Face tokenizer `tokenizer.convert_ids_to_tokens`, not `tokenizer.decode`, which drops the marks
                that say where a word begins. Where embeddings have different vocabularies, a mapping from the name of
                the embedding weight to its own.

        Returns:
            For each query and sample the shared words of every embedding weight, largest amounts first; their scores
            sum to the pair's score. Empty for a pair that shares no word. Through the link of a frozen embedding the
            words of finetuning texts count as the query's too.

        Raises:
            QueryError: an estimator or gradients without words; ids that the store does not hold.
        """
        estimator, stage = self._bilinear("words")
        queries = self.estimator.asked(self.stage, self._queries([batch]))
        ids = table_of_ids(sample_ids, len(queries))
        with token_look_ups(self.user) as seen:
            self.measure(batch)
        terms = estimator.terms(stage)
        transformed = query_side(terms, queries, stage.projection)
        found = word_contributions(terms, transformed, stage, ids)
        texts = {table: token_sequences(seen, len(queries), table) for table in {look_up.table for look_up in seen}}
        tokens = [{table: of_table[q] for table, of_table in texts.items()} for q in range(len(queries))]
        return [[readable(words, tokens[q], decode) for words in row] for q, row in enumerate(found)]

    def self_influence(self) -> Tensor:
        """Score of every training sample for its own loss, (N,): high for mislabelled and atypical samples."""
        if self.answering[1].store is not self.store:
            raise QueryError(
                "a pretraining sample has no loss in the finetuning run, so no self-influence through it",
                expected="an estimator of one run",
                found=repr(self.estimator),
                hint="ask the pretraining run itself: InfluenceModule(pretrained, its_store, ...).self_influence()",
            )
        estimator, stage = self._bilinear("self_influence")
        return self_influence(stage, estimator)

    # -- of several queries, several samples, or parts of them ------------------------------------------------------

    def group_query(self, batches: Iterable[Any], k: int | None = None) -> Attribution:
        """Proponents and opponents of many queries together, such as a whole test set: of the sum of their
        measurements. One answer, in one pass.

        Args:
            batches: a loader of queries, or a list of batches.
        """
        queries = self._group(batches)
        answers = Attribution(torch.arange(1), *attribute(self.stage, self.estimator, queries, self._checked_k(k)))
        refuse_meaningless(self.estimator, answers)
        return answers

    def group_scores(self, batches: Iterable[Any]) -> Tensor:
        """All scores of many queries together, (N,): the sum of what `scores` says of each, in one pass."""
        return score_matrix(self.stage, self.estimator, self._group(batches))[0]

    def mixed(self, batch: Any, k: int | None = None) -> MixedAttribution:
        """Proponents and opponents of every query among the samples of all training runs that it goes back through, on
        one scale, and how much of the query comes from each run.

        Raises:
            QueryError: an estimator that is no `MultiStage`, or only ranks; a store without the runs' gradients.
        """
        wanted = self.k if k is None else k
        if not isinstance(wanted, Integral) or wanted < 1:
            raise QueryError("k must be positive", expected="an integer >= 1", found=repr(k), hint="leave k out")
        return mixed_attribution(self.stage, self.estimator, self._queries([batch]), int(wanted))

    def predict_removal(self, batch: Any, sample_ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Predicted change of each query's m when training samples are removed and the model is trained again.

            m(without S) - m = (1/N) Σ_{z ∈ S} score(q, z)

        Args:
            sample_ids: one set of samples; or several, each predicted for itself.

        Returns:
            (Q,) for one set, (Q, S) for several; in units of m, so a positive number means that m rises.

        Raises:
            QueryError: an estimator whose scores only rank, or ids that are no training samples.
        """
        one, sets = sets_of_ids(sample_ids)
        effects = removal_effects(self.stage, self.estimator, self._queries([batch]), sets)
        return effects[:, 0] if one else effects

    def token_scores(self, batch: Any, sample_ids: Tensor | Sequence[Sequence[int]]) -> list[list[TokenScores]]:
        """How the scores between each query and some training sequences spread over the tokens of these; for language
        models and others that work position by position. The samples run through the model again.

        Args:
            sample_ids: (Q, k), such as `attribution.proponents.sample_ids`.

        Raises:
            QueryError: no `train_loader`, samples without tokens, an estimator that is not bilinear.
        """
        estimator, stage = self._bilinear("token_scores")
        queries = self.estimator.asked(self.stage, self._queries([batch]))
        ids = table_of_ids(sample_ids, len(queries))
        terms = estimator.terms(stage)
        return token_scores(stage, terms, query_side(terms, queries, stage.projection), ids)

    def measure(self, batch: Any) -> Tensor:
        """The measurement m of each query, (Q,), at the weights that the module has now."""
        return self._gradients.measured(self.user, [batch])

    # -- choosing ---------------------------------------------------------------------------------------------------

    def choose_damping(
        self,
        held_out: Iterable[Any],
        *,
        removals: Removals | None = None,
        grid: Sequence[Damping] | None = None,
    ) -> DampingChoice:
        """Find the damping that foretells small removals best, and keep it in the store for
        `InfluenceFunction(damping="auto")`. See `damping_choice.choose_damping` for how.

        Args:
            held_out: queries that were held out of training, and are not those that will be asked about: a validation
                loader, or a list of batches.
            removals: how many parts are removed, how large, trained how long.
            grid: dampings to try.

        Raises:
            QueryError: no `train_loader`, an estimator without damping, or queries from the training set.
        """
        if not isinstance(self.estimator, InfluenceFunction):
            raise QueryError(
                f"{type(self.estimator).__name__} has no damping to choose",
                expected="an InfluenceFunction",
                found=type(self.estimator).__name__,
                hint="choose with InfluenceModule(module, store, InfluenceFunction(damping='auto'), train_loader=...)",
            )
        if self.train_loader is None:
            raise QueryError(
                "choose_damping trains copies of the model on, and there are no training data",
                expected="the training data",
                found="train_loader=None",
                hint="pass InfluenceModule(..., train_loader=train_loader)",
            )
        if isinstance(held_out, DataLoader):
            found = TrainingData.of(held_out, forked=True).fingerprint()
            if found == self.store.manifest.dataset_fingerprint:
                raise QueryError(
                    "a damping is judged by queries that were held out of training",
                    expected="another dataset, such as the validation set",
                    found="the training set itself",
                    hint="pass a loader of samples that the model has not seen, nor will be asked about",
                )
        batches = self._read(held_out)
        queries = self._queries(batches)
        gradients = self._gradients
        choice = choose_damping(
            self.stage,
            self.estimator,
            queries,
            lambda module: gradients.measured(module, batches),
            removals or Removals(),
            grid,
        )
        record_choice(self.store, self.estimator.recorded(self.stage).name, choice)
        self.__dict__.pop("store", None)  # to be opened anew, with the choice
        return choice

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def answering(self) -> tuple[Attributor, Stage]:
        """Who scores, and the run whose samples are scored: with `MultiStage` an earlier one than the one asked."""
        return self.estimator.answering(self.stage)

    def _bilinear(self, what: str, asked: Stage | None = None) -> tuple[Estimator, Stage]:
        estimator, stage = self.answering if asked is None else self.estimator.answering(asked)
        if not isinstance(estimator, Estimator):
            raise QueryError(
                f"{what} needs an estimator of the bilinear family",
                expected="TracIn, TracInWE, TracInLast, ...",
                found=type(estimator).__name__,
                hint="baselines only score whole samples",
            )
        return estimator, stage

    def _checked_k(self, k: int | None) -> int:
        return checked_k(self.k if k is None else k, self.answering[1].store.manifest.dataset_length)

    @property
    def _gradients(self) -> QueryGradients:
        return QueryGradients(self.stage, self.measurement)

    def _queries(self, batches: Sequence[Any], sizes: Sequence[int] | None = None) -> Queries:
        """Queries of one call; batches without sizes come from outside a Trainer."""
        return self._gradients.of(batches, sizes, self._trainer)

    def _group(self, batches: Iterable[Any]) -> Queries:
        """Many queries as one, the sum of their measurements."""
        return self._gradients.together(self._read(batches))

    def _read(self, batches: Iterable[Any]) -> Sequence[Any]:
        """The batches of a loader, or of a list; a loader draws its seed without a trace."""
        with isolated(self.user):
            return batches_of(batches)


def checked_k(k: int, length: int) -> int:
    """k itself, a number of training samples.

    Raises:
        QueryError: it is no integer from 1 to `length`.
    """
    if not isinstance(k, Integral) or not 1 <= k <= length:
        raise QueryError(
            "k does not fit the number of training samples",
            expected=f"an integer, 1 <= k <= {length}",
            found=f"k = {k!r}",
            hint="choose a k in this range",
        )
    return int(k)
