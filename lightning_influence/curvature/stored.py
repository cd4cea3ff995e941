"""StoredEvidence: the training gradients that a store holds, as evidence for curvature without a pass of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NoReturn

import torch
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Gradients, Projection, Rows, unpack
from lightning_influence.gradients.blocks import spans


def stored_projection(store: ArtifactStore) -> Projection | None:
    """What the gradients of a store were projected by, if they were.

    Raises:
        StoreError: a projection that this version does not know.
    """
    record = store.manifest.settings.get("projection")
    return Projection.from_record(record) if isinstance(record, Mapping) else None


@dataclass(frozen=True)
class StoredEvidence:
    """The gradients of the given labels at a checkpoint, as `GradientSnapshot` wrote them; the same in every process.

    Attributes:
        store: where they are.
        at: whose gradients.
        names: of which parameters.
    """

    store: ArtifactStore
    at: Checkpoint
    names: tuple[str, ...]

    @property
    def selection(self) -> NoReturn:
        """There is none: a store knows no layers.

        Raises:
            CurvatureError: always.
        """
        raise self._refused("statistics that look at layers")

    @property
    def num_samples(self) -> int:
        """Samples of the training set."""
        return self.store.manifest.dataset_length

    @cached_property
    def projection(self) -> Projection | None:
        """What the gradients were projected by, if they were."""
        return stored_projection(self.store)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the parameters, before any projection."""
        return {name: self.store.manifest.parameters[name].shape for name in self.names}

    def visit(self, draw: int, batch: Callable[[Iterator[Gradients]], None]) -> None:
        """Call `batch` with one column for a part of a shard, as large as can be written out (see `Evidence.visit`).

        Raises:
            StoreError: no gradients at this checkpoint, or a damaged file.
        """
        for shard in self.store.shards(self.at):
            whole = unpack(shard.tensors)
            gradients = {name: whole[name] for name in self.names}
            sizes = [math.prod(block.shape) for block in gradients.values() if not isinstance(block, Rows)]
            parts = list(spans(shard.num_samples, max(sizes, default=1)))
            for part in parts:
                chosen = torch.arange(part.start, part.stop)
                some = gradients if len(parts) == 1 else {n: block.select(chosen) for n, block in gradients.items()}
                batch(iter([some]))

    def operator(self, matrix: Literal["hessian", "ggn"]) -> NoReturn:
        """Refused: products with a Hessian run the model.

        Raises:
            CurvatureError: always.
        """
        raise self._refused(f"products with the {matrix} matrix")

    def reduce(self, tensor: Tensor) -> Tensor:
        """The tensor: every process reads all gradients."""
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def _refused(self, what: str) -> CurvatureError:
        return CurvatureError(
            f"{what} cannot be had from stored gradients",
            expected="DataInf() or ProjectedGram()",
            found=f"gradients of {', '.join(self.names)} in {self.store.root}, without the model",
            hint="estimate this curvature from the model: CurvatureSnapshot(...), or pass module and train_loader",
        )
