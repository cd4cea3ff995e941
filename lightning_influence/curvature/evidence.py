"""TrainingEvidence: a training set walked at a model's present weights, its labels chosen, its sums shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.curvature.operators import LossOperator
from lightning_influence.errors import CaptureError, CurvatureError, LossError, QueryError
from lightning_influence.gradients import GradientCapture, Gradients, Selection
from lightning_influence.objective import (
    Labels,
    Objective,
    PerSample,
    Reduction,
    label_objectives,
    training_objective,
)
from lightning_influence.replay import TrainingData, autocast, isolated, loss_scale, to_device

_LOOKED_AT = (64, 512)  # samples whose gradients say how far training has come: an eighth of them all, in these bounds
_NORMED = 32  # of these, samples whose own norms are taken
_CHOICES: tuple[Labels, ...] = ("exact", "sampled", "observed")  # each suits all losses of those before it, and more


@dataclass(frozen=True)
class Stationarity:
    """How near the weights are to a stationary point, which influence functions assume.

    Attributes:
        mean_gradient: norm of the mean gradient of the loss, weight decay included.
        sample_gradient: root mean square norm of the gradients of single samples.
        num_samples: how many were looked at.
    """

    mean_gradient: float
    sample_gradient: float
    num_samples: int

    @property
    def ratio(self) -> float:
        """The one by the other; about 1/sqrt(num_samples) of it is noise."""
        return self.mean_gradient / max(self.sample_gradient, 1e-300)

    @property
    def excess(self) -> float:
        """The ratio without what single samples' noise makes of it: near 0 at a stationary point."""
        return float(max(0.0, self.ratio**2 - 1 / self.num_samples) ** 0.5)


