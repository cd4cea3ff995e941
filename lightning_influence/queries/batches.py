"""Which queries a batch holds: how many, where they stand in their dataset, and where their tensors lie meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence.errors import QueryError


class Carried(Sequence[Any]):
    """Batches that lie in the main memory; each is put on the module's device when it is asked for."""

    def __init__(self, batches: Sequence[Any], module: LightningModule) -> None:
        self._batches, self._module = batches, module

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return move_data_to_device(self._batches[index], self._module.device)


def laid_aside(batch: Any) -> Any:
    """A batch in the main memory, of tensors that autograd accepts (somebody may have wrapped it in inference mode)."""
    with torch.inference_mode(False):
        return apply_to_collection(move_data_to_device(batch, "cpu"), Tensor, _followed)


def _followed(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def num_queries(batch: Any) -> int:
    """Number of queries in a batch that comes without a loader: what its tensors and lists of values agree on."""
    sizes = set(_leading_sizes(batch))
    if sizes == {0}:
        raise QueryError(
            "the batch holds no query",
            expected="at least one",
            found="tensors of length 0",
            hint="leave empty batches out",
        )
    if len(sizes) != 1:
        raise QueryError(
            "the number of queries in this batch cannot be told",
            expected="tensors and lists of one length, the number of queries first",
            found=f"lengths {sorted(sizes)}" if sizes else "no tensors",
            hint="ask through Trainer.predict, whose loader knows how many samples make a batch",
        )
    return sizes.pop()


def _leading_sizes(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _leading_sizes(part)
    elif isinstance(batch, (list, tuple)):
        if all(isinstance(part, (str, bytes, int, float)) for part in batch):
            yield len(batch)
        for part in batch:
            yield from _leading_sizes(part)
    elif is_dataclass(batch):
        for field in fields(batch):
            yield from _leading_sizes(getattr(batch, field.name))


def query_ids(trainer: Trainer, batch: Any, batch_idx: int, dataloader_idx: int, seen: int) -> Tensor:
    """Positions of the queries of a batch in the predict datasets, laid end to end.

    Lightning's batch sampler notes them. Where there is none (a stream, batches made by the dataset), queries are
    numbered as they come, the ranks taking turns.
    """
    combined = trainer.predict_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    noted = getattr(getattr(loaders[dataloader_idx], "batch_sampler", None), "seen_batch_indices", [])
    positions = noted[batch_idx] if batch_idx < len(noted) else []
    lengths = [_length(loader) for loader in loaders[:dataloader_idx]]
    if positions and all(type(p) is int for p in positions) and None not in lengths:
        return torch.tensor(positions) + sum(length or 0 for length in lengths)
    return torch.arange(seen, seen + num_queries(batch)) * trainer.world_size + trainer.global_rank


def _length(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def refuse_idle_ranks(trainer: Trainer, what: str = "queries") -> None:
    """QueryError if a loader has fewer queries than there are processes to share them.

    Args:
        what: of which the loader has some: queries, or training samples.
    """
    world = trainer.world_size
    if world == 1 or not trainer._accelerator_connector.use_distributed_sampler:
        return
    source = trainer.predict_loop._data_source
    for loader in CombinedLoader(source.dataloader(), "sequential").flattened if source.is_defined() else []:
        count = _length(loader) if isinstance(loader, DataLoader) else None
        if count is not None and count < world:
            raise QueryError(
                f"there are fewer {what} than processes",
                expected=f"at least {world} {what}",
                found=f"{count} {what}",
                hint=f"use Trainer(devices={max(1, count)}) or fewer",
            )
