"""HeldWeights: the weights of several checkpoints in memory, put into the module in turn without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.fitted import load_weights


class HeldWeights:
    """The weights of some checkpoints, on the module's device.

    Where there is one checkpoint and the module has its weights already, nothing is held or copied.
    """

    def __init__(self, module: LightningModule, store: ArtifactStore, checkpoints: Sequence[Checkpoint]) -> None:
        self._module, self._store = module, store
        self._weights = {
            at.step: {name: value.to(module.device) for name, value in store.weights(at).items()} for at in checkpoints
        }
        with torch.inference_mode(False):
            if len(checkpoints) == 1 and _alike(_tensors(module), self._weights[checkpoints[0].step]):
                self._weights = {}

    @contextmanager
    def in_turn(self) -> Iterator[Callable[[Checkpoint], None]]:
        """A function that puts the weights of a checkpoint in place; the module's own are put back on the way out,
        after an exception too."""
        with torch.inference_mode(False):
            if not self._weights:
                yield lambda at: None
                return
            own = {name: value.detach().clone() for name, value in _tensors(self._module).items()}
            try:
                yield lambda at: load_weights(self._module, self._weights[at.step], own, self._store)
            finally:
                self._module.load_state_dict(own, strict=False)


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def _alike(own: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    return own.keys() == weights.keys() and all(
        value.dtype == weights[name].dtype and torch.equal(value, weights[name]) for name, value in own.items()
    )