@dataclass
class TrainingEvidence:
    """The evidence of a model and a training set; nothing of either changes.

    Attributes:
        module: the model at its present weights; run in eval mode, isolated.
        selection: the parameters that the curvature is about.
        data: the training set.
        labels: over which labels (see `objective.label_objectives`); `None` chooses, and the choice is kept.
        seed: of sampled labels and of the sampled part.
        at_most: walk a seeded random part of so many samples; `None` is all.
        positions: walk these samples instead.
        batch_size: samples a batch; `None` is that of the loader.
        trainer: whose precision, devices and processes are used; `None` runs in this process.
        per_sample_loss, reduction: the training loss of one sample, as in `objective.training_objective`.
        decay: weight decay by parameter name, for the gradient's norm.
    """

    module: LightningModule
    selection: Selection
    data: TrainingData
    labels: Labels | None = None
    seed: int = 0
    at_most: int | None = None
    positions: Sequence[int] | None = None
    batch_size: int | None = None
    trainer: Trainer | None = None
    per_sample_loss: PerSample | None = None
    reduction: Reduction = "mean"
    decay: dict[str, float] = field(default_factory=dict)
    stationarity: Stationarity | None = None

    @property
    def num_samples(self) -> int:
        """Samples that are walked, of all processes together."""
        available = len(self.data) if self.positions is None else len(self.positions)
        return available if self.at_most is None else min(self.at_most, available)

    def visit(self, draw: int, batch: Callable[[Iterator[Gradients]], None]) -> None:
        """Call `batch` with the columns of every batch of this process (see `Evidence.visit`)."""
        capture = GradientCapture(self.selection, factored=True)
        enough = min(max(self.num_samples // 8, _LOOKED_AT[0]), _LOOKED_AT[1])
        look = _Look(self.decay, self.selection) if draw == 0 and self.stationarity is None else None

        def run(found: Objective, ids: Tensor, placed: Any) -> None:
            def over(labels: Labels | None) -> tuple[Labels, Iterator[Objective]]:
                with autocast(self.trainer):
                    return label_objectives(self.module, placed, found, ids, labels, seed=self.seed, draw=draw)

            taken, objectives = over(self.labels)
            if self.labels is None:  # for all batches and passes to come, in all processes
                self.labels = self._agreed(taken, found.total.device)
                objectives = objectives if self.labels == taken else over(self.labels)[1]
            if look is not None and look.count < enough and bool((found.scale > 0).any()):
                look.add(next(self._columns(capture, iter([found]))))
            batch(self._columns(capture, objectives))

        self._walk(run, f"curvature, pass {draw + 1}", capture)
        if look is not None:
            self.stationarity = look.found()

    def visit_objectives(self, use: Callable[[Objective, Tensor, Any], None], what: str) -> None:
        """Call `use` with the training objective of every batch of this process, its graph kept, the sample ids, and
        the batch."""
        self._walk(use, what, None)

    def summed_gradients(self, what: str) -> dict[str, Tensor]:
        """Σ ∇ℓ over the samples of this process, by parameter name in float64.

        Raises:
            QueryError: a gradient is NaN or infinite.
        """
        parameters = self.selection.parameters
        sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}

        def add(found: Objective, ids: Tensor, batch: Any) -> None:
            each = torch.autograd.grad(found.summed(), list(parameters.values()), materialize_grads=True)
            for (name, total), found_gradient in zip(sums.items(), each, strict=True):
                gradient = found_gradient.to_dense() if found_gradient.is_sparse else found_gradient
                if not bool(gradient.isfinite().all()):
                    raise QueryError(
                        f"the gradient of {name!r} is NaN or infinite, in samples {int(ids[0])} to {int(ids[-1])}",
                        expected="finite gradients",
                        found="NaN or infinity",
                        hint="look at these samples and their losses",
                    )
                total += gradient

        self.visit_objectives(add, what)
        return sums

    def operator(self, matrix: Literal["hessian", "ggn"]) -> LossOperator:
        """Products with the exact Hessian or Gauss–Newton matrix of the mean loss."""
        return LossOperator(self, matrix)

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self._world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of process zero, in place."""
        if self._world_size > 1:
            tensor = tensor.contiguous()
            torch.distributed.broadcast(tensor, 0)
        return tensor

    def _agreed(self, labels: Labels, device: torch.device) -> Labels:
        """What all processes take, when the first batch of each has chosen for itself: the choice that suits most."""
        votes = self.reduce(torch.tensor([labels == choice for choice in _CHOICES], dtype=torch.float32, device=device))
        return _CHOICES[int(votes.nonzero().max())]

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _positions(self) -> list[Sequence[int]]:
        """The batches of this process: dataset order, dealt out to the processes in turn."""
        positions: Sequence[int] = range(len(self.data)) if self.positions is None else self.positions
        if self.num_samples < len(positions):
            drawn = torch.randperm(len(positions), generator=torch.Generator().manual_seed(self.seed))
            positions = [positions[i] for i in sorted(drawn[: self.num_samples].tolist())]
        size = self.batch_size or self.data.batch_size
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        rank = 0 if self.trainer is None else self.trainer.global_rank
        if len(batches) < self._world_size:
            raise CurvatureError(
                "there are fewer batches than processes",
                expected=f"at least {self._world_size} batches of {size} samples",
                found=f"{len(batches)}",
                hint="use fewer processes, a smaller batch_size, or more samples",
            )
        return batches[rank :: self._world_size]

    def _walk(self, run: Callable[[Objective, Tensor, Any], None], what: str, capture: GradientCapture | None) -> None:
        positions = self._positions()
        shown = self.trainer is None or (self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None)
        bar = tqdm(total=sum(map(len, positions)), desc=what, unit="sample", delay=2.0, leave=False, disable=not shown)
        # A failure must end the walk at once: until then the module is isolated.
        batches = self.data.batches(positions)
        with isolated(self.module, self.trainer) as manual_losses, closing(batches), bar:
            for ids, batch in zip(positions, batches, strict=True):
                placed = to_device(batch, self.module, self.trainer)
                try:
                    if capture is not None:
                        capture.attach()
                        capture.begin(len(ids))
                    with autocast(self.trainer):
                        found = training_objective(
                            self.module,
                            placed,
                            len(ids),
                            per_sample_loss=self.per_sample_loss,
                            reduction=self.reduction,
                            manual_losses=manual_losses,
                        )
                    if capture is not None:
                        capture.forward_is_over()
                    run(found, torch.tensor(ids, device=found.total.device), placed)
                except (CaptureError, LossError) as error:
                    raise type(error)(
                        f"{error.what}, in samples {ids[0]} to {ids[-1]} of the training set",
                        expected=error.expected,
                        found=error.found,
                        hint=error.hint,
                    ) from error
                finally:
                    if capture is not None:
                        capture.detach()
                bar.update(len(ids))

    def _columns(self, capture: GradientCapture, objectives: Iterator[Objective]) -> Iterator[Gradients]:
        """Per-sample gradients of one objective after the other, from one forward pass."""
        scale = loss_scale(self.trainer)
        for objective in objectives:
            with autocast(self.trainer):
                total = objective.total if scale == 1 else objective.total * scale
            capture.backward(total, retain_graph=True)
            # Looking at every gradient costs as much as a covariance: they are searched where the total tells of NaN,
            # and the sums that are made of them are looked at in the end.
            gradients = capture.collect(require_finite=not bool(torch.isfinite(total)))
            factor = objective.scale / scale
            alone = bool((factor == 1).all())
            yield gradients if alone else {name: block.scaled(factor) for name, block in gradients.items()}


class _Look:
    """Sums over the first samples' own gradients."""

    def __init__(self, decay: dict[str, float], selection: Selection) -> None:
        self._decay, self._selection = decay, selection
        self._sums: dict[str, Tensor] = {}
        self._squares, self.count = 0.0, 0

    def add(self, gradients: Gradients) -> None:
        for name, block in gradients.items():
            total = block.sum().double()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            some = block.select(torch.arange(min(_NORMED, block.num_samples)))
            self._squares += float(some.norm().double().square().mean()) * block.num_samples
        self.count += next(iter(gradients.values())).num_samples

    def found(self) -> Stationarity | None:
        if not self.count:
            return None
        square = 0.0
        for name, total in self._sums.items():
            weight = self._selection.parameters[name].detach().double()
            square += float((total / self.count + self._decay.get(name, 0.0) * weight).square().sum())
        return Stationarity(square**0.5, (self._squares / self.count) ** 0.5, self.count)
