"""Small models of every kind in float64, their data, and stores of two checkpoints with all gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_influence import InfluenceModule
from lightning_influence.artifacts import ArtifactStore, Manifest
from tests.stores import Classifier, Texts, all_names, classifier, collate, group, quiet, replay_store, trajectory

SAMPLES, QUERIES = 14, 5


class Perceptron(LightningModule):
    """Two layers on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Convolutions(Perceptron):
    """Two convolutions, one of them grouped, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 3)
        )


class Twice(Perceptron):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


class Normed(Classifier):
    """Word embeddings with a LayerNorm, and a layer that sees every position."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__(width, classes)
        self.norm = nn.LayerNorm(width)

    def features(self, tokens: Tensor) -> Tensor:
        present = (tokens != 0).unsqueeze(-1)
        return (torch.tanh(self.hidden(self.norm(self.embedding(tokens)))) * present).sum(1) / present.sum(1)


def vectors(count: int, seed: int, *shape: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(0, 3, (count,), generator=generator))


KINDS: Mapping[str, Any] = {"mlp": Perceptron, "cnn": Convolutions, "twice": Twice, "text": Normed}


class Case:
    """A model, its data and its store."""

    def __init__(self, kind: str, root: Path) -> None:
        self.module = classifier(kind=KINDS[kind])
        self.text = kind == "text"
        shape = (2, 5, 5) if kind == "cnn" else (6,)
        self.train: Any = Texts(SAMPLES) if self.text else vectors(SAMPLES, 0, *shape)
        self.asked: Any = Texts(QUERIES, seed=1) if self.text else vectors(QUERIES, 1, *shape)
        self.states = trajectory(self.module, 2)
        self.store: ArtifactStore = replay_store(
            root, self.module, self.train, self.states, lambda c: [group(all_names(self.module), 0.3 / (c + 1))],
            batch=self.batch,
        )  # fmt: skip

    @property
    def collate(self) -> Any:
        return collate if self.text else default_collate

    def batch(self, dataset: Any, positions: Sequence[int] | None = None) -> Any:
        return self.collate([dataset[i] for i in (range(len(dataset)) if positions is None else positions)])

    @property
    def ones(self) -> list[Any]:
        """Every training sample as a batch of one."""
        return [self.batch(self.train, [i]) for i in range(SAMPLES)]

    @property
    def ones_asked(self) -> list[Any]:
        """Every query as a batch of one."""
        return [self.batch(self.asked, [i]) for i in range(QUERIES)]

    def loader(self, dataset: Any, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
        return DataLoader(dataset, batch_size=batch_size, collate_fn=self.collate, **options)

    def influence(self, estimator: Any, **options: Any) -> InfluenceModule:
        options = {"k": SAMPLES, "train_loader": self.loader(self.train), **options}
        return InfluenceModule(self.module, self.store, estimator, **options)

    def streamed(self, influence: InfluenceModule, loader: Any = None, **trainer: Any) -> Tensor:
        """(Q, N): all training samples pass by and are ranked."""
        quiet(**trainer).predict(influence, self.loader(self.train) if loader is None else loader)
        return table(influence)


def bare_store(root: Path, case: Case, **facts: Any) -> ArtifactStore:
    """A store of the last checkpoint without gradients, as CurvatureSnapshot leaves one."""
    manifest = Manifest(**{**vars(case.store.manifest), "selected": (), **facts})
    store = ArtifactStore.create(root, manifest)
    at = case.store.checkpoints()[-1]
    store.commit_checkpoint(at, store.write_weights(at.step, at.mark, case.states[-1]))
    return store


def table(influence: InfluenceModule) -> Tensor:
    """All scores from a ranking of all samples."""
    ranking = influence.attribution.proponents
    return torch.empty_like(ranking.scores).scatter_(1, ranking.sample_ids, ranking.scores)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
