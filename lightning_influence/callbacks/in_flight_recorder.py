"""In flight: per-sample gradients taken in the user's own backward pass, at the weights that train on the sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_influence.artifacts import ArtifactStore, BackgroundWriter
from lightning_influence.callbacks.capture_plan import CapturePlan
from lightning_influence.callbacks.optimizer_record import OptimizerRecord, owners
from lightning_influence.callbacks.staleness import Staleness
from lightning_influence.errors import CaptureError
from lightning_influence.gradients import GradientCapture, Gradients, cat, pack
from lightning_influence.objective import LossWatch, batch_scale
from lightning_influence.replay import loss_scale
from lightning_influence.samples import SampleTracker

_CHUNK_BYTES = 16 << 20


@dataclass
class _Batch:
    """The training batch that runs, hooked."""

    ids: Tensor
    step: int  # optimizer steps before it
    capture: GradientCapture
    trained: list[nn.Parameter]  # selected parameters that require a gradient as the batch begins
    watch: LossWatch | None = None
    backward: bool = False
    taken: bool = False


@dataclass
class _Record:
    """What a training batch left, complete once its optimizer step is known."""

    mark: int
    step: int
    sample_ids: Tensor
    gradients: Gradients
    batch_size: Tensor  # (n,): the sample's share of the step's gradient is 1 / batch_size


@dataclass
class InFlightRecorder:
    """Hooks a training batch, waits for its optimizer step, and hands finished batches to a background writer.

    A record carries the learning rates of the very step that used it. Its gradient is that of the sample alone: the
    factors of the mean, of gradient accumulation and of the gradient scaler are undone. Of several backward passes in
    a batch (manual optimization, LBFGS) the first counts that reaches the selected layers while their parameters are
    being trained. Records of a step that the gradient scaler skips are dropped.
    """

    store: ArtifactStore
    plan: CapturePlan
    tracker: SampleTracker
    rates: OptimizerRecord
    owners: frozenset[int]  # optimizers that train the selected parameters
    staleness: Staleness
    recorded: int = (
        0  # training batches that are finished: those after it wait for their optimizer step, or left nothing
    )
    dropped: int = 0  # samples of steps that the gradient scaler skipped
    _writer: BackgroundWriter = field(default_factory=BackgroundWriter)
    _waiting: list[_Record] = field(default_factory=list)
    _finished: list[tuple[_Record, int, list[float]]] = field(default_factory=list)
    _bytes: int = 0
    _batch: _Batch | None = None
    _committed: int = 0  # training batches whose records are on disk
    _steps: tuple[int, int] = (0, 0)  # taken and skipped, by the owners, up to the last batch

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        store: ArtifactStore,
        plan: CapturePlan,
        tracker: SampleTracker,
        rates: OptimizerRecord,
        staleness: Staleness,
        recorded: int,
    ) -> InFlightRecorder:
        """The recorder of a fit that begins, or goes on after `recorded` batches."""
        which = owners(trainer, list(plan.selection.parameters.values()))
        recorder = cls(store, plan, tracker, rates, which, staleness, recorded, _committed=recorded)
        recorder._steps = rates.taken(which), rates.skipped(which)
        return recorder

    def batch_start(self, trainer: Trainer, batch: Any) -> None:
        """Learn the samples of the batch that begins and hook the selected layers."""
        self.release()
        ids = self.tracker.pop_one(batch)
        capture = self.plan.capture(functional=self.plan.check.functional)
        trained = [p for p in self.plan.selection.parameters.values() if p.requires_grad]
        self._batch = _Batch(ids, trainer.global_step, capture, trained)
        capture.attach()
        capture.begin(len(ids))
        if self.plan.check.weighted:
            self._batch.watch = LossWatch()
            self._batch.watch.__enter__()  # type: ignore[no-untyped-call]

    def after_backward(self, trainer: Trainer, module: LightningModule, mark: int) -> None:
        """Take the rows of the backward pass that has run, if it is the one that trains the selected parameters."""
        batch = self._batch
        if batch is None or batch.taken:
            return
        batch.backward = True
        if batch.trained and not any(parameter.requires_grad for parameter in batch.trained):
            batch.capture.discard()  # another optimizer's turn: this one only passes through
            return
        gradients = batch.capture.collect(require_all=False, require_finite=False)
        if not gradients:
            return
        batch.taken = True
        calls = batch.watch.calls if batch.watch is not None else ()
        self._unhook()
        missing = [name for name in self.plan.selection.names if name not in gradients]
        if missing:
            raise CaptureError(
                f"the layer of '{missing[0]}' took no part in this backward pass",
                expected="every selected layer in the loss",
                found=f"nothing for {', '.join(missing)} in training batch {mark}",
                hint="select only parameters that the loss depends on",
            )
        scale = loss_scale(trainer)
        if scale != 1 and not all(block.all_finite() for block in gradients.values()):
            self.dropped += len(batch.ids)  # an overflow: the scaler skips this step and lowers its scale
            return
        alone = batch_scale(calls, len(batch.ids), self.plan.check.reduction)
        accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        rows = {name: block.scaled(alone * (accumulated / scale)) for name, block in gradients.items()}
        stored = self.plan.stored(rows, f"training batch {mark}")
        share = torch.where(alone > 0, alone, 1.0).cpu() * (accumulated * trainer.world_size)  # no token: no gradient
        self._waiting.append(_Record(mark, batch.step, batch.ids, stored, share))

    def batch_end(self, trainer: Trainer, mark: int) -> None:
        """Unhook; if the optimizer stepped, the waiting records get its rates."""
        batch = self._batch
        self.release()
        if batch is not None and batch.backward and not batch.taken and trainer.lightning_module.automatic_optimization:
            raise CaptureError(
                "no backward pass reached the selected layers",
                expected=f"gradients of {', '.join(self.plan.selection.names)}",
                found=f"none in training batch {mark}",
                hint="select parameters that the loss of training_step depends on",
            )
        (taken, skipped), self._steps = self._steps, (self.rates.taken(self.owners), self.rates.skipped(self.owners))
        if self._steps[0] == taken:
            if self._steps[1] > skipped:
                self.dropped += sum(len(record.sample_ids) for record in self._waiting)
                self._waiting.clear()
            return
        rates = self.rates.rates(trainer)
        for record in self._waiting:
            self.staleness.add(record.step, len(record.sample_ids))
            self._finished.append((record, trainer.global_step, rates))
            self._bytes += sum(block.nbytes() for block in record.gradients.values())
            self.recorded = record.mark
        self._waiting.clear()
        if self._bytes >= _CHUNK_BYTES:
            self._submit()

    def release(self) -> None:
        """Take every hook off; safe at any time."""
        self._unhook()
        self._batch = None

    def _unhook(self) -> None:
        if self._batch is None:
            return
        if self._batch.watch is not None:
            self._batch.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._batch.watch = None
        self._batch.capture.detach()

    def flush(self) -> None:
        """Write and commit every finished record."""
        self._submit()
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer."""
        self.release()
        try:
            self._submit()
        finally:
            self._writer.close()

    def _submit(self) -> None:
        if not self._finished:
            return
        finished, self._finished, self._bytes = self._finished, [], 0
        self._writer.submit(lambda: self._write(finished))

    def _write(self, finished: list[tuple[_Record, int, list[float]]]) -> None:
        sizes = torch.tensor([len(record.sample_ids) for record, _, _ in finished])
        records = {
            "step": torch.tensor([step for _, step, _ in finished]).repeat_interleave(sizes),
            "rates": torch.tensor([rates for _, _, rates in finished], dtype=torch.float64).repeat_interleave(sizes, 0),
            "batch_size": torch.cat([record.batch_size for record, _, _ in finished]).double(),
        }
        last = finished[-1][0].mark
        artifact = self.store.write_in_flight(
            (finished[0][1], finished[-1][1]),
            last,
            last - self._committed,
            torch.cat([record.sample_ids for record, _, _ in finished]),
            pack(cat([record.gradients for record, _, _ in finished])),
            records,
        )
        self.store.commit(artifact)
        self._committed = last
