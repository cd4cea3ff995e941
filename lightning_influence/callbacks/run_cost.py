"""What a callback costs a run: the disk space, told before training begins, and the time, told at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_influence.artifacts import UNBOUNDED, Artifact, ArtifactStore
from lightning_influence.callbacks.capture_plan import CapturePlan

_SECOND_MOMENT = ("betas", "alpha", "lr_decay")  # options that only optimizers with a second moment have


class RunCost:
    """Clock of one fit. `measured()` wraps whatever the callback does in the training process."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._running = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of the block as the callback's; blocks may be nested."""
        if self._running:
            yield
            return
        self._running, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            self._running = False

    def report(self, trainer: Trainer, store: ArtifactStore, log: bool) -> None:
        """Print what gradients took, keep it in the manifest (rank zero), and log it if asked."""
        written = [file for file in store.artifacts() if file.kind != "curvature"]
        fact = self._told("GradientSnapshot", trainer, store, written)
        if trainer.is_global_zero:
            store.record("overhead", fact)
        if log:
            metrics = {
                "influence/overhead_seconds": fact["seconds"],
                "influence/overhead_ratio": fact["ratio"],
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)

    def report_curvature(self, trainer: Trainer, store: ArtifactStore, name: str) -> None:
        """Print what the curvature `name` took, and keep it in the manifest (rank zero)."""
        written = [file for file in store.artifacts("curvature") if file.meta.get("name") == name]
        fact = self._told(f"CurvatureSnapshot({name!r})", trainer, store, written)
        if trainer.is_global_zero:
            known = store.manifest.facts.get("curvature_overhead")
            store.record("curvature_overhead", {**(known if isinstance(known, dict) else {}), name: fact})

    def _told(
        self, who: str, trainer: Trainer, store: ArtifactStore, written: Sequence[Artifact]
    ) -> dict[str, float | int]:
        whole = time.perf_counter() - self._began
        ours: list[Any] = [getattr(each, "_cost", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
        taken = sum(cost.seconds for cost in {*ours, self} if isinstance(cost, RunCost))  # theirs is no training either
        training, size = max(whole - taken, 1e-9), sum(file.bytes for file in written)
        rank_zero_info(
            f"{who}: took {self.seconds:.1f} s beside {training:.1f} s of training ({self.seconds / training:.0%}), "
            f"{megabytes(size)} in {store.root}"
        )
        return {"seconds": self.seconds, "fit_seconds": whole, "ratio": self.seconds / training, "bytes": size}


@dataclass(frozen=True)
class Length:
    """How long a fit is to be.

    Attributes:
        batches: training batches of this rank in an epoch; infinite for a stream.
        epochs: whole ones and a part, infinite without an end.
        steps_an_epoch: optimizer steps, if every batch has one.
    """

    batches: float
    epochs: float
    steps_an_epoch: float

    @classmethod
    def of(cls, trainer: Trainer) -> Length:
        """As the Trainer was told."""
        batches = float(trainer.num_training_batches)
        steps_an_epoch = -(-batches // trainer.accumulate_grad_batches)
        epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
        if trainer.max_steps >= 0:
            epochs = min(epochs, trainer.max_steps / max(1.0, steps_an_epoch))
        return cls(batches, epochs, steps_an_epoch)

    @property
    def whole_epochs(self) -> float:
        """Epochs that have an end: one that max_steps cuts short has one too."""
        return math.ceil(self.epochs) if math.isfinite(self.epochs) else self.epochs


def announce(
    trainer: Trainer,
    module: LightningModule,
    store: ArtifactStore,
    plan: CapturePlan,
    *,
    batch_size: int,
    every_n_epochs: int,
    every_n_steps: int | None,
) -> None:
    """Print the estimate of disk space, keep it in the manifest, and refuse if it is not there.

    Raises:
        StoreError: less is free than the rest of the run needs.
    """
    in_flight, length = store.manifest.mode == "in_flight", store.manifest.dataset_length
    run = Length.of(trainer)
    batches, epochs = run.batches, run.epochs
    checkpoints = (
        epochs * run.steps_an_epoch // every_n_steps if every_n_steps else float(run.whole_epochs // every_n_epochs)
    )
    if checkpoints == 0 and math.isfinite(batches) and not in_flight:
        _warn_of_nothing(trainer, store, every_n_epochs, every_n_steps)
    state, moments, frozen = bytes_of_weights(trainer, module)
    once = plan.bytes_per_sample() * (min(length, batches * batch_size * trainer.world_size) if in_flight else length)
    total = once * (epochs if in_flight else checkpoints) + (state + moments) * checkpoints + frozen
    total += state if in_flight else 0  # the checkpoint before the first step
    known = math.isfinite(total) and (length < UNBOUNDED or math.isfinite(batches))
    rank_zero_info(
        f"GradientSnapshot: gradients of {', '.join(_told(name, plan) for name in plan.selection.names)}"
        + (f", about {megabytes(once)} {'an epoch' if in_flight else 'a checkpoint'}" if once < UNBOUNDED else "")
        + (f", {megabytes(total)} in all with the weights" if known else "")
        + f", in {store.root}"
    )
    if known and trainer.is_global_zero:
        store.record("estimate", {"bytes": int(total), "gradient_bytes": int(once)})
        store.require_free(max(0, int(total) - sum(artifact.bytes for artifact in store.artifacts())))


def require_space(
    trainer: Trainer,
    module: LightningModule,
    store: ArtifactStore,
    name: str,
    size: int,
    *,
    own: bool,
    every_n_epochs: int | None,
    at_steps: Sequence[int],
) -> None:
    """StoreError if less is free than the curvatures `name`, of `size` bytes each, need in the rest of the run, and the
    checkpoints that are made for them: all of them where the store is the curvature's `own`, else at named steps."""
    epochs = Length.of(trainer).whole_epochs
    on_the_way = int(epochs - 1) // every_n_epochs if every_n_epochs is not None and math.isfinite(epochs) else 0
    named = len({step for step in at_steps if step > trainer.global_step})
    snapshots = 1 + named + on_the_way
    state, moments, frozen = bytes_of_weights(trainer, module)
    told = store.manifest.facts.get("estimate")
    gradients = told.get("gradient_bytes", 0) if isinstance(told, dict) and store.manifest.mode == "replay" else 0
    made = snapshots * (state + moments) + frozen if own else named * (state + moments + int(gradients))
    written = sum(file.bytes for file in store.artifacts() if own or file.meta.get("name") == name)
    needed = snapshots * size + made - written
    less = "fewer snapshots, fewer parameters, statistics='diagonal'"
    store.require_free(max(0, needed), f"the curvature {name!r}", less)


def _told(name: str, plan: CapturePlan) -> str:
    """A parameter's name, and which of its uses are left out."""
    uses = ", ".join(sorted(plan.check.left_out.get(name, ())))
    if not uses or name not in plan.selection.input_only:
        return name
    return f"{name} (look-ups only; the tied use in {uses} is left out)"


def _warn_of_nothing(trainer: Trainer, store: ArtifactStore, every_n_epochs: int, every_n_steps: int | None) -> None:
    """Say that this run is too short for a checkpoint, unless it is a trial or goes on with a store that has some."""
    hosts: list[Any] = [getattr(each, "_host", None) for each in trainer.callbacks]  # type: ignore[attr-defined]
    shared = any(getattr(host, "_artifacts", None) is store for host in hosts)  # a CurvatureSnapshot wants checkpoints
    if trainer.fast_dev_run or store.checkpoints() or shared:  # type: ignore[attr-defined]
        return
    if every_n_steps is None:
        rank_zero_warn(
            f"GradientSnapshot will store nothing: every_n_epochs={every_n_epochs}, and the run has "
            f"{trainer.max_epochs} epochs. HINT: lower every_n_epochs."
        )
    elif trainer.lightning_module.automatic_optimization:  # otherwise a batch may have several steps
        rank_zero_warn(
            f"GradientSnapshot will store nothing: every_n_steps={every_n_steps}, and the run has fewer optimizer "
            "steps. HINT: lower every_n_steps."
        )


def bytes_of_weights(trainer: Trainer, module: LightningModule) -> tuple[int, int, int]:
    """Bytes of trained tensors and buffers, of the optimizers' denominators, and of what is frozen and stored once."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    sizes: dict[int, tuple[int, bool]] = {}  # tied tensors lie there once
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            sizes[value.data_ptr() or id(value)] = (value.nbytes, name in frozen)
    moments = sum(
        parameter.nbytes
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if any(option in group for option in _SECOND_MOMENT)
    )
    state = sum(count for count, is_frozen in sizes.values() if not is_frozen)
    return state, moments, sum(count for count, is_frozen in sizes.values() if is_frozen)


def megabytes(count: float) -> str:
    """As people say it."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
