"""GradientSnapshot: the callback that logs checkpoint gradients for TracIn and TracIn-WE while a Trainer fits."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.callbacks.arguments import (
    folder_or_none,
    goes_with,
    names,
    one_of,
    positive,
    projection_or_none,
)
from lightning_influence.callbacks.capture_plan import DTYPES, CapturePlan
from lightning_influence.callbacks.checkpointing import commit_checkpoint, write_checkpoint
from lightning_influence.callbacks.in_flight_recorder import InFlightRecorder
from lightning_influence.callbacks.opening import manifest_of, open_store, training_data
from lightning_influence.callbacks.optimizer_record import OptimizerRecord
from lightning_influence.callbacks.replay_recorder import write_replay
from lightning_influence.callbacks.run_cost import RunCost, announce
from lightning_influence.callbacks.staleness import Staleness
from lightning_influence.callbacks.train_mode import warn_of_train_mode
from lightning_influence.callbacks.trainer_support import refuse_strategy, shared_folder
from lightning_influence.errors import StoreError
from lightning_influence.gradients import Projection, select
from lightning_influence.objective import PerSample
from lightning_influence.replay import TrainingData
from lightning_influence.samples import SampleId, SampleTracker
from lightning_influence.self_check import self_check


class GradientSnapshot(Callback):
    """Save weights, learning rates and per-sample training gradients, for TracIn (Pruthi et al. 2020, 2002.08484) and
    TracIn-WE (Yeh et al. 2022, 2202.11844) queries after the fit.

    Training is bit-identical with and without it. `mode="replay"` (exact TracInCP) walks the training set at the
    weights of each checkpoint, in eval mode, for about 0.7 of an epoch's time. `mode="in_flight"` takes the rows in the
    user's own backward pass, in train mode, at the weights that train on each sample, for almost nothing.

    Args:
        store: folder of the artifacts; `None` is `influence` below the Trainer's log directory.
        parameters: `"word_embeddings"`, `"last_layer"`, `"all"`, or glob(s) over parameter names.
        mode: `"replay"` or `"in_flight"`.
        every_n_epochs: checkpoint at the end of every n-th epoch.
        every_n_steps: checkpoint every n optimizer steps instead.
        top_words: words kept per sample in word-embedding gradients, those of largest norm; `None` keeps all.
        dtype: of the stored gradients; products are always accumulated in float32 or more.
        projection: store projected gradients, a few hundred numbers a parameter: `FactorProjection(rank)` (LoGra) or
            `RandomProjection(size)` (TRAK). Queries are projected likewise; words can no longer be told apart.
        features: also store what goes into the last layer, a row a sample, by replay: for `NearestFirst`.
        dataloader: replay this loader instead of the Trainer's (no shuffling needed).
        sample_id: key or function of a batch that gives sample ids where they cannot be known (streams), in flight.
        per_sample_loss: (module, batch) -> (N,), for replay; default: the module's method of that name, or
            training_step's mean. In flight the rows are always those of training_step.
        log: also log the measured overhead to the Trainer's loggers.

    Raises:
        UnsupportedError: arguments that do not go together; FSDP, DeepSpeed and other sharding strategies; loaders that
            cannot be walked.
        StoreError: the folder holds something else, or too little disk is free.
        CaptureError, LossError, SampleIdError: the self-check of the first batch failed; training has not begun.

    Later findings end the fit as well, by an error that names the samples or the training batch: a gradient that is
    NaN or infinite, a batch for which training_step returns no loss in replay, a full disk. What was committed before
    stays whole and can be queried.
    """

    def __init__(
        self,
        store: str | Path | None = None,
        parameters: str | Sequence[str] = "word_embeddings",
        *,
        mode: Literal["replay", "in_flight"] = "replay",
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        top_words: int | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32",
        projection: Projection | None = None,
        features: bool = False,
        dataloader: Any = None,
        sample_id: SampleId | None = None,
        per_sample_loss: PerSample | None = None,
        log: bool = False,
    ) -> None:
        one_of("mode", mode, ("replay", "in_flight"))
        one_of("dtype", dtype, tuple(DTYPES))
        positive(every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, top_words=top_words)
        folder_or_none("store", store)
        projection_or_none(projection, top_words)
        goes_with(
            mode,
            {
                "per_sample_loss": ("replay", per_sample_loss, "in flight the rows are those of training_step's loss"),
                "features": ("replay", features or None, "in flight each sample is seen at other weights"),
                "sample_id": ("in_flight", sample_id, "replay walks the training set by position: ids are positions"),
            },
        )
        self.store = store
        self.parameters = names("parameters", parameters)
        self.mode = mode
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.top_words, self.dtype, self.dataloader = top_words, dtype, dataloader
        self.projection, self.features = projection, features
        self.sample_id, self.per_sample_loss = sample_id, per_sample_loss
        self.log_overhead = log
        self._rates, self._staleness, self._cost = OptimizerRecord(), Staleness(), RunCost()
        self._seen = 0  # training batches of this run
        self._recorded = 0  # those of an earlier fit whose records are finished
        self._last_step = 0  # optimizer steps at the end of the last batch
        self._owed: int | None = None  # the epoch whose batches are all seen, and whose checkpoint is still to come
        self._resumed_root: str | None = None
        self._fitted: weakref.ref[Trainer] | None = None
        self._artifacts: ArtifactStore | None = None
        self._plan: CapturePlan | None = None
        self._data: TrainingData | None = None
        self._tracker: SampleTracker | None = None
        self._recorder: InFlightRecorder | None = None

    @property
    def state_key(self) -> str:
        """One state for each setting, so that several snapshots can share a Trainer."""
        return self._generate_state_key(
            store=None if self.store is None else str(self.store),
            parameters=self.parameters,
            mode=self.mode,
            every_n_epochs=self.every_n_epochs,
            every_n_steps=self.every_n_steps,
            top_words=self.top_words,
            dtype=self.dtype,
            **({} if self.projection is None else {"projection": self.projection.record()}),
        )

    @property
    def artifacts(self) -> ArtifactStore:
        """The store being written; known from the first training batch on."""
        if self._artifacts is None:
            raise StoreError(
                "the store is not open",
                expected="a fit that has begun",
                found="no training batch yet",
                hint="it is opened when the first training batch starts",
            )
        return self._artifacts

    # -- the beginning of a fit -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse early what cannot work, find the folder, and follow the samples."""
        if stage != "fit":
            return
        refuse_strategy(trainer)
        again = self._fitted is not None and self._fitted() is trainer and trainer.global_step > 0
        if not again:  # what is to go on comes from a Lightning checkpoint, after this
            self._begin_anew()
        self._fitted = weakref.ref(trainer)
        self._root = shared_folder(trainer, self.store)
        if self.store is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.store = self._root  # part of the state's key, which all ranks must look up under the same name
        if self.mode == "in_flight":
            self._tracker = SampleTracker(self.sample_id)
            self._tracker.attach(trainer)

    def _begin_anew(self) -> None:
        self._seen, self._recorded, self._owed, self._resumed_root, self._artifacts = 0, 0, None, None, None
        self._rates, self._staleness = OptimizerRecord(), Staleness()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts; everything else waits until the module's own hooks have run."""
        self._cost, self._plan, self._last_step = RunCost(), None, trainer.global_step

    def _prepare(self, trainer: Trainer, module: LightningModule) -> CapturePlan:
        """Before the first step: check the first batch, open the store, and say what it will need."""
        if self._plan is not None:
            return self._plan
        plan = self._check(trainer, module)
        store = self._artifacts = self._open(trainer, module, plan)
        assert self._data is not None
        announce(
            trainer, module, store, plan, batch_size=self._data.batch_size,
            every_n_epochs=self.every_n_epochs, every_n_steps=self.every_n_steps,
        )  # fmt: skip
        known = store.checkpoints()
        self._staleness.checkpoint = known[-1].step if known else trainer.global_step
        if known and known[-1].step == trainer.global_step:
            self._rates.restart()  # resumed from a state that was saved just before this checkpoint was
        if self._tracker is not None:
            self._recorder = InFlightRecorder.of(
                trainer, store, plan, self._tracker, self._rates, self._staleness, self._recorded
            )
            warn_of_train_mode("GradientSnapshot", module, plan.selection, plan.check, self._data, trainer)
        self._plan = plan
        if self._recorder is not None and not known:
            self._snapshot(trainer, module, trainer.current_epoch)
        return plan

    def _check(self, trainer: Trainer, module: LightningModule) -> CapturePlan:
        in_flight = self.mode == "in_flight"
        selection = select(module, self.parameters)
        self._data = self._training_data(trainer)
        check = self_check(module, selection, self._data, trainer, self.per_sample_loss, in_flight=in_flight)
        return CapturePlan(
            selection, check, self.per_sample_loss, self.top_words, DTYPES[self.dtype], self.projection, self.features
        )

    def _training_data(self, trainer: Trainer) -> TrainingData:
        return training_data(trainer, self.dataloader, self.mode, ids_known=self.sample_id is not None)

    def _open(self, trainer: Trainer, module: LightningModule, plan: CapturePlan) -> ArtifactStore:
        assert self._data is not None
        if self.store is None and self._resumed_root is not None:
            self._root = Path(self._resumed_root)  # the log folder of a resumed run is a new one
        manifest = manifest_of(trainer, module, self._data, plan, self.mode, self.dtype)
        return open_store(trainer, self._root, manifest, recorded=None if self._seen == 0 else self._recorded)

    # -- during training --------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, get ready; in flight, learn the ids and hook the layers."""
        with self._cost.measured():
            self._prepare(trainer, pl_module)
            if self._owed is not None:  # saved in the last batch of an epoch, which Lightning does not end again
                self._snapshot(trainer, pl_module, self._owed)
            if self._recorder is not None:
                self._recorder.batch_start(trainer, batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In flight: take the rows."""
        if self._recorder is not None:
            with self._cost.measured():
                self._recorder.after_backward(trainer, pl_module, self._seen + 1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Read the learning rate that this very step uses."""
        self._rates.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; checkpoint if `every_n_steps` says so."""
        with self._cost.measured():
            self._seen += 1
            self._rates.settle(trainer)
            if self._recorder is not None:
                self._recorder.batch_end(trainer, self._seen)
            n, before, now = self.every_n_steps, self._last_step, trainer.global_step
            self._last_step = now
            if n is not None and now // n > before // n:  # several optimizers can step in one batch
                self._snapshot(trainer, pl_module, trainer.current_epoch)
            if n is None and trainer.is_last_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
                self._owed = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoint at the end of every n-th epoch."""
        due = self.every_n_steps is None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if due or self._owed is not None:
            with self._cost.measured():
                self._snapshot(trainer, pl_module, trainer.current_epoch if self._owed is None else self._owed)

    def _snapshot(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        """Weights, rates and, by replay, gradients of this moment; committed as a whole or not at all."""
        plan, store, step = self._prepare(trainer, module), self.artifacts, trainer.global_step
        self._owed = None
        if any(c.step == step for c in store.checkpoints()):
            return  # resumed at the very end of an epoch: this checkpoint is there already
        if self._recorder is not None:
            self._recorder.flush()
        mark = self._seen if self._recorder is None else self._recorder.recorded
        checkpoint, files = write_checkpoint(store, trainer, module, self._rates, epoch=epoch, mark=mark)
        if self.mode == "replay":
            shards = write_replay(store, plan, self._present_data(trainer), module, trainer, step=step, mark=mark)
            store.commit(*shards)
        commit_checkpoint(store, trainer, self._rates, checkpoint, files)
        self._staleness.checkpoint = step

    def opened(self, trainer: Trainer, module: LightningModule) -> ArtifactStore:
        """The store, opened now if it is not open yet, for others that write into it too."""
        with self._cost.measured():
            self._prepare(trainer, module)
        return self.artifacts

    def checkpoint_now(self, trainer: Trainer, module: LightningModule, epoch: int) -> Checkpoint:
        """The checkpoint of this very moment; made if there is none yet, for others that write into the store too."""
        with self._cost.measured():
            self._snapshot(trainer, module, epoch)
        return next(c for c in self.artifacts.checkpoints() if c.step == trainer.global_step)

    def _present_data(self, trainer: Trainer) -> TrainingData:
        """The training data as it is now: loaders may be reloaded, and must then hold the same samples."""
        data = self._training_data(trainer)
        if data.length != self.artifacts.manifest.dataset_length:
            raise StoreError(
                "the training set has changed since the fit began",
                expected=f"{self.artifacts.manifest.dataset_length} samples",
                found=f"{data.length} samples",
                hint="replay needs one training set with fixed positions: pass it as `dataloader=`",
            )
        return data

    # -- the end, saving and failing --------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What is recorded so far reaches the disk on every rank before the Lightning checkpoint that counts on it."""
        if self._recorder is not None:
            with self._cost.measured():
                self._recorder.flush()
            trainer.strategy.barrier("influence-flush")

    def state_dict(self) -> dict[str, Any]:
        """Batches seen and recorded, the running sums of learning rates, and where the store is."""
        return {
            "batches": self._seen,
            "recorded": self._num_finished,
            "owed": self._owed,
            "rates": self._rates.state_dict(),
            "staleness": self._staleness.state_dict(),
            "root": None if self._artifacts is None else str(self._artifacts.root),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the Lightning checkpoint was written."""
        self._seen, self._recorded = int(state_dict["batches"]), int(state_dict["recorded"])
        self._owed = state_dict["owed"]
        self._rates.load_state_dict(state_dict["rates"])
        self._staleness = Staleness.from_state(state_dict["staleness"])
        self._resumed_root = state_dict["root"]

    @property
    def _num_finished(self) -> int:
        """Training batches whose records are finished."""
        if self._recorder is not None:
            return self._recorder.recorded
        return self._seen if self.mode == "replay" else self._recorded

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the records and note what the callback cost."""
        if self._owed is not None:  # resumed with no batch left
            with self._cost.measured():
                self._snapshot(trainer, pl_module, self._owed)
        if self._plan is None:
            return  # there was nothing left to train
        with self._cost.measured():
            if self._recorder is not None:
                self._recorder.close()
                trainer.strategy.barrier("influence-end")
                if trainer.is_global_zero:
                    self.artifacts.record("staleness", self._staleness.fact())
                    self.artifacts.record("dropped_by_gradient_scaler", self._recorder.dropped)
        self._cost.report(trainer, self.artifacts, self.log_overhead)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook and save what is finished; no collective, since other ranks may be gone."""
        if self._recorder is not None:
            try:
                self._recorder.close()
            except Exception as error:  # the first failure is already on its way to the user
                rank_zero_warn(f"GradientSnapshot could not save its last records: {error}")
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer and the module as they were found."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        self._recorded = self._num_finished
        if self._recorder is not None:
            self._recorder.release()
            self._recorder = None
        if self._tracker is not None:
            self._tracker.detach(trainer)
            self._tracker = None
