"""Small stores that the tests of this room start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Manifest, ParameterGroup

LENGTH, SHARD = 10, 4
MakeManifest = Callable[..., Manifest]


class Tied(nn.Module):
    """An embedding whose weight is also the head's, a frozen base, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.base = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.base.requires_grad_(False)

    def frozen_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if not parameter.requires_grad}


@pytest.fixture
def module() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture
def make_manifest(module: Tied) -> MakeManifest:
    def make(**changes: object) -> Manifest:
        fields: dict[str, object] = {
            "dataset_length": LENGTH,
            "dataset_fingerprint": "c0ffee",
            "parameters": Manifest.describe(module.named_parameters()),
            "selected": ("embedding.weight",),
            "mode": "replay",
            "shard_size": SHARD,
            "dtype": "float32",
            "settings": {"every_n_epochs": 1, "betas": (0.9, 0.999)},
        }
        return Manifest(**{**fields, **changes})  # type: ignore[arg-type]

    return make


def checkpoint_at(step: int, rate: float = 0.5) -> Checkpoint:
    group = ParameterGroup("SGD", 0, ("embedding.weight",), rate, rate * 10, {"momentum": 0.9})
    return Checkpoint(step, epoch=step // 10, mark=step, groups=(group,))


def gradients_of(span: tuple[int, int], scale: float = 1.0) -> dict[str, Tensor]:
    positions = torch.arange(*span, dtype=torch.float32)
    return {"dense|embedding.weight|values": scale * positions[:, None, None] + torch.zeros(7, 3)}


def spans(length: int = LENGTH, size: int = SHARD) -> list[tuple[int, int]]:
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def snapshot(store: ArtifactStore, module: Tied, step: int) -> Checkpoint:
    """A whole replay checkpoint: gradients committed shard by shard, then the checkpoint with its weights."""
    for span in spans():
        records = {"loss": torch.arange(*span) + 0.5, "margin": -torch.arange(*span, dtype=torch.float64)}
        store.commit(store.write_gradients(step, step, span, gradients_of(span, step), records))
    files = store.write_weights(step, step, module.state_dict(), module.frozen_names())
    files.append(store.write_preconditioner(step, step, {"embedding.weight": torch.full((7, 3), 2.0)}))
    store.commit_checkpoint(checkpoint_at(step), files)
    return checkpoint_at(step)


def chunk(store: ArtifactStore, mark: int, batches: int = 2) -> None:
    """Commit one in-flight chunk: two samples a batch, one step a batch."""
    count = 2 * batches
    ids = (torch.arange(count) + 2 * (mark - batches)) % LENGTH
    tensors = {"dense|embedding.weight|values": torch.full((count, 7, 3), float(mark))}
    records = {"steps": torch.arange(mark - batches, mark).repeat_interleave(2) + 1}
    steps = (mark - batches + 1, mark)
    store.commit(store.write_in_flight(steps, mark, batches, ids, tensors, records))


class Kit:
    """The functions above, for tests that cannot import from a conftest."""

    LENGTH, SHARD = LENGTH, SHARD
    checkpoint_at = staticmethod(checkpoint_at)
    gradients_of = staticmethod(gradients_of)
    spans = staticmethod(spans)
    snapshot = staticmethod(snapshot)
    chunk = staticmethod(chunk)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def replayed(tmp_path: Path, make_manifest: MakeManifest, module: Tied) -> ArtifactStore:
    """A store with whole checkpoints at the steps 10 and 20."""
    store = ArtifactStore.create(tmp_path / "store", make_manifest())
    snapshot(store, module, 10)
    with torch.no_grad():
        module.embedding.weight.add_(1)
        module.norm.running_mean.add_(1)  # type: ignore[union-attr, operator]
    snapshot(store, module, 20)
    return store


@pytest.fixture
def in_flight(tmp_path: Path, make_manifest: MakeManifest) -> ArtifactStore:
    """A store with in-flight chunks up to the marks 2, 4 and 6."""
    store = ArtifactStore.create(tmp_path / "flight", make_manifest(mode="in_flight"))
    for mark in (2, 4, 6):
        chunk(store, mark)
    return store
