"""CurvatureSnapshot: the callback that estimates curvature at a fit's weights, for influence functions after it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.callbacks.arguments import (
    callable_or_none,
    folder_or_none,
    names,
    one_of,
    positive,
    steps,
    whole_number,
)
from lightning_influence.callbacks.checkpointing import as_stored, commit_checkpoint, write_checkpoint
from lightning_influence.callbacks.curvature_in_flight import CurvatureInFlight
from lightning_influence.callbacks.gradient_snapshot import GradientSnapshot
from lightning_influence.callbacks.opening import curvature_manifest, open_store, training_data
from lightning_influence.callbacks.optimizer_record import OptimizerRecord, denominators
from lightning_influence.callbacks.run_cost import RunCost, megabytes, require_space
from lightning_influence.callbacks.train_mode import warn_of_train_mode
from lightning_influence.callbacks.trainer_support import refuse_strategy, shared_folder
from lightning_influence.curvature import (
    CurvatureStatistics,
    TrainingEvidence,
    refuse_labels,
    statistics_of,
    weight_decay,
    write_curvature,
)
from lightning_influence.curvature.rehearsal import rehearse
from lightning_influence.errors import StoreError, UnsupportedError
from lightning_influence.gradients import Selection, select
from lightning_influence.objective import Labels, PerSample, Reduction
from lightning_influence.replay import TrainingData
from lightning_influence.samples import SampleTracker
from lightning_influence.self_check import self_check


class CurvatureSnapshot(Callback):
    """Estimate the curvature of the training loss, by default its Fisher information, and keep it beside the weights:
    for `InfluenceFunction` (Koh & Liang 2017, 1703.04730; Grosse et al. 2023, 2308.03296) after the fit.

    A snapshot is taken at the end of the fit, and before it where `every_n_epochs` or `at_steps` say so. It walks the
    training set in eval mode, isolated from the run: training is bit-identical with and without it. With a
    `GradientSnapshot` into the same folder the two share its store and its checkpoints.

    Args:
        store: folder of the artifacts; `None` is `influence` below the Trainer's log directory.
        statistics: how: `"ekfac"`, `"kfac"`, `"diagonal"`, or an object such as `EKFAC()`, `LowRank(rank=100)`.
        parameters: of which parameters, as in `GradientSnapshot`; `"all"` trained ones by default.
        labels: `"exact"`: over all labels, `"sampled"`: one drawn from the model's own distribution, `"observed"`: the
            given ones (empirical Fisher); `None`: exact where a sample has one class and at most 32 outputs; sampled
            where each of its tokens has a class, or there are more; observed where the loss tells no distribution.
        every_n_epochs: also at the end of every n-th epoch.
        at_steps: also after these optimizer steps.
        at_most: walk a random part of so many samples; `None` is all.
        batch_size: of the walk; `None` is that of the loader.
        seed: of sampled labels and of the random part.
        mode: `"replay"`; or `"in_flight"`: take observed labels from the training's own backward passes, at the weights
            and in the mode of each step, without any pass of its own. What is summed since the last snapshot, or since
            the fit was resumed, is stale by as many steps, which the record says. One-pass statistics only (`"kfac"`,
            `"diagonal"`), automatic optimization only.
        every_n_batches: in flight, take every n-th training batch.
        dataloader: walk this loader instead of the Trainer's.
        per_sample_loss: (module, batch) -> (N,), as in `GradientSnapshot`.

    Raises:
        UnsupportedError, CurvatureError, CaptureError, LossError, StoreError: before the first training step, by a
            rehearsal on a few samples: arguments that do not go together, a layer that the statistics do not serve, a
            loss without the labels that are asked for, a folder that holds something else.
    """

    def __init__(
        self,
        store: str | Path | None = None,
        statistics: CurvatureStatistics | str = "ekfac",
        *,
        parameters: str | Sequence[str] = "all",
        labels: Labels | None = None,
        every_n_epochs: int | None = None,
        at_steps: Sequence[int] = (),
        at_most: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        mode: Literal["replay", "in_flight"] = "replay",
        every_n_batches: int = 1,
        dataloader: Any = None,
        per_sample_loss: PerSample | None = None,
    ) -> None:
        one_of("mode", mode, ("replay", "in_flight"))
        if labels is not None:
            one_of("labels", labels, ("exact", "sampled", "observed"))
        positive(every_n_epochs=every_n_epochs, at_most=at_most, batch_size=batch_size, every_n_batches=every_n_batches)
        folder_or_none("store", store)
        whole_number(seed=seed)
        self.store, self.statistics = store, statistics_of(statistics)
        refuse_labels(self.statistics, labels)
        self.parameters, self.labels = names("parameters", parameters), labels
        self.every_n_epochs, self.at_steps = every_n_epochs, steps("at_steps", at_steps)
        self.at_most, self.batch_size, self.seed = at_most, batch_size, seed
        self.mode, self.every_n_batches = mode, every_n_batches
        self.dataloader, self.per_sample_loss = dataloader, callable_or_none("per_sample_loss", per_sample_loss)
        if mode == "in_flight":
            CurvatureInFlight.refuse(
                self.statistics, labels=labels, at_most=at_most, batch_size=batch_size, dataloader=dataloader,
                per_sample_loss=per_sample_loss,
            )  # fmt: skip
        self._rates, self._cost = OptimizerRecord(), RunCost()
        self._seen = 0  # training batches of this run
        self._epoch = 0  # that of the last of them
        self._last_step = 0
        self._due = False  # a moment for a snapshot has come; it waits until the other hooks of the batch have run
        self._resumed = False
        self._resumed_root: str | None = None
        self._fitted: weakref.ref[Trainer] | None = None
        self._host: GradientSnapshot | CurvatureSnapshot | None = None
        self._artifacts: ArtifactStore | None = None
        self._selection: Selection | None = None
        self._reduction: Reduction = "mean"
        self._tracker: SampleTracker | None = None
        self._in_flight: CurvatureInFlight | None = None

    @property
    def state_key(self) -> str:
        """One state for each setting, so that several snapshots can share a Trainer."""
        return self._generate_state_key(
            store=None if self.store is None else str(self.store),
            statistics=self.statistics.name,
            parameters=self.parameters,
            labels=self.labels,
            every_n_epochs=self.every_n_epochs,
            at_steps=self.at_steps,
            mode=self.mode,
        )

    @property
    def artifacts(self) -> ArtifactStore:
        """The store being written; known from the first training batch on."""
        found = self._artifacts if self._host is None else self._host.artifacts
        if found is None:
            raise StoreError(
                "the store is not open",
                expected="a fit that has begun",
                found="no training batch yet",
                hint="it is opened when the first training batch starts",
            )
        return found

    # -- the beginning of a fit -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse early what cannot work, find the folder, and follow the samples."""
        if stage != "fit":
            return
        refuse_strategy(trainer)
        if self.mode == "in_flight":
            CurvatureInFlight.refuse_module(pl_module)
        again = self._fitted is not None and self._fitted() is trainer and trainer.global_step > 0
        if not again:
            self._seen, self._epoch, self._due, self._artifacts = 0, 0, False, None
            self._resumed, self._resumed_root, self._rates = False, None, OptimizerRecord()
        self._fitted = weakref.ref(trainer)
        self._root = shared_folder(trainer, self.store)
        if self.store is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.store = self._root
        if self.mode == "in_flight":
            self._tracker = SampleTracker()
            self._tracker.attach(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find who keeps the store, now that all callbacks know their folders: a GradientSnapshot that shares it, else
        the first of its kind."""
        others = [c for c in trainer.callbacks if isinstance(c, (GradientSnapshot, CurvatureSnapshot))]  # type: ignore[attr-defined]
        folders = [shared_folder(trainer, each.store).expanduser().resolve() for each in others]
        mine = folders[others.index(self)]
        sharing = [each for each, folder in zip(others, folders, strict=True) if folder == mine]
        writers = [each for each in sharing if isinstance(each, GradientSnapshot)]
        if len(writers) > 1:
            raise UnsupportedError(
                "two GradientSnapshots write into the folder of a CurvatureSnapshot",
                expected="one",
                found=f"{len(writers)} into {mine}",
                hint="give one of them another folder",
            )
        twins = [c for c in sharing if isinstance(c, CurvatureSnapshot) and c.statistics.name == self.statistics.name]
        if len(twins) > 1:
            raise UnsupportedError(
                f"two CurvatureSnapshots write {self.statistics.name!r} into one store",
                expected="one for each kind of statistics",
                found=f"{len(twins)} into {mine}",
                hint="give one of them another folder",
            )
        first = (writers or sharing)[0]
        self._host = None if first is self else first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The clock starts; everything else waits until the module's own hooks have run."""
        self._cost, self._selection, self._last_step = RunCost(), None, trainer.global_step

    def _prepare(self, trainer: Trainer, module: LightningModule) -> Selection:
        """Before the first step: check the gradients, rehearse the estimate on a few samples, open the store."""
        if self._selection is not None:
            return self._selection
        if self._host is not None:
            self._host.opened(trainer, module)
        with self._cost.measured():
            selection, data = select(module, self.parameters), self._training_data(trainer)
            in_flight = self.mode == "in_flight"
            check = self_check(module, selection, data, trainer, self.per_sample_loss, in_flight=in_flight)
            self._reduction = check.reduction
            evidence = self._evidence(trainer, module, selection, data)
            size, labels = rehearse(self.statistics, evidence)
            if self._host is None:
                self._open(trainer, module, selection, data)
            elif self.dataloader is not self._host.dataloader:
                self._refuse_other_data(data.fingerprint(), self.artifacts.manifest.dataset_fingerprint)
            self._refuse_other_data(len(data), self.artifacts.manifest.dataset_length)
            part = f"{evidence.num_samples} of {len(data)} samples, drawn with seed {self.seed}"
            whose = "the batches that train" if in_flight else "all samples" if self.at_most is None else part
            rank_zero_info(
                f"CurvatureSnapshot: {self.statistics.name!r} of {len(selection.names)} parameters over "
                + (f"the {labels} labels of {whose}" if labels else whose)
                + f", {megabytes(size)} a snapshot, in {self.artifacts.root}"
            )
            if trainer.is_global_zero:
                require_space(
                    trainer, module, self.artifacts, self.statistics.name, size, own=self._host is None,
                    every_n_epochs=self.every_n_epochs, at_steps=self.at_steps,
                )  # fmt: skip
            if self._tracker is not None:
                warn_of_train_mode("CurvatureSnapshot", module, selection, check, data, trainer)
                self._in_flight = CurvatureInFlight(
                    self.statistics, selection, check, self._tracker, self.every_n_batches
                )
        self._selection = selection
        return selection

    def _open(self, trainer: Trainer, module: LightningModule, selection: Selection, data: TrainingData) -> None:
        """A store of its own."""
        if self.store is None and self._resumed_root is not None:
            self._root = Path(self._resumed_root)  # the log folder of a resumed run is a new one
        manifest = curvature_manifest(trainer, module, data, selection, self._reduction)
        store = open_store(trainer, self._root, manifest, recorded=None if self._seen == 0 else self._seen)
        known, self._artifacts = store.checkpoints(), store
        if known and known[-1].step == trainer.global_step:
            self._rates.restart()  # resumed from a state that was saved just before this checkpoint was

    def opened(self, trainer: Trainer, module: LightningModule) -> ArtifactStore:
        """The store, opened now if it is not open yet, for others that write into it too."""
        self._prepare(trainer, module)
        return self.artifacts

    def _refuse_other_data(self, found: object, expected: object) -> None:
        if found != expected:
            raise StoreError(
                f"the curvature would be of other samples than the store at {self.artifacts.root}",
                expected=f"the {expected} samples there" if isinstance(expected, int) else f"fingerprint {expected}",
                found=f"{found} samples" if isinstance(found, int) else f"fingerprint {found}",
                hint="walk one training set with fixed positions: pass the same `dataloader=` to all callbacks",
            )

    def _training_data(self, trainer: Trainer) -> TrainingData:
        try:
            return training_data(trainer, self.dataloader, "replay", ids_known=False)
        except UnsupportedError as error:
            hint = "pass CurvatureSnapshot(dataloader=DataLoader(map_style_dataset, batch_size=...))"
            raise UnsupportedError(error.what, expected=error.expected, found=error.found, hint=hint) from error

    def _evidence(
        self, trainer: Trainer, module: LightningModule, selection: Selection, data: TrainingData
    ) -> TrainingEvidence:
        return TrainingEvidence(
            module,
            selection,
            data,
            labels="observed" if self.mode == "in_flight" else self.labels,
            seed=self.seed,
            at_most=self.at_most,
            batch_size=self.batch_size,
            trainer=trainer,
            per_sample_loss=self.per_sample_loss,
            reduction=self._reduction,
        )

    # -- during training --------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, get ready; take the snapshot of a named step that has just passed."""
        self._prepare(trainer, pl_module)
        if self._due:  # also saved in the last batch of an epoch, which Lightning does not end again
            self._snapshot(trainer, pl_module)
        self._epoch = trainer.current_epoch
        if self._in_flight is not None:
            with self._cost.measured():
                self._in_flight.batch_start(batch, self._seen)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In flight: add the batch's gradients."""
        if self._in_flight is not None:
            with self._cost.measured():
                self._in_flight.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Read the learning rate that this very step uses."""
        self._rates.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and see whether a moment for a snapshot has come."""
        self._seen += 1
        self._rates.settle(trainer)
        if self._in_flight is not None:
            self._in_flight.batch_end()
        before, now = self._last_step, trainer.global_step
        self._last_step = now
        last = trainer.is_last_batch and self._ends_here(trainer.current_epoch)
        self._due = self._due or last or any(before < step <= now for step in self.at_steps)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Snapshot at the end of every n-th epoch."""
        if self._in_flight is not None:
            self._in_flight.batch_end()  # the module may have skipped the rest of the epoch
        if self._due or self._ends_here(trainer.current_epoch):
            self._snapshot(trainer, pl_module)

    def _ends_here(self, epoch: int) -> bool:
        return self.every_n_epochs is not None and (epoch + 1) % self.every_n_epochs == 0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Snapshot at the end of the fit, and note what the callback cost."""
        if self._selection is None and self._seen == 0:
            return  # there was nothing to train
        self._snapshot(trainer, pl_module)
        self._cost.report_curvature(trainer, self.artifacts, self.statistics.name)

    def _snapshot(self, trainer: Trainer, module: LightningModule) -> None:
        """Estimate at this moment's weights and commit the result; a failure leaves what was committed as it was."""
        selection, self._due = self._prepare(trainer, module), False
        store, step = self.artifacts, trainer.global_step
        if any(file.step == step and self._is_mine(file.meta) for file in store.artifacts("curvature")):
            return
        older = any(checkpoint.step == step for checkpoint in store.checkpoints())
        at = self.checkpoint_now(trainer, module, self._epoch)
        with self._cost.measured():
            data = self._training_data(trainer)
            self._refuse_other_data(len(data), store.manifest.dataset_length)  # loaders may be reloaded
            evidence = self._evidence(trainer, module, selection, data)
            own = getattr(trainer.train_dataloader, "batch_size", None) or data.batch_size  # not that of `dataloader=`
            summed, scales = own if self._reduction == "sum" else 1, denominators(trainer.optimizers, module)
            evidence.decay = decay = weight_decay(at.groups, selection.names, scales, summed_over=summed)
            if self._in_flight is not None:
                curvature, facts = self._in_flight.finish(evidence, step)
            else:
                with as_stored(store, module, at) if older else nullcontext():
                    curvature, facts = self.statistics.collect(evidence), {}
            try:
                if trainer.is_global_zero:
                    write_curvature(store, at, self.statistics, curvature, evidence, decay, facts)
            finally:
                trainer.strategy.barrier("influence-curvature")  # a rank that refuses may end the others

    def _is_mine(self, meta: Mapping[str, Any]) -> bool:
        """Whether a file is this callback's, by what is said about it."""
        return meta.get("name") == self.statistics.name

    def checkpoint_now(self, trainer: Trainer, module: LightningModule, epoch: int) -> Checkpoint:
        """The checkpoint of this very moment; made if there is none yet, with gradients where the store keeps them."""
        if self._host is not None:
            return self._host.checkpoint_now(trainer, module, epoch)
        store = self.opened(trainer, module)
        with self._cost.measured():
            if not any(c.step == trainer.global_step for c in store.checkpoints()):
                made = write_checkpoint(store, trainer, module, self._rates, epoch=epoch, mark=self._seen)
                commit_checkpoint(store, trainer, self._rates, *made)
        return next(c for c in store.checkpoints() if c.step == trainer.global_step)

    # -- saving and the end -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Batches seen, rates, whether a snapshot is due, and where the store is."""
        return {
            "batches": self._seen,
            "epoch": self._epoch,
            "due": self._due,
            "rates": self._rates.state_dict(),
            "root": None if self._selection is None else str(self.artifacts.root),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the Lightning checkpoint was written."""
        self._seen, self._epoch = int(state_dict["batches"]), int(state_dict["epoch"])
        self._due = bool(state_dict["due"])
        self._rates.load_state_dict(state_dict["rates"])
        self._resumed, self._resumed_root = True, state_dict["root"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where a resumed fit had nothing left to train, and so took no snapshot that was missing."""
        if not self._resumed or self._selection is not None or self._resumed_root is None:
            return
        store, step = ArtifactStore.open(self._resumed_root), trainer.global_step
        if not any(file.step == step and self._is_mine(file.meta) for file in store.artifacts("curvature")):
            rank_zero_warn(
                f"Nothing was left to train, and {store.root} has no curvature {self.statistics.name!r} of "
                f"optimizer step {step}. HINT: add_curvature(module, {str(store.root)!r}, train_loader, "
                f"{self.statistics.name!r}) estimates it now."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Unhook."""
        self._release(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the Trainer and the module as they were found."""
        if stage == "fit":
            self._release(trainer)

    def _release(self, trainer: Trainer) -> None:
        if self._in_flight is not None:
            self._in_flight.batch_end()
            self._in_flight = None
        if self._tracker is not None:
            self._tracker.detach(trainer)
            self._tracker = None
