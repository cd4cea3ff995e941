"""InfluenceModule: a LightningModule that answers queries from a store, through `Trainer.predict` or directly."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.attribution import Attribution, attribute, refuse_meaningless, score_matrix, self_influence
from lightning_influence.errors import InfluenceError, QueryError
from lightning_influence.estimators.estimator import Attributor, Estimator, Queries, Stage, query_side
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.estimators.tracin import look_ups
from lightning_influence.fitted import check_model, check_training_data, rebuilt
from lightning_influence.gradients import GradientCapture, Gradients, Selection, cat, select
from lightning_influence.objective import Measurement, Objective, PerSample, query_objective
from lightning_influence.query_batches import Carried, laid_aside, num_queries, query_ids, refuse_idle_ranks
from lightning_influence.replay import isolated, sample_gradients, to_device
from lightning_influence.words import Decoders, WordContribution, readable, word_contributions

_UNLABELLED = (KeyError, IndexError, AttributeError, TypeError, ValueError)  # what a training_step raises then
_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class InfluenceModule(LightningModule):
    """Asks a finished fit which training samples made the model say what it says.

        influence = InfluenceModule(module, "run/influence", TracInWE())
        attributions = Trainer().predict(influence, query_loader)

    Queries are batches as the training loader brings them. Their gradients are taken at every checkpoint, each of which
    is loaded once however many batches there are; training gradients are read from the store in bounded memory. The
    module's weights, modes and gradients are left as they were.

    With several processes each scores its share of the queries, and `attribution` holds the answers to all of them on
    every rank. Processes that are spawned or forked keep what they know: give `save_to` and read `Attribution.load`.

    Memory: query batches wait in the main memory. The gradients of all queries are held on the module's device, for
    every checkpoint: queries x captured parameters x checkpoints, of which word embeddings have only the rows of the
    query's words (some 100 kB for a text of 100 words and 256 dimensions) and other layers all. Beyond a gigabyte they
    are held for one checkpoint at a time, if the scores (queries, samples) fit into a gigabyte; otherwise ask about
    fewer queries at a time.

    Args:
        module: the trained LightningModule; or its class, which is then built from the hyper-parameters in the store.
        store: folder of the artifacts, or an open store.
        estimator: how to score; any `Attributor`.
        measurement: what the query's influence is on (see `objective.query_objective`); default: the module's
            `measurement(batch)`, else its training loss. `"predicted_class"` for queries without labels.
        k: proponents and opponents for each query.
        train_loader: the training data, for attributors that look at samples; checked against the store.
        per_sample_loss: (module, batch) -> (N,), if the fit was given one.
        save_to: file in which rank zero saves the answers of `Trainer.predict`, with `Attribution.save`.

    Raises:
        StoreError: no store, a store of another model or of another dataset.
        QueryError: the estimator cannot answer from this store.
    """

    def __init__(
        self,
        module: LightningModule | type[LightningModule],
        store: str | Path | ArtifactStore,
        estimator: Attributor,
        *,
        measurement: Measurement | None = None,
        k: int = 10,
        train_loader: Any = None,
        per_sample_loss: PerSample | None = None,
        save_to: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(estimator, Attributor):
            raise QueryError(
                "this is no estimator",
                expected="an instance of an Attributor, such as TracInWE()",
                found=f"the class {estimator.__name__}" if isinstance(estimator, type) else repr(estimator),
                hint="write InfluenceModule(module, store, TracInWE()), with the brackets",
            )
        opened = store if isinstance(store, ArtifactStore) else ArtifactStore.open(store)
        self.store, self._root = opened, opened.root
        self.user = rebuilt(module, opened) if isinstance(module, type) else module
        check_model(self.user, opened)
        if train_loader is not None:
            check_training_data(train_loader, opened)
        self.estimator, self.measurement, self.k = estimator, measurement, k
        self.train_loader, self.save_to, self._per_sample_loss = train_loader, save_to, per_sample_loss
        self._merged: Attribution | None = None
        self._asked: list[tuple[Any, Attribution]] = []
        for hook in _TRANSFER_HOOKS:  # batches travel as they did in the fit
            if is_overridden(hook, self.user):
                setattr(self, hook, getattr(self.user, hook))

    @cached_property
    def store(self) -> ArtifactStore:
        """The artifacts that are asked."""
        return ArtifactStore.open(self._root)

    def __getstate__(self) -> dict[str, Any]:
        """All but the open store, which a spawned process opens again."""
        return {name: value for name, value in self.__dict__.items() if name != "store"}

    @property
    def stage(self) -> Stage:
        """The training run that is asked."""
        return Stage(self.store, self.user, self.train_loader)

    # -- asking directly --------------------------------------------------------------------------------------------

    def query(self, batch: Any, k: int | None = None) -> Attribution:
        """Proponents and opponents of every query in the batch, k of each."""
        queries = self._queries([batch])
        answers = Attribution(
            torch.arange(len(queries)), *attribute(self.stage, self.estimator, queries, self._checked_k(k))
        )
        refuse_meaningless(self.estimator, answers)
        return answers

    def scores(self, batch: Any) -> Tensor:
        """All scores of the batch, (Q, N): positive for proponents, training samples in dataset order.

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
            sum to the pair's score. Empty for a pair that shares no word.

        Raises:
            QueryError: an estimator or gradients without words; ids that the store does not hold.
        """
        queries, estimator = self._queries([batch]), self._bilinear("words")
        ids = _table_of_ids(sample_ids, len(queries))
        terms = estimator.terms(self.stage)
        with token_look_ups(self.user) as seen:
            transformed = query_side(terms, queries)
        found = word_contributions(terms, transformed, self.stage, ids)
        texts = {table: token_sequences(seen, len(queries), table) for table in {look_up.table for look_up in seen}}
        tokens = [{table: of_table[q] for table, of_table in texts.items()} for q in range(len(queries))]
        return [[readable(words, tokens[q], decode) for words in row] for q, row in enumerate(found)]

    def self_influence(self) -> Tensor:
        """Score of every training sample for its own loss, (N,): high for mislabelled and atypical samples."""
        return self_influence(self.stage, self._bilinear("self_influence"))

    # -- asking through a Trainer -----------------------------------------------------------------------------------

    @property
    def attribution(self) -> Attribution:
        """The answers to all queries of the last `Trainer.predict`, of every rank, in the order of the query dataset.

        Raises:
            QueryError: there are none in this process.
        """
        if self._merged is None:
            raise QueryError(
                "nothing was asked yet, or it was asked in other processes",
                expected="a finished Trainer.predict",
                hint="run trainer.predict first; with ddp_spawn or ddp_fork, Attribution.load(save_to)",
            )
        return self._merged

    def setup(self, stage: str) -> None:
        """Switch inference mode off, under which no gradient exists, and refuse what would be lost or could not start.

        Raises:
            QueryError: more processes than queries; spawned processes and no `save_to`.
        """
        if self._trainer is None or stage != "predict":
            return
        self.trainer.predict_loop.inference_mode = False
        refuse_idle_ranks(self.trainer)
        if self.save_to is None and isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise QueryError(
                "the answers would be lost with the processes that this strategy starts",
                expected="a file to save them in",
                found=f"{type(self.trainer.strategy).__name__} and save_to=None",
                hint="pass InfluenceModule(..., save_to='answers.safetensors'), or use strategy='ddp'",
            )

    def on_predict_model_eval(self) -> None:
        """Leave the user's modes alone: queries run in an eval mode of their own, which they undo."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the user's gradients alone, which a Trainer would clear."""

    def on_predict_epoch_start(self) -> None:
        """Forget the queries of an earlier epoch."""
        self._asked, self._merged = [], None

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Attribution:
        """Note the queries; they are scored together at the end of the epoch."""
        seen = sum(len(answer) for _, answer in self._asked)
        answer = Attribution(query_ids(self.trainer, batch, batch_idx, dataloader_idx, seen))
        self._asked.append((laid_aside(batch), answer))
        return answer

    def on_predict_epoch_end(self) -> None:
        """Score all queries of this rank at once, fill the answers, and merge those of all ranks.

        A refusal on one rank is raised on all of them, so that none waits for ever. A refusal of some of the answers
        (`TracInWE(unmatched="raise")`) comes last: the others are filled, saved and in `attribution`.
        """
        asked, self._asked = self._asked, []
        outcome: list[Attribution] | InfluenceError
        try:
            outcome = self._answered(asked)
        except InfluenceError as error:
            outcome = error
        outcomes = [outcome]
        if self.trainer.world_size > 1:
            outcomes = outcomes * self.trainer.world_size
            torch.distributed.all_gather_object(outcomes, outcome)
        answers: list[Attribution] = []
        for found in outcomes:
            if isinstance(found, InfluenceError):
                raise found
            answers += found
        self._merged = Attribution.joined(answers) if answers else None
        if self._merged is None:
            return
        try:
            if self.save_to is not None and self.trainer.is_global_zero:
                self._merged.save(self.save_to)
        finally:
            self.trainer.strategy.barrier("answers saved")  # a rank that refuses may end the others
        refuse_meaningless(self.estimator, self._merged)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _answered(self, asked: Sequence[tuple[Any, Attribution]]) -> list[Attribution]:
        answers = [answer for _, answer in asked]
        if not answers:
            return []
        queries = self._queries([batch for batch, _ in asked], [len(answer) for answer in answers])
        proponents, opponents = attribute(self.stage, self.estimator, queries, self._checked_k(None))
        start = 0
        for answer in answers:
            rows = slice(start, start + len(answer))
            answer.fill(proponents[rows], opponents[rows])
            start = rows.stop
        return answers

    def _bilinear(self, what: str) -> Estimator:
        if not isinstance(self.estimator, Estimator):
            raise QueryError(
                f"{what} needs an estimator of the bilinear family",
                expected="TracIn, TracInWE, TracInLast, ...",
                found=type(self.estimator).__name__,
                hint="baselines only score whole samples",
            )
        return self.estimator

    def _checked_k(self, k: int | None) -> int:
        k = self.k if k is None else k
        length = self.store.manifest.dataset_length
        if not isinstance(k, Integral) or not 1 <= k <= length:
            raise QueryError(
                "k does not fit the number of training samples",
                expected=f"an integer, 1 <= k <= {length}",
                found=f"k = {k!r}",
                hint="choose a smaller k",
            )
        return k

    def _queries(self, batches: Sequence[Any], sizes: Sequence[int] | None = None) -> Queries:
        """Queries of one call; batches without sizes come from outside a Trainer and are moved first."""
        check_model(self.user, self.store)
        trainer = None if sizes is None else self._trainer
        if sizes is None:
            sizes = [num_queries(batch) for batch in batches]
            batches = [laid_aside(to_device(batch, self.user, None)) for batch in batches]
        placed = Carried(batches, self.user)
        return Queries(placed, sizes, lambda at, names: self._gradients_at(at, names, placed, sizes, trainer))

    def _gradients_at(
        self,
        at: Checkpoint,
        names: Collection[str],
        batches: Sequence[Any],
        sizes: Sequence[int],
        trainer: Trainer | None,
    ) -> Gradients:
        """Per-query gradients of the measurement at the weights of a checkpoint."""
        capture = GradientCapture(self._selection(names))
        parts = []
        with self.stage.at(at) as module, isolated(module, trainer) as manual_losses:
            options = self._loss_options(manual_losses)
            for batch, size in zip(batches, sizes, strict=True):

                def objective(batch: Any = batch, size: int = size) -> Any:
                    return self._objective(module, batch, size, options)

                parts.append(sample_gradients(module, capture, size, objective, trainer)[0])
        return cat(parts)

    def _objective(self, module: LightningModule, batch: Any, size: int, options: dict[str, Any]) -> Objective:
        own = callable(self.measurement) or self.measurement == "predicted_class"
        own = own or (self.measurement is None and callable(getattr(module, "measurement", None)))
        try:
            return query_objective(module, batch, size, self.measurement, **options)
        except _UNLABELLED as error:
            if own:
                raise
            raise QueryError(
                f"the training_step of {type(module).__name__} failed on a query: {type(error).__name__}: {error}",
                expected="queries as the training loader brings them, with their labels",
                found=f"a batch of {size} queries, of type {type(batch).__name__}",
                hint="for queries without labels ask with InfluenceModule(..., measurement='predicted_class'), or give "
                "measurement=(module, batch) -> (N,)",
            ) from error

    def _selection(self, names: Collection[str]) -> Selection:
        """The parameters as the fit selected them: of tied embeddings it may have taken the look-ups alone."""
        alone = [name for name in look_ups(self.store) if name in names]
        whole = [name for name in names if name not in alone]
        return select(self.user, ["word_embeddings", *whole] if alone else whole)

    def _loss_options(self, manual_losses: list[Tensor]) -> dict[str, Any]:
        if self.measurement not in (None, "loss"):
            return {}
        return {
            "per_sample_loss": self._per_sample_loss,
            "reduction": self.store.manifest.settings.get("reduction", "mean"),
            "manual_losses": manual_losses,
        }


def _table_of_ids(sample_ids: Tensor | Sequence[Sequence[int]], num_queries: int) -> Tensor:
    """(Q, k) int64 on the CPU."""
    try:
        ids = torch.as_tensor(sample_ids).cpu()
        found = f"shape {tuple(ids.shape)} and {ids.dtype}"
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, text
        ids, found = torch.zeros(0), f"{type(error).__name__}: {error}"
    if ids.ndim != 2 or len(ids) != num_queries or ids.is_floating_point() or ids.dtype == torch.bool:
        raise QueryError(
            "sample_ids must name some samples for each query",
            expected=f"integers of shape ({num_queries}, k)",
            found=found,
            hint="pass attribution.proponents.sample_ids of the same batch",
        )
    return ids.long()
