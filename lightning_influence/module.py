"""InfluenceModule: a LightningModule that answers queries from a store, through `Trainer.predict` or directly."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.attribution import Attribution, attribute, score_matrix, self_influence
from lightning_influence.errors import InfluenceError, QueryError
from lightning_influence.estimators.estimator import Attributor, Estimator, Queries, Stage, query_side
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.estimators.tracin import look_ups
from lightning_influence.fitted import check_model, check_training_data, rebuilt
from lightning_influence.gradients import GradientCapture, Gradients, Selection, cat, select
from lightning_influence.objective import Measurement, PerSample, query_objective
from lightning_influence.replay import isolated, sample_gradients, to_device
from lightning_influence.words import Decode, WordContribution, readable, word_contributions

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
        proponents, opponents = attribute(self.stage, self.estimator, queries, self._checked_k(k))
        return Attribution(torch.arange(len(queries)), proponents, opponents)

    def scores(self, batch: Any) -> Tensor:
        """All scores of the batch, (Q, N): positive for proponents, training samples in dataset order."""
        return score_matrix(self.stage, self.estimator, self._queries([batch]))

    def words(
        self, batch: Any, sample_ids: Tensor | Sequence[Sequence[int]], decode: Decode | None = None
    ) -> list[list[list[WordContribution]]]:
        """The words that carry the scores between each query and some training samples.

        Args:
            sample_ids: (Q, k), such as `attribution.proponents.sample_ids`.
            decode: token id -> text; subwords are merged into words.

        Returns:
            For each query and sample the shared words, largest amounts first; their scores sum to the pair's score.

        Raises:
            QueryError: an estimator or gradients without words; ids that the store does not hold.
        """
        ids = torch.as_tensor(sample_ids)
        queries, estimator = self._queries([batch]), self._bilinear("words")
        if ids.ndim != 2 or len(ids) != len(queries) or ids.is_floating_point():
            raise QueryError(
                "sample_ids must name some samples for each query",
                expected=f"integers of shape ({len(queries)}, k)",
                found=f"shape {tuple(ids.shape)} and {ids.dtype}",
                hint="pass attribution.proponents.sample_ids of the same batch",
            )
        terms = estimator.terms(self.stage)
        with token_look_ups(self.user) as seen:
            transformed = query_side(terms, queries)
        found = word_contributions(terms, transformed, self.stage, ids.cpu())
        tokens = token_sequences(seen, len(queries))
        return [[readable(pairs, tokens[q], decode) for pairs in row] for q, row in enumerate(found)]

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
        _refuse_idle_ranks(self.trainer)
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
        answer = Attribution(_query_ids(self.trainer, batch, batch_idx, dataloader_idx, seen))
        self._asked.append((batch, answer))
        return answer

    def on_predict_epoch_end(self) -> None:
        """Score all queries of this rank at once, fill the answers, and merge those of all ranks.

        A refusal on one rank is raised on all of them, so that none waits for ever.
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
        if self.save_to is not None and self._merged is not None and self.trainer.is_global_zero:
            self._merged.save(self.save_to)

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
        if not 1 <= k <= length:
            raise QueryError(
                "k does not fit the number of training samples",
                expected=f"1 <= k <= {length}",
                found=f"k = {k}",
                hint="choose a smaller k",
            )
        return k

    def _queries(self, batches: Sequence[Any], sizes: Sequence[int] | None = None) -> Queries:
        """Queries of one call; batches without sizes come from outside a Trainer and are moved first."""
        check_model(self.user, self.store)
        trainer = None if sizes is None else self._trainer
        if sizes is None:
            sizes = [_num_queries(batch) for batch in batches]
            batches = [to_device(batch, self.user, None) for batch in batches]
        with torch.inference_mode(False):
            placed = [apply_to_collection(batch, Tensor, _followed) for batch in batches]
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
                    return query_objective(module, batch, size, self.measurement, **options)

                parts.append(sample_gradients(module, capture, size, objective, trainer)[0])
        return cat(parts)

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


def _followed(tensor: Tensor) -> Tensor:
    """A tensor that autograd accepts: somebody may have wrapped everything in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def _num_queries(batch: Any) -> int:
    """Number of queries in a batch that comes without a loader: what its tensors and lists of values agree on."""
    sizes = set(_leading_sizes(batch))
    if len(sizes) != 1:
        raise QueryError(
            "the number of queries in this batch cannot be told",
            expected="tensors and lists of one length, the number of queries first",
            found=f"lengths {sorted(sizes)}" if sizes else "no tensors",
            hint="ask through Trainer.predict, whose loader knows how many samples make a batch",
        )
    return sizes.pop()


def _leading_sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _leading_sizes(part)
    elif isinstance(batch, (list, tuple)):
        if all(isinstance(part, (str, bytes, int, float)) for part in batch):
            yield len(batch)
        for part in batch:
            yield from _leading_sizes(part)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _leading_sizes(getattr(batch, field.name))


def _query_ids(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int, seen: int) -> Tensor:
    """Positions of the queries of a batch in the predict datasets, laid end to end.

    Lightning's batch sampler notes them. Where there is none (a stream, batches made by the dataset), queries are
    numbered as they come, the ranks taking turns.
    """
    combined = trainer.predict_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    noted = getattr(getattr(loaders[dataloader_idx], "batch_sampler", None), "seen_batch_indices", [])
    positions = noted[batch_idx] if batch_idx < len(noted) else []
    lengths = [_length(loader) for loader in loaders[:dataloader_idx]]
    if positions and all(type(p) is int for p in positions) and None not in lengths:
        return torch.tensor(positions) + sum(length or 0 for length in lengths)
    return torch.arange(seen, seen + _num_queries(batch)) * trainer.world_size + trainer.global_rank


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _refuse_idle_ranks(trainer: Trainer) -> None:
    """QueryError if a loader has fewer queries than there are processes to share them."""
    world = trainer.world_size
    if world == 1 or not trainer._accelerator_connector.use_distributed_sampler:
        return
    source = trainer.predict_loop._data_source
    for loader in CombinedLoader(source.dataloader(), "sequential").flattened if source.is_defined() else []:
        count = _length(loader) if isinstance(loader, DataLoader) else None
        if count is not None and count < world:
            raise QueryError(
                "there are fewer queries than processes",
                expected=f"at least {world} queries",
                found=f"{count} queries",
                hint=f"use Trainer(devices={max(1, count)}) or fewer",
            )
