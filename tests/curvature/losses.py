"""Small float64 models for every kind of loss, and their Hessian and Gauss–Newton matrix by explicit formulas."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, default_collate

from lightning_influence.curvature import TrainingEvidence
from lightning_influence.gradients import select
from lightning_influence.replay import TrainingData

Parameters = Mapping[str, Tensor]


class Model(LightningModule):
    """A network and a loss of what it says; the batch is a dictionary with "x", which may be several, and "y"."""

    def __init__(self, network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.network, self.loss, self.options = network, loss, options

    def forward(self, batch: Any) -> Tensor:
        return self.network(batch["x"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch), batch["y"])


@dataclass
class Case:
    """A model, its samples, and the loss of one sample in two steps: predictions z, and the loss of z."""

    module: LightningModule
    samples: list[Any]
    loss_of_one: Callable[[Tensor, Any], Tensor]
    output_of_one: Callable[[Parameters, Any], Tensor] | None = None
    collate: Callable[[list[Any]], Any] = default_collate
    extra: Callable[[Parameters], Tensor] | None = None
    one: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.module.double()
        self.one = [self.collate([sample]) for sample in self.samples]

    def evidence(self, parameters: Any = "all", batch_size: int = 3, **options: Any) -> TrainingEvidence:
        loader: Any = DataLoader(self.samples, batch_size=batch_size, collate_fn=self.collate)
        return TrainingEvidence(self.module, select(self.module, parameters), TrainingData.of(loader), **options)

    def output(self, parameters: Parameters, batch: Any) -> Tensor:
        if self.output_of_one is not None:
            return self.output_of_one(parameters, batch)
        return functional_call(self.module, dict(parameters), (batch,))

    def _parts(self, flat: Tensor) -> dict[str, Tensor]:
        named = dict(self.module.named_parameters())
        parts = flat.split([p.numel() for p in named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.module.parameters()])

    def hessian(self) -> Tensor:
        """∇² of the mean of the samples' own losses, all parameters laid end to end."""
        self.module.eval()

        def mean(flat: Tensor) -> Tensor:
            parts = self._parts(flat)
            losses = [self.loss_of_one(self.output(parts, batch), batch) for batch in self.one]
            extra = 0.0 if self.extra is None else self.extra(parts)
            return torch.stack(losses).mean() + extra

        with sdpa_kernel(SDPBackend.MATH):
            return torch.autograd.functional.hessian(mean, self.flat())

    def ggn(self, curvature: Callable[[Tensor, Any], Tensor] | None = None) -> Tensor:
        """Mean of Jᵀ (∇²_z ℓ) J; `curvature(z, batch)`, (Z, Z), in place of ∇²_z ℓ where it is given."""
        self.module.eval()
        total = torch.zeros(len(self.flat()), len(self.flat()), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            for batch in self.one:

                def output(flat: Tensor, batch: Any = batch) -> Tensor:
                    return self.output(self._parts(flat), batch)

                z = output(self.flat().requires_grad_()).detach()
                jacobian = torch.autograd.functional.jacobian(output, self.flat()).reshape(z.numel(), -1)
                if curvature is None:
                    inner = torch.autograd.functional.hessian(
                        lambda v, batch=batch, shape=z.shape: self.loss_of_one(v.view(shape), batch), z.reshape(-1)
                    )
                else:
                    inner = curvature(z, batch)
                total += jacobian.T @ inner @ jacobian
        return total / len(self.one)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def pairs(x: Tensor, y: Tensor) -> list[dict[str, Tensor]]:
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def mlp(outputs: int = 3, inputs: int = 3, width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, outputs))


def classifier(loss: Callable[..., Tensor] = F.cross_entropy, n: int = 7) -> Case:
    torch.manual_seed(0)
    samples = pairs(draws(n, 3), integers(0, 3, n))
    return Case(Model(mlp(), loss), samples, lambda z, batch: loss(z, batch["y"]))


def class_weights() -> Case:
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    case = classifier(lambda z, y: F.cross_entropy(z, y, weight=weight))
    return case


def label_smoothing() -> Case:
    return classifier(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))


def log_probabilities() -> Case:
    torch.manual_seed(0)
    network = nn.Sequential(mlp(), nn.LogSoftmax(dim=1))
    samples = pairs(draws(7, 3), integers(0, 3, 7))
    return Case(Model(network, F.nll_loss), samples, lambda z, batch: F.nll_loss(z, batch["y"]))


def regression(loss: Callable[..., Tensor] = F.mse_loss) -> Case:
    torch.manual_seed(0)
    samples = pairs(draws(7, 3), draws(7, 2, seed=1))
    return Case(Model(mlp(2), loss), samples, lambda z, batch: loss(z, batch["y"]))


def multi_label() -> Case:
    torch.manual_seed(0)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(z, y, pos_weight=weight)

    samples = pairs(draws(7, 3), integers(0, 2, 7, 3).double())
    return Case(Model(mlp(), loss), samples, lambda z, batch: loss(z, batch["y"]))


def probabilities() -> Case:
    torch.manual_seed(0)
    samples = pairs(draws(7, 3), integers(0, 2, 7, 2).double())
    network = nn.Sequential(mlp(2), nn.Sigmoid())
    return Case(Model(network, F.binary_cross_entropy), samples, lambda z, batch: F.binary_cross_entropy(z, batch["y"]))


