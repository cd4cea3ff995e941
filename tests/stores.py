"""A small text classifier, and stores written for it by hand: weights, rates and records as the tests choose them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Manifest, ParameterGroup
from lightning_influence.gradients import GradientCapture, Gradients, Projection, cat, pack, select
from lightning_influence.objective import training_objective
from lightning_influence.replay import isolated, sample_gradients
from lightning_influence.samples import fingerprint

VOCABULARY = 24
EMBEDDING = "embedding.weight"


class Texts(Dataset[tuple[Tensor, int]]):
    """Random token sequences of different lengths, words 1 to 23, three classes."""

    def __init__(self, length: int = 14, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(3, 9, (length,), generator=generator).tolist()
        self.texts = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in sizes]
        self.labels = torch.randint(0, 3, (length,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.texts[index], self.labels[index]


def collate(samples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Padded to the longest of the batch."""
    tokens = nn.utils.rnn.pad_sequence([text for text, _ in samples], batch_first=True)
    return {"tokens": tokens, "label": torch.tensor([label for _, label in samples])}


def batch_of(dataset: Dataset[Any], positions: Sequence[int] | None = None) -> dict[str, Tensor]:
    return collate([dataset[i] for i in (range(len(dataset)) if positions is None else positions)])


def singles(dataset: Dataset[Any]) -> list[dict[str, Tensor]]:
    """Every sample as a batch of one."""
    return [batch_of(dataset, [i]) for i in range(len(dataset))]


def tokens_of(batch: Mapping[str, Tensor]) -> list[int]:
    """The words of a batch of one."""
    return batch["tokens"][0].tolist()


class Classifier(LightningModule):
    """Mean of word embeddings, a hidden layer with dropout, three classes."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def features(self, tokens: Tensor) -> Tensor:
        present = (tokens != 0).unsqueeze(-1)
        return torch.tanh(self.hidden((self.embedding(tokens) * present).sum(1) / present.sum(1)))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.head(self.dropout(self.features(batch["tokens"])))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["label"])
        self.log("loss", loss)
        return loss


def loss_of_one(module: Any, batch: Any) -> Tensor:
    """Loss of a batch of one, in eval mode, for the references."""
    module.eval()
    return F.cross_entropy(module(batch), batch["label"])


def classifier(seed: int = 0, kind: Callable[[], LightningModule] = Classifier) -> Any:
    """A float64 model."""
    seed_everything(seed, verbose=False)
    return kind().double()


def trajectory(module: nn.Module, steps: int, scale: float = 0.3) -> list[dict[str, Tensor]]:
    """Weights of several moments: a random walk."""
    generator = torch.Generator().manual_seed(7)
    states, state = [], {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(steps):
        state = {
            name: value + scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.is_floating_point()
            else value
            for name, value in state.items()
        }
        states.append(state)
    return states


def group(parameters: Sequence[str], rate: float, index: int = 0, optimizer: str = "SGD") -> ParameterGroup:
    return ParameterGroup(optimizer, index, tuple(parameters), rate / 2, rate)


def manifest_of(
    module: LightningModule,
    dataset: Any,
    parameters: str | Sequence[str],
    mode: str,
    shard_size: int,
    dtype: str,
    projection: Projection | None = None,
) -> Manifest:
    selection = select(module, parameters)
    return Manifest(
        dataset_length=len(dataset),
        dataset_fingerprint=fingerprint(dataset),
        parameters=Manifest.describe(module.named_parameters()),
        selected=selection.names,
        mode=mode,
        shard_size=shard_size,
        dtype=dtype,
        module_class="tests.stores.Classifier",
        hyper_parameters=dict(module.hparams),
        settings={
            "reduction": "mean",
            "look_ups": sorted(selection.input_only),
            **({} if projection is None else {"projection": projection.record()}),
        },
    )


def gradients_at(
    module: LightningModule, state: Mapping[str, Tensor], batch: Any, size: int, parameters: str | Sequence[str]
) -> Gradients:
    """Per-sample gradients of the training loss at other weights, of a copy of the module."""
    copied = copy.deepcopy(module)
    copied.load_state_dict(state)
    with isolated(copied) as manual:
        capture = GradientCapture(select(copied, parameters))
        return sample_gradients(
            copied, capture, size, lambda: training_objective(copied, batch, size, manual_losses=manual)
        )[0]


def replay_store(
    root: Path,
    module: LightningModule,
    dataset: Any,
    states: Sequence[Mapping[str, Tensor]],
    groups: Callable[[int], Sequence[ParameterGroup]],
    *,
    parameters: str | Sequence[str] = "all",
    shard_size: int = 5,
    dtype: torch.dtype = torch.float64,
    denominators: Sequence[Mapping[str, Tensor]] | None = None,
    batch: Callable[[Any, Sequence[int]], Any] = batch_of,
    projection: Projection | None = None,
) -> ArtifactStore:
    """A store with a checkpoint for each of the states; `groups(c)` are the parameter groups of checkpoint c."""
    name = str(dtype).removeprefix("torch.")
    manifest = manifest_of(module, dataset, parameters, "replay", shard_size, name, projection)
    store = ArtifactStore.create(root, manifest)
    for c, state in enumerate(states):
        step = 10 * (c + 1)
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        files = store.write_weights(step, step, state, frozen)
        if denominators is not None:
            files.append(store.write_preconditioner(step, step, denominators[c]))
        for start in range(0, len(dataset), shard_size):
            span = range(start, min(start + shard_size, len(dataset)))
            found = gradients_at(module, state, batch(dataset, span), len(span), parameters)
            found = found if projection is None else projection.apply(found)
            small = {name: block.to(dtype=dtype) for name, block in found.items()}
            files.append(store.write_gradients(step, step, (span.start, span.stop), pack(small)))
        store.commit_checkpoint(Checkpoint(step, c, step, tuple(groups(c))), files)
    return ArtifactStore.open(root)


Record = tuple[int, int, dict[str, Tensor], list[float], float]  # step, sample id, weights, rates by group, batch size


def in_flight_store(
    root: Path,
    module: LightningModule,
    dataset: Any,
    checkpoints: Sequence[tuple[int, Mapping[str, Tensor], Sequence[ParameterGroup]]],
    records: Sequence[Record],
    *,
    parameters: str | Sequence[str] = "all",
    denominators: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> ArtifactStore:
    """A store of records made in flight: a chunk for each step, in the order of the steps."""
    store = ArtifactStore.create(root, manifest_of(module, dataset, parameters, "in_flight", 5, "float64"))
    for step in sorted({record[0] for record in records}):
        here = [record for record in records if record[0] == step]
        parts = [gradients_at(module, state, batch_of(dataset, [z]), 1, parameters) for _, z, state, _, _ in here]
        kept = {
            "step": torch.tensor([step] * len(here)),
            "rates": torch.tensor([rates for *_, rates, _ in here], dtype=torch.float64),
            "batch_size": torch.tensor([size for *_, size in here], dtype=torch.float64),
        }
        ids = torch.tensor([z for _, z, *_ in here])
        store.commit(store.write_in_flight((step, step), step, 1, ids, pack(cat(parts)), kept))
    for step, state, groups in checkpoints:
        files = store.write_weights(step, step, state)
        if denominators is not None and step in denominators:
            files.append(store.write_preconditioner(step, step, denominators[step]))
        store.commit_checkpoint(Checkpoint(step, 0, step, tuple(groups)), files)
    return ArtifactStore.open(root)


def all_names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def loader_of(dataset: Any, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


def quiet(**options: Any) -> Trainer:
    """A Trainer that says and writes nothing."""
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
