"""TrainingStream: one predict epoch in which the training data pass by the prepared queries, in every process."""

from __future__ import annotations

from collections.abc import Callable, Collection
from numbers import Integral
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.attribution import Attribution, TopK
from lightning_influence.errors import CaptureError, InfluenceError, LossError, QueryError
from lightning_influence.estimators.estimator import Stage
from lightning_influence.fitted import check_training_data
from lightning_influence.gradients import Selection
from lightning_influence.objective import training_objective
from lightning_influence.replay import TrainingData, isolated
from lightning_influence.self_check import self_check
from lightning_influence.streaming.batch_scores import batch_scores
from lightning_influence.streaming.held_weights import HeldWeights
from lightning_influence.streaming.prepared import Part, Prepared
from lightning_influence.streaming.score_file import ScoreFile

_SAME = 0.05  # relative distance up to which a batch that is scored again has the scores on disk


class TrainingStream:
    """Scores the training batches of one process, keeps the first k of both ends, and merges those of all processes.

    Args:
        prepared: the queries.
        stage: store, module and loss.
        trainer: inside its predict epoch.
        selection: from parameter names to the layers that are captured.
        k: proponents and opponents of each query.

    Raises:
        QueryError: a loader whose samples have no positions.
        StoreError: another training set than that of the fit.
        CaptureError, LossError: the check on the first samples failed (see `self_check`).
    """

    def __init__(
        self,
        prepared: Prepared,
        stage: Stage,
        trainer: Trainer,
        selection: Callable[[Collection[str]], Selection],
        k: int,
    ) -> None:
        assert stage.module is not None
        self._prepared, self._stage, self._trainer, self._k = prepared, stage, trainer, k
        self._module: LightningModule = stage.module
        self._loader = _training_loader(trainer)
        check_training_data(self._loader, stage.store)
        self._weights = HeldWeights(self._module, stage.store, [part.at for part in prepared.parts])
        self._parts = [(part.to(self._module.device), selection(part.parameters)) for part in prepared.parts]
        self._check_first_samples()
        self._seen = bytearray(stage.store.manifest.dataset_length)  # a byte for each sample
        self._highest, self._lowest = self._tops()
        self._failure: InfluenceError | None = None
        self._witness: dict[int, Tensor] = {}  # sample id -> scores (Q,) of an earlier run, to be seen once again
        self._file = self._opened_file()

    def step(self, batch: Any, batch_idx: int) -> Tensor:
        """Score the samples of a batch that were not scored before; returns the positions of all of them, (B,).

        What the library refuses in one of several processes is raised at the end in all of them.
        """
        ids = self._positions(batch_idx)
        if self._failure is None:
            try:
                self._take(batch, ids)
            except InfluenceError as failure:
                if self._trainer.world_size == 1:
                    raise
                self._failure = failure
        return torch.tensor(ids)

    def finish(self) -> Attribution:
        """The answers of all processes together, the same in each.

        Raises:
            QueryError: fewer samples than k have passed; whatever one of the processes has refused.
        """
        world, own = self._trainer.world_size, (self._failure, self._highest, self._lowest)
        if self._file is not None:
            self._file.close()
        outcomes = [own]
        if world > 1:
            outcomes = outcomes * world
            torch.distributed.all_gather_object(outcomes, own)
        for failure, *_ in outcomes:
            if failure is not None:
                raise failure
        if self._file is not None:
            try:
                if self._trainer.is_global_zero:
                    self._file.join()
            finally:
                self._trainer.strategy.barrier("scores joined")  # a full disk must not leave the others waiting
        highest, lowest = self._tops()
        for _, high, low in outcomes:
            highest.merge(high)
            lowest.merge(low)
        if highest.found < self._k:
            raise QueryError(
                "k exceeds the number of training samples that passed by",
                expected=f"k <= {highest.found}",
                found=f"k = {self._k}",
                hint="choose a smaller k, or let the Trainer see more of the data (limit_predict_batches)",
            )
        return Attribution(torch.arange(self._prepared.num_queries), highest.ranking(), lowest.ranking())

    # -- one batch --------------------------------------------------------------------------------------------------

    def _take(self, batch: Any, ids: list[int]) -> None:
        fresh = []
        for place, sample in enumerate(ids):  # a sampler may bring a sample twice
            if not self._seen[sample]:
                self._seen[sample] = 1
                fresh.append(place)
        known = [place for place, sample in enumerate(ids) if sample in self._witness]
        if not fresh and not known:
            return
        scores = self._scores(batch, ids)
        if known:
            self._compare(scores[:, known], torch.stack([self._witness[ids[place]] for place in known], 1))
        if fresh:
            self._keep(torch.tensor([ids[place] for place in fresh]), scores[:, fresh])

    def _keep(self, ids: Tensor, scores: Tensor) -> None:
        if self._file is not None:
            scores = scores.float()  # the same answers whether a run went through or was resumed
            self._file.append(ids, scores)
        self._rank(ids, scores)

    def _rank(self, ids: Tensor, scores: Tensor) -> None:
        every = slice(0, self._prepared.num_queries)
        self._highest.update(every, ids, scores)
        self._lowest.update(every, ids, scores)

    def _scores(self, batch: Any, ids: list[int]) -> Tensor:
        """(Q, B), summed over the checkpoints; the module is left as it was."""
        total: Tensor | None = None
        with self._weights.in_turn() as put:
            for part, selection in self._parts:
                put(part.at)
                try:
                    scores = self._part_scores(part, selection, batch, len(ids))
                except (CaptureError, LossError) as error:
                    raise type(error)(
                        f"{error.what}, in the training samples {_told(ids)}",
                        expected=error.expected,
                        found=error.found,
                        hint=error.hint,
                    ) from error
                total = scores if total is None else total + scores
        assert total is not None
        bad = (~torch.isfinite(total)).any(0).nonzero().squeeze(1).tolist()
        if bad:
            raise CaptureError(
                "the gradient of a training sample is NaN or infinite",
                expected="finite gradients",
                found=f"scores that are not finite for the samples {_told([ids[place] for place in bad])}",
                hint="look at these samples, and at the precision of the Trainer",
            )
        return total

    def _part_scores(self, part: Part, selection: Selection, batch: Any, size: int) -> Tensor:
        module, trainer = self._module, self._trainer
        with isolated(module, trainer) as manual_losses:
            return batch_scores(
                module,
                selection,
                part,
                size,
                lambda: training_objective(
                    module,
                    batch,
                    size,
                    per_sample_loss=self._stage.per_sample_loss,
                    reduction=self._stage.reduction,
                    manual_losses=manual_losses,
                ),
                trainer,
            )

    def _positions(self, batch_idx: int) -> list[int]:
        """Where the samples of a batch stand in the training set; Lightning's batch sampler has noted it."""
        noted = self._loader.batch_sampler.seen_batch_indices  # type: ignore[union-attr]
        positions = noted[batch_idx] if batch_idx < len(noted) else []
        ids = [int(p) for p in positions if isinstance(p, Integral)]
        if not ids or len(ids) < len(positions) or min(ids) < 0 or max(ids) >= len(self._seen):
            raise _no_positions(f"a batch sampler that yields {positions!r}")
        return ids

    # -- the beginning ----------------------------------------------------------------------------------------------

    def _check_first_samples(self) -> None:
        part, selection = self._parts[-1]
        data = TrainingData.of(self._loader, forked=True)
        with self._weights.in_turn() as put:
            put(part.at)
            check = self_check(self._module, selection, data, self._trainer, self._stage.per_sample_loss)
        if check.reduction != self._stage.reduction:
            raise LossError(
                "the loss reduces its batch in another way than in the fit",
                expected=f"a {self._stage.reduction} over samples",
                found=f"a {check.reduction}",
                hint="pass the module that was fitted, with the same loss",
            )

    def _tops(self) -> tuple[TopK, TopK]:
        queries = self._prepared.num_queries
        return TopK(queries, self._k), TopK(queries, self._k, largest=False)

    def _opened_file(self) -> ScoreFile | None:
        path = self._prepared.scores_file
        if path is None:
            return None
        length, queries = self._stage.store.manifest.dataset_length, self._prepared.num_queries
        file = ScoreFile(path, self._prepared.recognised, queries, length, self._trainer.global_rank)
        for ids, scores in file.records():
            if not self._witness:
                self._witness = {int(i): scores[:, place] for place, i in enumerate(ids[:64].tolist())}
            fresh = [place for place, i in enumerate(ids.tolist()) if not self._seen[i]]
            for place in fresh:
                self._seen[int(ids[place])] = 1
            if fresh and self._trainer.is_global_zero:
                self._rank(ids[fresh], scores[:, fresh])
        return file

    def _compare(self, scores: Tensor, recorded: Tensor) -> None:
        """Refuse to go on with scores that are not what is computed now."""
        self._witness = {}
        now, then = scores.double().cpu(), recorded.double()
        if float((now - then).norm()) > _SAME * max(float(now.norm()), float(then.norm())):
            raise QueryError(
                f"the scores in {self._prepared.scores_file} are not those of these queries",
                expected="for a batch that is scored again, the scores that were written",
                found=f"scores that differ by {float((now - then).norm() / then.norm()):.2g} of their size",
                hint="the measurement, the loss or the model has changed: choose another scores_file",
            )