def images() -> Case:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Softplus(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    samples = pairs(draws(5, 1, 6, 6), integers(0, 3, 5))
    return Case(Model(network, F.cross_entropy), samples, lambda z, batch: F.cross_entropy(z, batch["y"]))


def padded(samples: list[Any]) -> dict[str, Tensor]:
    """Tokens with 0 behind, and targets with -1 behind where they are sequences."""
    x = nn.utils.rnn.pad_sequence([s["x"] for s in samples], batch_first=True)
    if samples[0]["y"].ndim:
        return {"x": x, "y": nn.utils.rnn.pad_sequence([s["y"] for s in samples], True, -1)}
    return {"x": x, "y": torch.stack([s["y"] for s in samples])}


def texts(words: int, count: int = 5, targets: bool = False) -> list[Any]:
    sizes = integers(2, 5, count).tolist()
    found = [integers(1, words, size, seed=k) for k, size in enumerate(sizes)]
    labels = integers(0, 3, count)
    return [
        {"x": x, "y": integers(0, words, len(x), seed=50 + k) if targets else labels[k]} for k, x in enumerate(found)
    ]


class Encoder(nn.Module):
    """The stock transformer layer, under a padding mask."""

    def __init__(self, words: int = 6, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 2, 5, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        present = (x != 0).unsqueeze(-1)
        h = self.encoder(self.embedding(x), src_key_padding_mask=x == 0)
        return self.head((h * present).sum(1) / present.sum(1))


def transformer() -> Case:
    torch.manual_seed(0)
    return Case(
        Model(Encoder(), F.cross_entropy),
        texts(6),
        lambda z, batch: F.cross_entropy(z, batch["y"]),
        collate=padded,
    )


class Bags(nn.Module):
    """EmbeddingBag, by padded rows or by offsets, with weights for the words or without."""

    def __init__(self, form: str, mode: str, words: int = 6, **options: Any) -> None:
        super().__init__()
        self.form = form
        self.bag = nn.EmbeddingBag(words, 3, mode=mode, padding_idx=0, **options)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "rows":
            return self.head(torch.tanh(self.bag(x)))
        lengths = (x != 0).sum(1)
        words = x[x != 0]
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        starts = starts if self.bag.include_last_offset else starts[:-1]
        weights = torch.sin(words.double()) if self.form == "weights" else None
        return self.head(torch.tanh(self.bag(words, starts, weights)))


def bags(form: str, mode: str, **options: Any) -> Case:
    torch.manual_seed(0)

    def output(parameters: Parameters, batch: Any) -> Tensor:
        words = batch["x"][0][batch["x"][0] != 0]
        rows = parameters["network.bag.weight"][words]
        if form == "weights":
            rows = rows * torch.sin(words.double()).unsqueeze(1)
        bag = rows.sum(0) if mode == "sum" else rows.mean(0)
        return (parameters["network.head.weight"] @ torch.tanh(bag) + parameters["network.head.bias"]).unsqueeze(0)

    module = Model(Bags(form, mode, **options), F.cross_entropy)
    return Case(module, texts(6), lambda z, batch: F.cross_entropy(z, batch["y"]), output, padded)


class Tied(nn.Module):
    """A language model of one recurrent step, whose output head is its embedding."""

    def __init__(self, words: int = 5, width: int = 3, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, sparse=sparse)
        self.mixed = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        if not sparse:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        return self.head(torch.tanh(self.mixed(h.cumsum(1))))


def language_model(sparse: bool = False) -> Case:
    torch.manual_seed(0)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), ignore_index=-1)

    module, twin = Model(Tied(sparse=sparse), loss), Tied(sparse=sparse)
    twin.embedding.sparse = False

    def output(parameters: Parameters, batch: Any) -> Tensor:
        return functional_call(
            twin, {name.removeprefix("network."): p for name, p in parameters.items()}, (batch["x"],)
        )

    return Case(module, texts(5, targets=True), lambda z, batch: loss(z, batch["y"]), output, padded)


def recurrent() -> Case:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    torch.manual_seed(0)
    samples = pairs(draws(5, 3, 2), integers(0, 3, 5))
    return Case(Model(Last(), F.cross_entropy), samples, lambda z, batch: F.cross_entropy(z, batch["y"]))


CASES: dict[str, Callable[[], Case]] = {
    "mlp": classifier,
    "class_weights": class_weights,
    "label_smoothing": label_smoothing,
    "regression": regression,
    "huber": lambda: regression(F.huber_loss),
    "summed": lambda: regression(lambda z, y: F.mse_loss(z, y, reduction="none").sum(1).mean()),
    "multi_label": multi_label,
    "cnn": images,
    "transformer": transformer,
    "bag_rows_mean": lambda: bags("rows", "mean"),
    "bag_rows_sum": lambda: bags("rows", "sum", sparse=True),
    "bag_offsets_mean": lambda: bags("offsets", "mean", include_last_offset=True),
    "bag_offsets_sum": lambda: bags("offsets", "sum"),
    "bag_weights_sum": lambda: bags("weights", "sum"),
    "tied_lm": language_model,
    "sparse_lm": lambda: language_model(sparse=True),
    "lstm": recurrent,
}
