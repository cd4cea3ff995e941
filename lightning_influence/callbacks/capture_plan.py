"""What a run captures and in which form it is stored: selection, what the self-check found, projection and dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import GradientBlock, GradientCapture, Gradients, Projection, Rows, Selection
from lightning_influence.objective import PerSample
from lightning_influence.self_check import SelfCheck

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_RECORD_BYTES = 24  # sample id, and loss, margin and probability, or step, rate and batch size


@dataclass(frozen=True)
class CapturePlan:
    """Everything that turns a batch's captured gradients into what lies in a shard.

    Attributes:
        selection: the parameters.
        check: what the first batch showed.
        per_sample_loss: the user's own loss, if any.
        top_words: words kept per sample in row-sparse gradients; `None` keeps all.
        dtype: of the stored values.
        projection: what the gradients go through before they are stored, if anything.
        features: keep what goes into the last layer beside them.
    """

    selection: Selection
    check: SelfCheck
    per_sample_loss: PerSample | None
    top_words: int | None
    dtype: torch.dtype
    projection: Projection | None = None
    features: bool = False

    def capture(self, *, functional: bool = True) -> GradientCapture:
        """A capture of the selection, in the form that costs least to store."""
        factored = self.projection is not None and self.projection.factored
        return GradientCapture(self.selection, functional=functional, factored=factored)

    def stored(self, gradients: Gradients, where: str) -> Gradients:
        """The gradients as they are written, on the CPU.

        Raises:
            CaptureError: a value is NaN or infinite, or becomes so in the storage dtype.
        """
        return {name: self._stored(name, block, where) for name, block in gradients.items()}

    def bytes_per_sample(self) -> float:
        """Bytes that one sample needs in a shard, records included, estimated from the checked batch."""
        stored = self.stored(self.check.gradients, "the checked batch")
        gradients = sum(block.nbytes() for block in stored.values())
        return gradients / max(1, next(iter(stored.values())).num_samples) + _RECORD_BYTES

    def _stored(self, name: str, block: GradientBlock, where: str) -> GradientBlock:
        if not block.all_finite():
            raise CaptureError(
                f"the gradient of '{name}' is NaN or infinite in {where}",
                expected="finite per-sample gradients",
                found="NaN or infinity",
                hint="look for a diverged loss, a division by zero or an overflow in mixed precision; "
                "what was committed before stays valid",
            )
        if isinstance(block, Rows) and self.top_words is not None:
            block = block.top_words(self.top_words)
        if self.projection is not None:
            block = self.projection.apply({name: block})[name]
        small = block.to(device="cpu", dtype=self.dtype)
        if not small.all_finite():
            raise CaptureError(
                f"the gradient of '{name}' overflows {str(self.dtype).removeprefix('torch.')} in {where}",
                expected="values that the storage dtype can hold",
                found=f"values up to {float(block.norm().max()):.3g}",
                hint='store bfloat16 or float32: GradientSnapshot(dtype="bfloat16")',
            )
        return small
