"""InfluenceModule: a LightningModule that answers queries from a store, through `Trainer.predict` or directly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore
from lightning_influence.attribution import Attribution, attribute, refuse_meaningless
from lightning_influence.errors import InfluenceError, QueryError
from lightning_influence.estimators.estimator import Attributor
from lightning_influence.fitted import check_model, check_training_data, rebuilt
from lightning_influence.objective import Measurement, PerSample
from lightning_influence.queries import QueryGradients, laid_aside, query_ids, refuse_idle_ranks
from lightning_influence.questions import Questions
from lightning_influence.streaming import Prepared, TrainingStream, prepare, read_scores

_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class InfluenceModule(Questions, LightningModule):
    """Asks a finished fit which training samples made the model say what it says.

        influence = InfluenceModule(module, "run/influence", TracInWE())
        attributions = Trainer().predict(influence, query_loader)

    Queries are batches as the training loader brings them. Their gradients are taken at every checkpoint, each of which
    is loaded once however many batches there are; training gradients are read from the store in bounded memory. The
    module's weights, modes and gradients are left as they were.

    Where the gradients of training samples are too big to store (a store of weights and curvature is enough), the roles
    change: the queries are prepared, and the training data stream past them.

        influence = InfluenceModule(module, "run/influence", InfluenceFunction("ekfac"))
        influence.prepare(query_loader)
        Trainer().predict(influence, train_loader)
        influence.attribution

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
            `measurement(batch)`, else its training loss. `"predicted_class"` for queries without labels: the loss of
            the class that the fitted model, at the last checkpoint, predicts; at every checkpoint of that class.
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
        self._prepared: Prepared | None = None
        self._stream: TrainingStream | None = None
        for hook in _TRANSFER_HOOKS:  # batches travel as they did in the fit
            if is_overridden(hook, self.user):
                setattr(self, hook, getattr(self.user, hook))

    def __getstate__(self) -> dict[str, Any]:
        """All but the open store, which a spawned process opens again, and a stream that has ended."""
        return {name: None if name == "_stream" else value for name, value in self.__dict__.items() if name != "store"}

    # -- asking while the training data stream by -------------------------------------------------------------------

    def prepare(
        self,
        queries: Iterable[Any],
        *,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        scores_file: str | os.PathLike[str] | None = None,
    ) -> Prepared:
        """Take the gradients of queries now; until `unprepare`, `Trainer.predict` is then given the training loader.

        Training gradients meet the queries as they arise and are not kept; where it is cheaper they are never formed.
        Scores are those that stored gradients would give. The loader may shuffle, and have batches of any size; with
        `limit_predict_batches` the samples that passed by are ranked. Several processes share the training set.
        `Trainer.predict` returns the positions of each batch's samples; the answers are in `attribution`, in the order
        in which the queries were given.

        Args:
            queries: a loader of queries, or a list of batches.
            rank: keep of each query's gradient of a weight matrix only the part of this rank, where that is smaller
                (Grosse et al. 2023, 2308.03296); the returned `relative_error` says what is lost.
            dtype: type in which query gradients are held, such as `torch.bfloat16`; products are accumulated in float32
                or more, those of each parameter with bfloat16 then rounded to it.
            scores_file: also keep every score, float32, in this safetensors file: `streamed_scores`. A run that was
                killed goes on where it was when the same queries are prepared and the same file is given.

        Raises:
            QueryError: no queries; an estimator that looks at samples, or at records made in flight.
        """
        batches = self._read(queries)
        about = self.measurement if isinstance(self.measurement, str) else getattr(self.measurement, "__qualname__", "")
        self._prepared, self._merged = None, None
        asked = replace(self.stage, stored=False)
        estimator, stage = self._bilinear("prepare", asked)
        if stage.module is None:
            raise QueryError(
                "pretraining data can stream by only where the pretraining module is",
                expected="the module that they trained",
                found="none",
                hint="pass MultiStage(..., module=pretrained)",
            )
        self._prepared = prepare(
            stage,
            estimator,
            batches,
            lambda some: self.estimator.asked(asked, self._queries(some)),
            rank=rank,
            dtype=dtype,
            scores_file=None if scores_file is None else Path(scores_file),
            question=about if stage.store is self.store else f"{about} {self.estimator!r} {self._known_by()}",
        )
        return self._prepared

    def unprepare(self) -> None:
        """Forget prepared queries: `Trainer.predict` is given query loaders again."""
        self._prepared, self._stream = None, None

    @property
    def streamed_scores(self) -> Tensor:
        """All scores of the prepared queries, (Q, N) float32 from `scores_file`, memory-mapped; NaN where a sample has
        not passed by. `safetensors.torch.load_file(path)["scores"]` is the same.

        Raises:
            QueryError: no file was asked for.
            StoreError: the stream has not come to its end.
        """
        path = None if self._prepared is None else self._prepared.scores_file
        if path is None:
            raise QueryError(
                "no scores were kept",
                expected="influence.prepare(queries, scores_file='scores.safetensors'), and then Trainer.predict",
                hint="without a file the first k of both ends are in influence.attribution",
            )
        return read_scores(path)

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
        if self._prepared is not None:  # Lightning's advice for evaluation: here the order does not matter
            warnings.filterwarnings("ignore", "Your `predict_dataloader`'s sampler has shuffling enabled")
        refuse_idle_ranks(self.trainer, "queries" if self._prepared is None else "training samples")
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
        """Forget the queries of an earlier epoch; look at the training data that are to stream by."""
        self._asked, self._merged, self._stream = [], None, None
        if self._prepared is not None:
            stage = self.estimator.answering(replace(self.stage, stored=False))[1]
            assert stage.module is not None
            check_model(stage.module, stage.store)
            selection = QueryGradients(stage, None).selection
            self._stream = TrainingStream(self._prepared, stage, self.trainer, selection, self._checked_k(None))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Attribution | Tensor:
        """Note the queries; they are scored together at the end of the epoch. With prepared queries: score the training
        samples of the batch, and return their positions."""
        if self._stream is not None:
            return self._stream.step(batch, batch_idx)
        seen = sum(len(answer) for _, answer in self._asked)
        answer = Attribution(query_ids(self.trainer, batch, batch_idx, dataloader_idx, seen))
        self._asked.append((laid_aside(batch), answer))
        return answer

    def on_predict_epoch_end(self) -> None:
        """Score all queries of this rank at once, fill the answers, and merge those of all ranks.

        A refusal on one rank is raised on all of them, so that none waits for ever. A refusal of some of the answers
        (`TracInWE(unmatched="raise")`) comes last: the others are filled, saved and in `attribution`.
        """
        stream, self._stream = self._stream, None
        self._merged = self._merged_answers() if stream is None else stream.finish()
        if self._merged is None:
            return
        try:
            if self.save_to is not None and self.trainer.is_global_zero:
                self._merged.save(self.save_to)
        finally:
            self.trainer.strategy.barrier("answers saved")  # a rank that refuses may end the others
        refuse_meaningless(self.estimator, self._merged)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _known_by(self) -> str:
        """What scores through this run depend on of its store."""
        return f"{self.store.identity} {[file.sha256 for file in self.store.artifacts('curvature')]} {self.store.link}"

    def _merged_answers(self) -> Attribution | None:
        """The answers to the queries of all ranks."""
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
        return Attribution.joined(answers) if answers else None

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
