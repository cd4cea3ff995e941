"""What a callback costs a run: the disk space, told before training begins, and the time, told at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_influence.artifacts import UNBOUNDED, ArtifactStore
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
        """Print what it took, keep it in the manifest (rank zero), and log it if asked."""
        whole = time.perf_counter() - self._began
        training = max(whole - self.seconds, 1e-9)
        if trainer.is_global_zero:
            written = sum(artifact.bytes for artifact in store.artifacts())
            fact = {"seconds": self.seconds, "fit_seconds": whole, "ratio": self.seconds / training, "bytes": written}
            store.record("overhead", fact)
            rank_zero_info(
                f"GradientSnapshot: took {self.seconds:.1f} s beside {training:.1f} s of training "
                f"({self.seconds / training:.0%}), {_megabytes(written)} in {store.root}"
            )
        if log:
            metrics = {"influence/overhead_seconds": self.seconds, "influence/overhead_ratio": self.seconds / training}
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)


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
    batches = float(trainer.num_training_batches)  # of this rank, an epoch; infinite for a stream
    steps_an_epoch = -(-batches // trainer.accumulate_grad_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    if trainer.max_steps >= 0:
        epochs = min(epochs, trainer.max_steps / max(1.0, steps_an_epoch))
    whole = math.ceil(epochs) if math.isfinite(epochs) else epochs  # one that max_steps cuts short has an end too
    checkpoints = epochs * steps_an_epoch // every_n_steps if every_n_steps else float(whole // every_n_epochs)
    if checkpoints == 0 and math.isfinite(batches) and not in_flight:
        _warn_of_nothing(trainer, store, every_n_epochs, every_n_steps)
    state, moments, frozen = _bytes_of_weights(trainer, module)
    once = plan.bytes_per_sample() * (min(length, batches * batch_size * trainer.world_size) if in_flight else length)
    total = once * (epochs if in_flight else checkpoints) + (state + moments) * checkpoints + frozen
    total += state if in_flight else 0  # the checkpoint before the first step
    known = math.isfinite(total) and (length < UNBOUNDED or math.isfinite(batches))
    rank_zero_info(
        f"GradientSnapshot: gradients of {', '.join(_told(name, plan) for name in plan.selection.names)}"
        + (f", about {_megabytes(once)} {'an epoch' if in_flight else 'a checkpoint'}" if once < UNBOUNDED else "")
        + (f", {_megabytes(total)} in all with the weights" if known else "")
        + f", in {store.root}"
    )
    if known and trainer.is_global_zero:
        store.record("estimate", {"bytes": int(total), "gradient_bytes": int(once)})
        store.require_free(max(0, int(total) - sum(artifact.bytes for artifact in store.artifacts())))


def _told(name: str, plan: CapturePlan) -> str:
    """A parameter's name, and which of its uses are left out."""
    uses = ", ".join(sorted(plan.check.left_out.get(name, ())))
    if not uses or name not in plan.selection.input_only:
        return name
    return f"{name} (look-ups only; the tied use in {uses} is left out)"


def _warn_of_nothing(trainer: Trainer, store: ArtifactStore, every_n_epochs: int, every_n_steps: int | None) -> None:
    """Say that this run is too short for a checkpoint, unless it is a trial or goes on with a store that has some."""
    if trainer.fast_dev_run or store.checkpoints():  # type: ignore[attr-defined]
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


def _bytes_of_weights(trainer: Trainer, module: LightningModule) -> tuple[int, int, int]:
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


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
