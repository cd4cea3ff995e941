"""What the tests of curvatures share: small models in float64, evidence without a Trainer, curvatures written out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_influence.curvature import Curvature, TrainingEvidence
from lightning_influence.gradients import Dense, Gradients, select
from lightning_influence.replay import TrainingData


class Model(LightningModule):
    """Logits of a network, and their cross-entropy; batches are (inputs, class indices)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self(batch[0])
        return F.cross_entropy(z.flatten(0, -2), batch[1].flatten())


def every_label(module: Any, batch: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """Probability and loss of every class at every position of a batch of one, as in the mean over its positions."""
    log_p = module(batch[0]).log_softmax(-1).flatten(0, -2)  # (T, C)
    for row in log_p:
        for value in row:
            yield value.detach().exp() / len(log_p), -value


def given_label(module: Any, batch: Any) -> Iterable[tuple[float, Tensor]]:
    """The one term of the empirical Fisher information."""
    yield 1.0, module.training_step(batch, 0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def integers(high: int, *shape: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=seeded(seed))


def model(make: Any, seed: int = 0) -> Any:
    """What `make` builds, from a fixed random state and in float64; a bare network becomes a `Model`."""
    seed_everything(seed, verbose=False)
    built = make()
    return (built if isinstance(built, LightningModule) else Model(built)).double()


def evidence(
    module: LightningModule,
    dataset: Dataset[Any],
    parameters: str | Sequence[str] = "all",
    *,
    batch_size: int = 4,
    collate: Any = default_collate,
    **options: Any,
) -> TrainingEvidence:
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate)
    return TrainingEvidence(module, select(module, parameters), TrainingData.of(loader), **options)


def singles(dataset: Dataset[Any], collate: Any = default_collate) -> list[Any]:
    return [collate([dataset[i]]) for i in range(len(dataset))]  # type: ignore[arg-type]


def classified(inputs: Tensor, classes: int = 3, *positions: int, seed: int = 9) -> TensorDataset:
    """Inputs with random labels, one for each of the positions."""
    return TensorDataset(inputs, integers(classes, len(inputs), *positions, seed=seed))


def shapes_of(module: nn.Module, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    parameters = dict(module.named_parameters())
    return {name: tuple(parameters[name].shape) for name in names}


def vectors(shapes: dict[str, tuple[int, ...]], count: int = 3, seed: int = 0) -> dict[str, Dense]:
    """Random vectors, of every parameter."""
    return {name: Dense(draws(count, *shape, seed=seed + k)) for k, (name, shape) in enumerate(shapes.items())}


def flat(v: Gradients, names: Iterable[str]) -> Tensor:
    """(Q, P)"""
    return torch.cat([v[name].dense().flatten(1) for name in names], 1)


def laid_out(matrix: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Dense]:
    """Rows (Q, P) as gradients."""
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    parts = zip(shapes.items(), matrix.split(sizes, 1), strict=True)
    return {name: Dense(part.reshape(-1, *shape)) for (name, shape), part in parts}


def matrix_of(curvature: Curvature, shapes: dict[str, tuple[int, ...]]) -> Tensor:
    """H written out by its products with unit vectors, over these parameters end to end."""
    size = sum(torch.Size(shape).numel() for shape in shapes.values())
    return flat(curvature.matvec(laid_out(eye(size), shapes)), shapes)


def same(found: Tensor, truth: Tensor, rtol: float = 1e-10) -> None:
    """Equal up to rounding: of every entry, and of the largest where entries nearly vanish."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, truth, rtol=rtol, atol=1e-2 * rtol * float(truth.abs().max()))
