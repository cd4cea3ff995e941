"""Captum's TracInCP as its tutorial has it: checkpoint files, and a function that loads one and says its learning rate.

Captum's own default for a file that holds nothing but a state dict is the learning rate 1; ours says the true one. Its
TracInCP runs sample by sample, the only mode of two in which it does not leave the embedding out. There every sample's
backward pass walks the graph of its whole batch, which speaks for small batches, and every batch loads every checkpoint
again, which speaks for large ones: BATCH is about the fastest. TracInCPFast takes the last layer's weight without its
bias, and is fastest with large batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipes.benchmarks.peers.asked import Peer, Trained, last_layer, word_embedding
from recipes.truths.samples import Samples

BATCH, FAST_BATCH = 8, 500
Layers = Callable[[nn.Module], "list[str] | None"]


def peers() -> list[Peer]:
    """TracInCPFast on the last layer's weight, and TracInCP on the embedding and on all parameters."""
    return [
        Peer("Captum, TracInCPFast, last layer's weight", _fast_scores, _fast_self_influence),
        _tracin("Captum, TracInCP, embedding", lambda model: [word_embedding(model)]),
        _tracin("Captum, TracInCP, all parameters", lambda model: None),
    ]


def _tracin(name: str, layers: Layers) -> Peer:
    def made(trained: Trained, folder: Path) -> Any:
        from captum.influence import TracInCP

        model = trained.copy()
        return TracInCP(
            model,
            _loader(trained.train, BATCH),
            _written(trained, folder),
            checkpoints_load_func=_load,
            layers=layers(model),
            loss_fn=nn.CrossEntropyLoss(reduction="none"),
            sample_wise_grads_per_batch=False,
        )

    def scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
        found: Tensor = made(trained, folder).influence((queries.inputs, queries.labels))
        return found.detach()

    def self_influence(trained: Trained, folder: Path) -> Tensor:
        found: Tensor = made(trained, folder).self_influence(outer_loop_by_checkpoints=True)
        return found.detach()

    return Peer(name, scores, self_influence)


def _fast(trained: Trained, folder: Path) -> Any:
    from captum.influence import TracInCPFast

    model = trained.copy()
    return TracInCPFast(
        model,
        last_layer(model),
        _loader(trained.train, FAST_BATCH),
        _written(trained, folder),
        checkpoints_load_func=_load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
    )


def _fast_scores(trained: Trained, queries: Samples, folder: Path) -> Tensor:
    found: Tensor = _fast(trained, folder).influence((queries.inputs, queries.labels))
    return found.detach()


def _fast_self_influence(trained: Trained, folder: Path) -> Tensor:
    found: Tensor = _fast(trained, folder).self_influence(outer_loop_by_checkpoints=True)
    return found.detach()


def _loader(samples: Samples, batch_size: int) -> DataLoader[Any]:
    def batch(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows)
        return samples.inputs_of(chosen), samples.labels[chosen]

    return DataLoader(range(len(samples)), batch_size, collate_fn=batch)  # type: ignore[arg-type]  # positions, not samples


def _written(trained: Trained, folder: Path) -> Sequence[str]:
    """The checkpoints as files, each with its learning rate."""
    paths = []
    for i, (weights, rate) in enumerate(zip(trained.checkpoints, trained.learning_rates, strict=True)):
        path = str(folder / f"checkpoint-{i}.pt")
        torch.save({"weights": dict(weights), "learning_rate": rate}, path)
        paths.append(path)
    return paths


def _load(model: nn.Module, path: str) -> float:
    saved = torch.load(path)
    model.load_state_dict(saved["weights"])
    return float(saved["learning_rate"])
