"""Small networks trained to the bottom of their loss, one after the other: the truth about several stages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import InfluenceFunction, InfluenceModule, MultiStage, link_checkpoint
from lightning_influence.artifacts import ArtifactStore, StageLink

DECAY = 0.05
SHARED = ("encoder.0.weight", "encoder.0.bias")
STEP = 1e-4
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


def fit(
    root: Path, module: LightningModule, dataset: Any, *callbacks: Callback, epochs: int = 2, **options: Any
) -> Trainer:
    """A short fit over a dataset (in batches of 4, shuffled by one seed) or a loader."""
    settings = {"logger": False, "enable_checkpointing": False, **options}
    ckpt_path = settings.pop("ckpt_path", None)
    made = Trainer(
        default_root_dir=root, max_epochs=epochs, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    shuffled = {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(0)}
    data = DataLoader(dataset, **shuffled) if isinstance(dataset, TensorDataset) else dataset
    made.fit(module, data, ckpt_path=ckpt_path)
    return made


class Finetuned(Network):
    """The network with an optimizer of choice, over what requires gradients."""

    def __init__(self, classes: int = 2, optimizer: str = "sgd", frozen: bool = False, **options: Any) -> None:
        super().__init__(classes)
        self.kind, self.options = optimizer, options
        if frozen:
            self.encoder.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        if self.kind == "sgd":
            defaults = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01, **self.options}
            return torch.optim.SGD(trained, **defaults)
        if self.kind == "lbfgs":
            return torch.optim.LBFGS(trained, lr=0.1)
        return getattr(torch.optim, self.kind)(trained, **{"lr": 0.01, **self.options})


def begun(pretrained: Network, kind: type[Finetuned] = Finetuned, **options: Any) -> Finetuned:
    """A module to finetune, with the encoder of a pretrained one."""
    torch.manual_seed(1)
    module = kind(**options).double()
    module.encoder.load_state_dict(pretrained.encoder.state_dict())
    return module


# -- two runs trained to the bottom, and what multi-stage influence says of them ------------------------------------


@dataclass
class Stages:
    """Two runs, trained to the bottom, with their stores."""

    pre: Network
    fine: Network
    pre_store: ArtifactStore
    fine_store: ArtifactStore

    def scores(self, estimator: Any, asked: Any, **options: Any) -> Tensor:
        return InfluenceModule(self.fine, self.fine_store, estimator, **options).scores(asked.tensors)


PRE_DATA, FINE_DATA, ASKED = data(9, 3, 0), data(8, 2, 1), data(3, 2, 2)


def pretrained(sample: int = 0, weight: float = 0.0) -> State:
    module = network(3, 0)
    return minimum(objective(module, PRE_DATA, sample=sample, weight=weight), begin=_pretrained_begin())


_BEGIN: dict[str, State] = {}


def _pretrained_begin() -> State:
    if "pre" not in _BEGIN:
        module = network(3, 0)
        _BEGIN["pre"] = minimum(objective(module, PRE_DATA), state_of(module))
    return _BEGIN["pre"]


def finetuned(start: State, alpha: float | None) -> State:
    """The state of the finetuned network: α is `None` where the encoder is frozen."""
    module = network(2, 1)
    begin = _BEGIN.get(f"fine {alpha}", {**state_of(module), **encoder(start)})
    if alpha is None:
        head = {name: value for name, value in begin.items() if name.startswith("head")}
        found = {**encoder(start), **minimum(objective(module, FINE_DATA, encoder(start)), head)}
    else:
        found = minimum(objective(module, FINE_DATA, alpha=alpha, start=encoder(start)), begin)
    _BEGIN.setdefault(f"fine {alpha}", found)
    return found


def true_scores(alpha: float | None, samples: range) -> Tensor:
    """−dm/dε by central differences over both stages, (Q, samples)."""
    module = network(2, 1)
    columns = []
    for sample in samples:
        ends = [
            losses(module, finetuned(pretrained(sample, sign * STEP), alpha), ASKED).detach() for sign in (1.0, -1.0)
        ]
        columns.append(-(ends[0] - ends[1]) / (2 * STEP))
    return torch.stack(columns, 1)


def stages(root: Path, alpha: float | None, statistics: Any = None) -> Stages:
    start = pretrained()
    pre = with_state(network(3, 0), start)
    fine = with_state(network(2, 1), finetuned(start, alpha))
    pre_store = stored(root / "pre", pre, PRE_DATA, statistics)
    if alpha is None:
        for name in SHARED:
            fine.get_parameter(name).requires_grad_(False)
    fine_store = stored(root / "fine", fine, FINE_DATA, statistics)
    facts = {"frozen": SHARED} if alpha is None else {}
    return Stages(pre, fine, pre_store, linked(fine_store, pre_store, dict(zip(SHARED, SHARED, strict=True)), **facts))


def estimator(curvature: Any, made: Stages, link: Any = None, **options: Any) -> MultiStage:
    exact = InfluenceFunction(curvature, damping=0.0)
    return MultiStage(
        exact, link, finetuned=InfluenceFunction(curvature, damping=0.0), module=made.pre,
        train_loader=loader(PRE_DATA), **options,
    )  # fmt: skip


def trainer(**options: Any) -> Trainer:
    return Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, **options,
    )  # fmt: skip


def streamed(
    made: Stages, asked: Any, method: MultiStage, fine_data: Any = FINE_DATA, pre_data: Any = PRE_DATA
) -> Tensor:
    """All scores of pretraining samples that stream by."""
    influence = InfluenceModule(made.fine, made.fine_store, method, train_loader=loader(fine_data), k=len(pre_data))
    influence.prepare([asked.tensors])
    trainer().predict(influence, loader(pre_data))
    ranking = influence.attribution.proponents
    return torch.zeros_like(ranking.scores).scatter(1, ranking.sample_ids, ranking.scores)


def rows(module: Network, dataset: Any) -> Tensor:
    """The loss gradient of every sample, (N, P)."""
    found = []
    for x, y in zip(*dataset.tensors, strict=True):
        flat = flat_of(module).requires_grad_()
        loss = F.cross_entropy(logits_at(module, flat, x)[None], y[None])
        found.append(torch.autograd.grad(loss, flat)[0])
    return torch.stack(found)


def flat_of(module: Network) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def logits_at(module: Network, flat: Tensor, x: Tensor) -> Tensor:
    named = dict(module.named_parameters())
    parts = flat.split([p.numel() for p in named.values()])
    state = {name: part.view(p.shape) for (name, p), part in zip(named.items(), parts, strict=True)}
    return torch.func.functional_call(module, state, (x[None],))[0]  # type: ignore[no-any-return]
