"""Features of samples as a trained model sees them: what goes into its last layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import select


class Features:
    """Collects the inputs of the last layer, one tensor a forward pass."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def rows(self, num_samples: int) -> Tensor:
        """(N, D) float32 of the forward passes since the last call, N samples together; the mean over positions where a
        sample has several.

        Raises:
            CaptureError: the last layer was not called once for each batch, or does not have the samples first.
        """
        seen, self.seen = self.seen, []
        if any(part.ndim < 2 for part in seen) or sum(map(len, seen)) != num_samples:
            raise CaptureError(
                "the features of these samples cannot be told",
                expected=f"a last layer that is called once a batch, {num_samples} samples together, samples first",
                found=", ".join(f"an input of shape {tuple(part.shape)}" for part in seen[:3]) or "no call",
                hint="leave features out, or call the last layer once with (N, ..., D)",
            )
        return torch.cat([part.float().reshape(len(part), -1, part.shape[-1]).mean(1) for part in seen])


@contextmanager
def features_of(module: nn.Module) -> Iterator[Features]:
    """Watch the last layer of a module (see `select(module, "last_layer")`) while it is active."""
    found = Features()

    def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            found.seen.append(args[0].detach())

    with ExitStack() as stack:
        for layer in select(module, "last_layer").layers:
            stack.callback(layer.register_forward_pre_hook(note).remove)
        yield found
