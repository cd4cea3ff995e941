"""Tiny fits: a text classifier whose batches carry their dataset positions, and what a run must leave bit-identical."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_influence import ArtifactStore, GradientSnapshot
from lightning_influence.artifacts import Shard
from lightning_influence.gradients import unpack
from tests.reference import per_sample_gradients

WARNINGS = (
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own, on new torch
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:The number of training batches",
    "ignore:Consider setting `persistent_workers=True`",
    "ignore:Checkpoint directory .* exists and is not empty",
    "ignore:This process .* is multi-threaded, use of fork",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
)
BOTH = ["word_embeddings", "last_layer"]
WORDS, CLASSES = 12, 3
Batch = dict[str, Tensor]


class Texts(Dataset[dict[str, Any]]):
    """Token sequences of different lengths, a label each."""

    def __init__(self, length: int = 13, longest: int = 5) -> None:
        draw = torch.Generator().manual_seed(3)
        sizes = torch.randint(2, longest + 1, (length,), generator=draw).tolist()
        self.tokens = [torch.randint(1, WORDS, (size,), generator=draw) for size in sizes]
        self.labels = torch.randint(0, CLASSES, (length,), generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {"tokens": self.tokens[position], "label": self.labels[position], "position": position}


def padded(samples: Sequence[Mapping[str, Any]]) -> Batch:
    tokens = nn.utils.rnn.pad_sequence([s["tokens"] for s in samples], batch_first=True)
    return {
        "tokens": tokens,
        "label": torch.tensor([s["label"] for s in samples]),
        "position": torch.tensor([s["position"] for s in samples]),
    }


class Classifier(LightningModule):
    """Mean of embeddings, a hidden layer, a head."""

    def __init__(self, optimizer: str = "sgd", loss: str = "mean", rate: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.words = nn.Embedding(WORDS, 4, padding_idx=0)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, CLASSES)
        self.register_buffer("class_weight", torch.tensor([0.5, 2.0, 1.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).unsqueeze(-1)
        mean = (self.words(tokens) * mask).sum(1) / mask.sum(1)
        return self.head(torch.tanh(self.hidden(mean)))

    def loss(self, batch: Batch) -> Tensor:
        logits, label = self(batch["tokens"]), batch["label"]
        match self.hparams["loss"]:
            case "mean":
                return F.cross_entropy(logits, label)
            case "sum":
                return F.cross_entropy(logits, label, reduction="sum")
            case "weights":
                return F.cross_entropy(logits, label, weight=self.class_weight.to(logits.dtype))
            case "bce":
                return F.binary_cross_entropy_with_logits(logits, F.one_hot(label, CLASSES).to(logits.dtype))
            case "mse":
                return F.mse_loss(logits, F.one_hot(label, CLASSES).to(logits.dtype))
            case "own":
                return -logits.log_softmax(1).gather(1, label[:, None]).mean()
        raise ValueError(self.hparams["loss"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        rate = self.hparams["rate"]
        match self.hparams["optimizer"]:
            case "sgd":
                return torch.optim.SGD(self.parameters(), lr=rate)
            case "adam":
                return torch.optim.Adam(self.parameters(), lr=rate / 10)
        raise ValueError(self.hparams["optimizer"])


class LanguageModel(Classifier):
    """A loss that is a mean over tokens, with padding left out: samples weigh by their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.next = nn.Linear(5, WORDS)

    def loss(self, batch: Batch) -> Tensor:
        tokens = batch["tokens"]
        logits = self.next(torch.tanh(self.hidden(self.words(tokens[:, :-1]))))  # (N, T, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)


def trainer(root: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": root,
    }
    return Trainer(**{**settings, **options}, callbacks=list(callbacks))


def loader(dataset: Dataset[Any] | None = None, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    data = Texts() if dataset is None else dataset
    return DataLoader(data, batch_size=batch_size, **{"shuffle": True, "collate_fn": padded, **options})


def fit(
    root: Path,
    module: LightningModule,
    snapshot: GradientSnapshot | None = None,
    *others: Callback,
    data: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> Trainer:
    """Fit from a fixed random state; the module is built by the caller (seed it there)."""
    seed_everything(1, verbose=False)
    run = trainer(root, *((snapshot,) if snapshot is not None else ()), *others, **options)
    run.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return run


def seeded(make: Callable[[], LightningModule]) -> LightningModule:
    seed_everything(5, verbose=False)
    return make()


def state_hash(run: Trainer) -> str:
    """Weights, buffers, optimizers and every random state."""
    module = run.lightning_module
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(str(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for each in value:
                add(each)
        else:
            digest.update(repr(value).encode())

    add(dict(module.state_dict()))
    for optimizer in run.optimizers:
        add(optimizer.state_dict())
    add(torch.get_rng_state())
    add(np.random.get_state()[1].tolist())
    add(random.getstate())
    return digest.hexdigest()


def dense(shard: Shard, name: str) -> Tensor:
    return unpack(shard.tensors)[name].dense()


def stored(store: ArtifactStore, name: str, at: int = -1) -> Tensor:
    """All gradients of a parameter at a checkpoint, (N, *shape)."""
    return torch.cat([dense(shard, name) for shard in store.shards(store.checkpoints()[at])])


def singles(dataset: Dataset[Any], positions: Sequence[int] | None = None) -> list[Batch]:
    chosen = range(len(dataset)) if positions is None else positions  # type: ignore[arg-type]
    return [padded([dataset[position]]) for position in chosen]


def truth(
    module: Classifier,
    weights: Mapping[str, Tensor],
    samples: Sequence[Batch],
    names: Sequence[str],
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of single samples' losses at some weights, in float64."""
    model = copy.deepcopy(module)
    model.load_state_dict(dict(weights), strict=False)
    model.eval()
    alone = loss if loss is not None else (lambda m, batch: m.loss(batch))
    return per_sample_gradients(model, alone, samples, names)


class WeightsBefore(Callback):
    """The weights before every optimizer step."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.at.setdefault(trainer.global_step, state)
