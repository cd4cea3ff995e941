"""StageLinker: the callback that ties a finetuning run to the pretraining run whose weights it begins from."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_influence.artifacts import ArtifactStore, Checkpoint, StageLink
from lightning_influence.callbacks.arguments import callable_or_none, folder, folder_or_none, names
from lightning_influence.callbacks.checkpointing import commit_checkpoint, write_checkpoint
from lightning_influence.callbacks.curvature_snapshot import CurvatureSnapshot
from lightning_influence.callbacks.gradient_snapshot import GradientSnapshot
from lightning_influence.callbacks.opening import curvature_manifest, open_store, training_data
from lightning_influence.callbacks.optimizer_record import OptimizerRecord, denominators
from lightning_influence.callbacks.trainer_support import refuse_strategy, shared_folder
from lightning_influence.callbacks.travel_record import TravelRecord
from lightning_influence.errors import CaptureError, StoreError
from lightning_influence.gradients import select
from lightning_influence.objective import PerSample, Reduction
from lightning_influence.replay import TrainingData
from lightning_influence.self_check import self_check
from lightning_influence.stages import (
    SharedNames,
    ancestors,
    checksums,
    compared,
    goes_along_the_gradient,
    matched,
)


class StageLinker(Callback):
    """In a finetuning run: say which weights came from which pretraining run, and what became of them, for `MultiStage`
    influence afterwards (Chen et al. 2020, 2007.09081).

    Before the first step the shared weights must equal the last ones in the pretraining run's store; at the end of the
    fit is written which of them stayed frozen and which were tuned, and how far the optimizers can have gone: η·K, from
    which the default proximity follows. Training is bit-identical with and without it. With a `CurvatureSnapshot` or
    `GradientSnapshot` into the same folder it shares their store; alone it keeps the final weights in its own.

    Args:
        store: folder of the finetuning run's artifacts; `None` is `influence` below the Trainer's log directory.
        pretrain: folder of the pretraining run's store (`link_checkpoint` makes one of a run without callbacks).
        shared: `None` takes all parameters of one name and shape; otherwise from the pretraining run's names to this
            run's: `{"encoder.*": "backbone.encoder.*"}`, or name by name.
        fresh: globs over this run's names: parameters that begin anew although name and shape are alike (`"head.*"`).
        proximity: α that `Proximity()` is to take of this run, in place of that of its learning rates: where something
            other than the training loss held the weights to W*, as weight decay towards W* does.
        dataloader: the training data, where they are not the Trainer's.
        per_sample_loss: (module, batch) -> (N,), as in `GradientSnapshot`; of no use beside one.

    Raises:
        StoreError: before the first step: no such store, one without weights, a circle of links, names that are none,
            nothing shared, shared weights that are others than those of the pretraining run.
    """

    def __init__(
        self,
        store: str | Path | None = None,
        *,
        pretrain: str | Path,
        shared: SharedNames = None,
        fresh: str | Sequence[str] = (),
        proximity: float | None = None,
        dataloader: Any = None,
        per_sample_loss: PerSample | None = None,
    ) -> None:
        folder_or_none("store", store)
        folder("pretrain", pretrain)
        self.store, self.pretrain, self.shared = store, pretrain, _checked_names(shared)
        given = names("fresh", fresh) if fresh else ()
        self.fresh = (given,) if isinstance(given, str) else given
        self.proximity = _checked_proximity(proximity)
        self.dataloader, self.per_sample_loss = dataloader, callable_or_none("per_sample_loss", per_sample_loss)
        self._rates, self._travel = OptimizerRecord(), TravelRecord()
        self._seen, self._resumed_root, self._batch_size = 0, None, 1
        self._fitted: weakref.ref[Trainer] | None = None
        self._host: GradientSnapshot | CurvatureSnapshot | None = None
        self._own: ArtifactStore | None = None
        self._earlier: ArtifactStore | None = None
        self._link: StageLink | None = None  # as all ranks know it; only rank zero reads what it has written

    @property
    def state_key(self) -> str:
        """One state for each setting."""
        return self._generate_state_key(
            store=None if self.store is None else str(self.store), pretrain=str(self.pretrain), shared=self.shared
        )

    @property
    def artifacts(self) -> ArtifactStore:
        """The store being written; known from the first training batch on."""
        found = self._own if self._host is None else self._host.artifacts
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
        """Find both folders, and refuse a pretraining run that cannot be one."""
        if stage != "fit":
            return
        refuse_strategy(trainer)
        again = self._fitted is not None and self._fitted() is trainer and trainer.global_step > 0
        if not again:
            self._seen, self._own, self._resumed_root = 0, None, None
            self._rates, self._travel = OptimizerRecord(), TravelRecord()
        self._fitted, self._link = weakref.ref(trainer), None
        self._root = shared_folder(trainer, self.store)
        if self.store is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.store = self._root
        self._earlier = _pretraining(self.pretrain, self._root)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find who keeps the store: a snapshot into the same folder, or nobody else."""
        mine = self._root.expanduser().resolve()
        self._host = None
        for kind in (GradientSnapshot, CurvatureSnapshot):
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                found = isinstance(other, kind) and shared_folder(trainer, other.store).expanduser().resolve() == mine
                if found and self._host is None:
                    self._host = other

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step: hold the shared weights against the pretraining run's."""
        if self._link is None:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._earlier is not None
        store = self._opened(trainer, module)
        match = matched(module, self._earlier, self.shared, self.fresh)
        link, identity = trainer.strategy.broadcast(store.link), self._earlier.identity
        self._batch_size = self._training_data(trainer).batch_size
        if link is None:
            converted = compared(module, match.shared, self._earlier)
            root = self._earlier.root
            link = StageLink(
                parent=identity,
                parent_folder=str(root),
                parent_beside=Path(os.path.relpath(root, store.root)).as_posix(),
                shared=match.shared,
                frozen=tuple(_still(module, trainer)),
                alpha=self.proximity,
                converted=converted,
                other_shapes=match.other_shapes,
                start=checksums(module),
            )
            _warn_of_buffers(module, self._earlier)
            rank_zero_info(
                f"StageLinker: {len(match.shared)} of {sum(1 for _ in module.parameters())} parameters begin at the "
                f"weights of {root}" + (f", {len(converted)} of them converted" if converted else "")
            )
        elif (link.parent, dict(link.shared)) != (identity, dict(match.shared)):
            raise StoreError(
                f"the store at {store.root} is linked otherwise already",
                expected=f"the pretraining run {link.parent[:12]} in {link.parent_folder}, and the names there",
                found=f"the run {identity[:12]} in {self._earlier.root}, {len(match.shared)} shared parameters",
                hint="resume with the StageLinker of the first run, or give this one another folder",
            )
        if trainer.is_global_zero:
            store.record_link(replace(link, complete=False))  # of a fit that is resumed too, until it ends
        trainer.strategy.barrier("influence-link")
        self._link = link

    def _opened(self, trainer: Trainer, module: LightningModule) -> ArtifactStore:
        """The store of the snapshot that shares the folder, or one of its own."""
        if self._host is not None:
            return self._host.opened(trainer, module)
        if self._own is None:
            if self.store is None and self._resumed_root is not None:
                self._root = Path(self._resumed_root)  # the log folder of a resumed run is a new one
            data = self._training_data(trainer)
            reduction = _reduction(module, data, trainer, self.per_sample_loss)
            manifest = curvature_manifest(trainer, module, data, select(module, "all"), reduction)
            self._own = open_store(trainer, self._root, manifest, recorded=None if self._seen == 0 else self._seen)
            known = self._own.checkpoints()
            if known and known[-1].step == trainer.global_step:
                self._rates.restart()  # resumed from a state that was saved just before this checkpoint was
        return self._own

    def _training_data(self, trainer: Trainer) -> TrainingData:
        return training_data(trainer, self.dataloader, "replay", ids_known=False)

    # -- during training --------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Read the learning rate that this very step uses, and what has a gradient."""
        self._rates.before_step(trainer, optimizer)
        self._travel.before_step(trainer, pl_module, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and its step."""
        self._seen += 1
        self._rates.settle(trainer)
        self._travel.settle(trainer)

    # -- the end ----------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the final weights, and say what became of the shared ones."""
        link = self._link
        if link is None:
            return  # there was nothing to train
        store = self.artifacts
        at = self._checkpoint(trainer, pl_module)
        now, still, gone = checksums(pl_module), set(_still(pl_module, trainer)), self._travel.sums
        stayed = [name for name in now if now[name] == link.start[name]]
        wrong = tuple(name for name in link.shared if name not in stayed and name not in gone)
        scales = denominators(trainer.optimizers, pl_module)
        factor = self._batch_size if store.manifest.settings.get("reduction") == "sum" else 1
        told = {
            name
            for group in at.groups
            for name in group.parameters
            if goes_along_the_gradient(group.optimizer, name in scales)
        }
        if trainer.is_global_zero:
            store.record_link(
                replace(
                    link,
                    frozen=tuple(name for name in stayed if name in still or name not in gone),
                    moved_though_frozen=wrong,
                    travel={name: length * factor for name, length in gone.items() if name in told},
                    preconditioned=tuple(scales),
                    optimizers=tuple(type(optimizer).__name__ for optimizer in trainer.optimizers),
                    complete=True,
                )
            )
        trainer.strategy.barrier("influence-link")
        if wrong:
            rank_zero_warn(
                f"{', '.join(wrong[:5])} moved though declared frozen: MultiStage will refuse this store. HINT: look "
                "for what writes into them: a hook, weight averaging, an exponential moving average."
            )

    def _checkpoint(self, trainer: Trainer, module: LightningModule) -> Checkpoint:
        """The final weights, in the store."""
        if self._host is not None:
            return self._host.checkpoint_now(trainer, module, trainer.current_epoch)
        store = self.artifacts
        if not any(c.step == trainer.global_step for c in store.checkpoints()):
            made = write_checkpoint(store, trainer, module, self._rates, epoch=trainer.current_epoch, mark=self._seen)
            commit_checkpoint(store, trainer, self._rates, *made)
        return store.checkpoints()[-1]

    # -- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Batches seen, rates, and where the store is."""
        return {
            "batches": self._seen,
            "rates": self._rates.state_dict(),
            "travel": self._travel.state_dict(),
            "root": None if self._link is None else str(self.artifacts.root),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the Lightning checkpoint was written."""
        self._seen, self._resumed_root = int(state_dict["batches"]), state_dict["root"]
        self._rates.load_state_dict(state_dict["rates"])
        self._travel.load_state_dict(state_dict["travel"])


def _still(module: LightningModule, trainer: Trainer) -> list[str]:
    """Parameters that nothing trains now: without gradients, or in no optimizer."""
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in module.named_parameters() if not p.requires_grad or id(p) not in trained]


def _pretraining(folder: str | Path, own: Path) -> ArtifactStore:
    """The store of the pretraining run.

    Raises:
        StoreError: it has no weights; this run comes before it.
    """
    earlier = ArtifactStore.open(folder)
    if not earlier.checkpoints():
        raise StoreError(
            f"the pretraining run in {earlier.root} left no weights",
            expected="a fit that reached a checkpoint",
            found="a store without any",
            hint="let that fit reach its end with a CurvatureSnapshot or GradientSnapshot, or make a store of its "
            "checkpoint with link_checkpoint(...)",
        )
    here = own.expanduser().resolve()
    if any(store.root == here for store in ancestors(earlier)):
        raise StoreError(
            f"{here} would come before itself",
            expected="a new folder for this run",
            found=f"the folder of this run among those before {earlier.root}",
            hint="give StageLinker(store=...) a folder of its own",
        )
    return earlier


def _reduction(module: LightningModule, data: TrainingData, trainer: Trainer, per_sample_loss: Any) -> Reduction:
    """How the training loss reduces its batch, by the last layer, or the last before it that the loss reaches."""
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    layers: dict[str, list[str]] = {}
    for name in reversed(trained):
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    refused: CaptureError | None = None
    for selected in ("last_layer", *layers.values()):
        try:
            return self_check(module, select(module, selected), data, trainer, per_sample_loss).reduction
        except CaptureError as error:
            if "NaN" in error.what:
                raise
            refused = refused or error
    assert refused is not None
    raise refused


def _warn_of_buffers(module: LightningModule, earlier: ArtifactStore) -> None:
    """Say so where buffers of one name, such as running statistics, begin otherwise than pretraining left them."""
    weights = earlier.weights(earlier.checkpoints()[-1])
    others = [
        name
        for name, value in module.named_buffers()
        if name in weights
        and value.shape == weights[name].shape
        and not torch.equal(value.cpu(), weights[name].to(value.dtype))
    ]
    if others:
        rank_zero_warn(
            f"{', '.join(others[:5])} begin with other values than the run in {earlier.root} ended with. Multi-stage "
            "influence goes through parameters alone. HINT: load the whole state_dict before the fit."
        )


def _checked_names(shared: SharedNames) -> dict[str, str] | None:
    if shared is None:
        return None
    if not isinstance(shared, Mapping) or not all(isinstance(name, str) for pair in shared.items() for name in pair):
        raise StoreError(
            "shared= is a table of names",
            expected="a dictionary from the pretraining run's names to this run's, or None",
            found=repr(shared),
            hint="write shared={'encoder.*': 'backbone.encoder.*'}",
        )
    return dict(shared)


def _checked_proximity(proximity: float | None) -> float | None:
    if proximity is None:
        return None
    if isinstance(proximity, bool) or not isinstance(proximity, (int, float)) or not 0 < proximity < 1e300:
        raise StoreError(
            "this is no proximity",
            expected="α of a penalty α‖W − W*‖², a positive number, or None",
            found=repr(proximity),
            hint="leave proximity out: that of the learning rates is taken",
        )
    return float(proximity)
