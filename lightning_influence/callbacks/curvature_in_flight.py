"""Curvature from the training's own backward passes: every k-th batch adds its gradients, at its step's weights."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_influence.curvature import Accumulator, Curvature, CurvatureStatistics, OnePass, TrainingEvidence
from lightning_influence.errors import CaptureError, CurvatureError, UnsupportedError
from lightning_influence.gradients import GradientCapture, Gradients, Selection
from lightning_influence.objective import LossWatch, batch_scale
from lightning_influence.replay import loss_scale
from lightning_influence.samples import SampleTracker
from lightning_influence.self_check import SelfCheck


class CurvatureInFlight:
    """Sums of one-pass statistics over the batches that train, from one snapshot to the next.

    A sample's gradient is that of the sample alone: the factors of the mean, of gradient accumulation and of the
    gradient scaler are undone. Of several backward passes in a batch (LBFGS) the first counts. Batches whose gradients
    overflow under a gradient scaler are left out.

    Args:
        statistics: whose sums.
        selection: the parameters.
        check: what the first batch showed.
        tracker: tells how many samples a batch has, whatever it looks like.
        every_n_batches: which training batches are taken.
    """

    def __init__(
        self,
        statistics: CurvatureStatistics,
        selection: Selection,
        check: SelfCheck,
        tracker: SampleTracker,
        every_n_batches: int,
    ) -> None:
        assert isinstance(statistics, OnePass)
        self._statistics, self._selection, self._check = statistics, selection, check
        self._tracker, self._every_n_batches = tracker, every_n_batches
        self._sums: Accumulator = statistics.accumulator(selection)
        self._added, self._at, self._first = 0, 0, 0  # samples; their optimizer steps in all, and the first of these
        self._capture: GradientCapture | None = None
        self._watch: LossWatch | None = None
        self._size = 0

    @staticmethod
    def refuse(statistics: CurvatureStatistics, **settings: Any) -> None:
        """UnsupportedError for statistics or settings that have no meaning in flight."""
        if not isinstance(statistics, OnePass):
            raise UnsupportedError(
                f"{type(statistics).__name__} cannot be summed in flight",
                expected="sums over one pass of the batches: KFAC(), Diagonal() or ProjectedGram()",
                found=f"{statistics.name!r}, which is no such sum",
                hint="use mode='replay', or statistics='kfac'",
            )
        for name, value in settings.items():
            if value is not None and (name, value) != ("labels", "observed"):
                raise UnsupportedError(
                    f"{name} has no effect with mode='in_flight'",
                    expected="the labels, batches and loss of the training itself",
                    found=f"{name}={value!r}",
                    hint="use mode='replay'",
                )

    @staticmethod
    def refuse_module(module: LightningModule) -> None:
        """UnsupportedError for a training_step that says itself what is differentiated, and how often."""
        if not module.automatic_optimization:
            raise UnsupportedError(
                "curvature in flight follows automatic optimization",
                expected="one loss of one batch, returned by training_step",
                found=f"{type(module).__name__}, whose training_step optimizes by itself",
                hint="use mode='replay'; of several losses, `per_sample_loss(batch) -> (N,)` says which one is meant",
            )

    def batch_start(self, batch: Any, seen: int) -> None:
        """Hook the layers if this batch is to be taken."""
        self.batch_end()
        ids = self._tracker.pop_one(batch)
        if seen % self._every_n_batches:
            return
        self._size = len(ids)
        self._capture = GradientCapture(self._selection, functional=self._check.functional, factored=True)
        self._capture.attach()
        self._capture.begin(self._size)
        if self._check.weighted:
            self._watch = LossWatch()
            self._watch.__enter__()  # type: ignore[no-untyped-call]

    def after_backward(self, trainer: Trainer) -> None:
        """Add the gradients of the backward pass that has run."""
        if self._capture is None:
            return
        gradients = self._capture.collect(require_all=False, require_finite=False)
        calls = () if self._watch is None else tuple(self._watch.calls)
        self.batch_end()
        scale, where = loss_scale(trainer), f"the backward pass of optimizer step {trainer.global_step}"
        finite = all(block.all_finite() for block in gradients.values())
        if scale != 1 and not finite:
            return  # an overflow: the scaler skips this step
        missing = [name for name in self._selection.names if name not in gradients]
        if missing or not finite:
            raise CaptureError(
                f"no curvature can be taken from {where}",
                expected="finite gradients of every selected parameter",
                found=f"nothing for {', '.join(missing)}"
                if missing
                else f"NaN or infinite gradients of {_first_bad(gradients)}",
                hint="look for a diverged loss; select parameters that the loss of training_step always depends on, or "
                "use mode='replay'",
            )
        alone = batch_scale(calls, self._size, self._check.reduction) * (trainer.accumulate_grad_batches / scale)
        self._sums.update(iter([{name: block.scaled(alone) for name, block in gradients.items()}]))
        self._first = self._first if self._added else trainer.global_step
        self._added, self._at = self._added + self._size, self._at + self._size * trainer.global_step

    def batch_end(self) -> None:
        """Take the hooks off; safe at any time."""
        if self._watch is not None:
            self._watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._watch = None
        if self._capture is not None:
            self._capture.detach()
            self._capture = None

    def finish(self, evidence: TrainingEvidence, step: int) -> tuple[Curvature, dict[str, Any]]:
        """The curvature of what was added since the last time, and how stale that is; the sums begin anew.

        Raises:
            CurvatureError: in some process nothing was added.
        """
        device = evidence.module.device
        count = int(evidence.reduce(torch.tensor(self._added, device=device)))
        idle = int(evidence.reduce(torch.tensor(int(self._added == 0), device=device)))
        if idle:  # in all processes, or they would wait for one another
            raise CurvatureError(
                f"no training batch was added to the curvature of optimizer step {step}",
                expected="at least one in every process since the last snapshot, or since the fit was resumed",
                found=f"none in {idle} of them, with every_n_batches={self._every_n_batches}",
                hint="lower every_n_batches, take snapshots less often, or use mode='replay'",
            )
        curvature = self._sums.finish(evidence, count)
        age = {"mean_steps": step - self._at / self._added, "max_steps": float(step - self._first)}
        self._sums = self._statistics.accumulator(self._selection)
        self._added, self._at = 0, 0
        return curvature, {"mode": "in_flight", "num_samples": count, "staleness": age}


def _first_bad(gradients: Gradients) -> str:
    return next(repr(name) for name, block in gradients.items() if not block.all_finite())
