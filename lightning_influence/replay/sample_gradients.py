"""Per-sample gradients of one batch, run in the Trainer's precision, in units of one sample's loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_influence.gradients import GradientCapture, Gradients
from lightning_influence.objective import Objective


def sample_gradients(
    module: LightningModule,
    capture: GradientCapture,
    num_samples: int,
    objective: Callable[[], Objective],
    trainer: Trainer | None = None,
) -> tuple[Gradients, Objective]:
    """Per-sample gradients of the selected parameters, each in the units of the objective of that sample alone.

    Where the Trainer has a gradient scaler, the backward pass is scaled as in training, and again with less if it
    overflows.

    Raises:
        CaptureError: a gradient is NaN or infinite, or a selected layer took no part.
    """
    scale = loss_scale(trainer)
    while True:
        with capture:
            capture.begin(num_samples)
            with autocast(trainer):
                found = objective()
            capture.backward(found.total if scale == 1 else found.total * scale)
            gradients = capture.collect(require_finite=scale == 1)
        if scale == 1 or all(block.all_finite() for block in gradients.values()):
            return {name: block.scaled(found.scale / scale) for name, block in gradients.items()}, found
        scale = max(1.0, scale / 16)


def to_device(batch: Any, module: LightningModule, trainer: Trainer | None) -> Any:
    """Move a batch as the Trainer would, the user's transfer hooks included."""
    if trainer is None:  # the hooks themselves: a Trainer that the module was attached to earlier has no part in this
        batch = module.transfer_batch_to_device(module.on_before_batch_transfer(batch, 0), module.device, 0)
        return module.on_after_batch_transfer(batch, 0)
    batch = trainer.precision_plugin.convert_input(batch)
    runs = trainer.lightning_module or module  # may be a wrapper of the module, to which the Trainer brings the data
    batch = runs._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def autocast(trainer: Trainer | None) -> AbstractContextManager[Any]:
    """The precision context in which the Trainer runs a training step."""
    return nullcontext() if trainer is None else trainer.precision_plugin.train_step_context()


def loss_scale(trainer: Trainer | None) -> float:
    """By what the Trainer's gradient scaler multiplies losses now; 1 without one."""
    scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())
