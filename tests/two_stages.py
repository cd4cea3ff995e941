"""Small networks trained to the bottom of their loss, one after the other: the truth about several stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import link_checkpoint
from lightning_influence.artifacts import ArtifactStore, StageLink

DECAY = 0.05
State = dict[str, Tensor]
Objective = Callable[[State], Tensor]


class Network(LightningModule):
    """tanh features, and a head of its own."""

    def __init__(self, classes: int = 3, inputs: int = 3, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(inputs, width), nn.Tanh())
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=DECAY)


def network(classes: int, seed: int) -> Network:
    torch.manual_seed(seed)
    return Network(classes).double()


def data(count: int, classes: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, classes, (count,), generator=generator))


def loader(dataset: TensorDataset, batch_size: int = 5) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size)


def losses(module: nn.Module, state: Mapping[str, Tensor], dataset: TensorDataset) -> Tensor:
    """The loss of every sample at a state, (N,)."""
    x, y = dataset.tensors
    return F.cross_entropy(functional_call(module, dict(state), (x,)), y, reduction="none")


def objective(
    module: nn.Module, dataset: TensorDataset, fixed: State | None = None, *, sample: int = 0, weight: float = 0.0,
    alpha: float = 0.0, start: State | None = None, decay: float = DECAY,
) -> Objective:  # fmt: skip
    """Mean loss, weight decay of what is free, one sample weighted up, and α‖W − W*‖² towards a start."""

    def value(free: State) -> Tensor:
        found = losses(module, {**(fixed or {}), **free}, dataset)
        total = found.mean() + weight * found[sample]
        total = total + decay / 2 * sum(p.square().sum() for p in free.values())
        if start is not None:
            total = total + alpha * sum((free[name] - start[name]).square().sum() for name in start)
        return total

    return value


def minimum(value: Objective, begin: State, steps: int = 60) -> State:
    """Newton's method, damped where it must be, down to rounding."""
    names, shapes = list(begin), [begin[name].shape for name in begin]
    sizes = [shape.numel() for shape in shapes]

    def state(flat: Tensor) -> State:
        return {n: part.view(s) for n, part, s in zip(names, flat.split(sizes), shapes, strict=True)}

    x = torch.cat([begin[name].detach().reshape(-1) for name in names])
    f = lambda flat: value(state(flat))  # noqa: E731
    for _ in range(steps):
        gradient = torch.func.grad(f)(x)
        hessian = torch.func.jacrev(torch.func.grad(f))(x)
        lowest = float(torch.linalg.eigvalsh(hessian)[0])
        shift = 0.0 if lowest > 1e-6 else 1e-3 - lowest
        step = torch.linalg.solve(hessian + shift * torch.eye(len(x), dtype=x.dtype), gradient)
        size = 1.0
        while size > 1e-6 and float(f(x - size * step)) > float(f(x)) + 1e-14:
            size /= 2
        x = x - size * step
        if float(gradient.norm()) < 1e-14:
            break
    assert float(torch.func.grad(f)(x).norm()) < 1e-11
    return {name: tensor.clone() for name, tensor in state(x.detach()).items()}


def state_of(module: nn.Module) -> State:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def with_state(module: Network, state: State) -> Network:
    """A copy of the module with these weights."""
    copied = copy.deepcopy(module)
    copied.load_state_dict({**copied.state_dict(), **state})
    return copied


def encoder(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.startswith("encoder")}


def stored(
    root: Path, module: Network, dataset: TensorDataset, statistics: Any = None, **options: Any
) -> ArtifactStore:
    """The store of a run that ended at the module's weights."""
    return link_checkpoint(module, root, loader(dataset), statistics=statistics, weight_decay=DECAY, **options)


def linked(store: ArtifactStore, parent: ArtifactStore, shared: Mapping[str, str], **facts: Any) -> ArtifactStore:
    """The store with a link to another."""
    link = StageLink(parent.identity, str(parent.root), f"../{parent.root.name}", shared, complete=True)
    ArtifactStore.resume(store.root, store.manifest, None).record_link(replace(link, **facts))
    return ArtifactStore.open(store.root)