def _training_loader(trainer: Trainer) -> DataLoader[Any]:
    """The one loader of the predict epoch.

    Raises:
        QueryError: several, or one whose samples have no positions.
    """
    combined = trainer.predict_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    if len(loaders) != 1:
        raise QueryError(
            "prepared queries wait for one training loader",
            expected="Trainer().predict(influence, train_loader)",
            found=f"{len(loaders)} loaders",
            hint="pass the loader of the fit, or join the datasets as they were joined there; call "
            "influence.unprepare() to ask with queries again",
        )
    (loader,) = loaders
    if not isinstance(loader, DataLoader):
        raise _no_positions(f"a {type(loader).__name__}")
    if isinstance(loader.dataset, IterableDataset):
        raise _no_positions(f"{type(loader.dataset).__name__}, a stream")
    if not hasattr(loader.batch_sampler, "seen_batch_indices"):
        raise _no_positions("batches that are not made of single samples (batch_size=None)")
    if loader.num_workers > 0 and getattr(loader, "in_order", True) is False:
        raise _no_positions("in_order=False")
    return loader


def _no_positions(found: str) -> QueryError:
    return QueryError(
        "the positions of the training samples cannot be known",
        expected="a DataLoader of a map-style dataset that collates single samples, in any order",
        found=found,
        hint="pass DataLoader(train_dataset, batch_size=...); scores of streams come from records made in flight",
    )


def _told(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
