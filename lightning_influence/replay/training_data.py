"""A training set and how its loader makes batches, so that it can be walked by position in dataset order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.errors import UnsupportedError
from lightning_influence.replay.sample_gradients import to_device


@dataclass(frozen=True)
class TrainingData:
    """A dataset and how its loader turns samples into batches, apart from the order.

    Attributes:
        dataset: the loader's dataset; a sample's id is its position here.
        collate: from a list of samples to a batch.
        batch_size: samples a batch.
        num_workers: worker processes that fetch and collate.
        loader: the loader it was read from.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    batch_size: int
    num_workers: int
    loader: DataLoader[Any]

    @property
    def length(self) -> int | None:
        """Number of samples; `None` for a stream."""
        return None if isinstance(self.dataset, IterableDataset) else len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @classmethod
    def of(cls, loader: object, *, forked: bool = False, streams: bool = False) -> TrainingData:
        """Read dataset, collate function and batch size off a `DataLoader`.

        Args:
            forked: fetch in at least one worker process where the system can fork one, so that a dataset which draws
                from a generator of its own, or counts, is left as it was.
            streams: accept an iterable dataset, which can be looked into but not walked by position.

        Raises:
            UnsupportedError: no DataLoader, an iterable dataset, or batching inside the dataset.
        """
        hint = "pass `dataloader=DataLoader(map_style_dataset, batch_size=...)`"
        if not isinstance(loader, DataLoader):
            raise UnsupportedError(
                "this training loader cannot be looked into",
                expected="one DataLoader",
                found=type(loader).__name__,
                hint=hint,
            )
        stream = isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__")
        if stream and not streams:
            raise UnsupportedError(
                "the position of every sample must be known",
                expected="a map-style dataset with a length",
                found=f"{type(loader.dataset).__name__} (an IterableDataset has no positions)",
                hint=f"{hint}, or use mode='in_flight' with `sample_id=`",
            )
        if loader.batch_size is None and (stream or loader.batch_sampler is None):
            raise UnsupportedError(
                "the loader must collate single samples",
                expected="a loader with a batch size",
                found="batch_size=None",
                hint=hint,
            )
        size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
        workers = loader.num_workers
        if forked and workers == 0 and "fork" in multiprocessing.get_all_start_methods():
            workers = 1
        return cls(loader.dataset, loader.collate_fn, int(size), workers, loader)

    def batches(self, positions: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Collated batches of the samples at the given positions, one list of positions each."""
        yield from self._fetch(self.collate, batch_sampler=[list(p) for p in positions])

    def alone(self, positions: Sequence[int], singles: Sequence[int]) -> tuple[int, Any, dict[int, Any]]:
        """The batch of `positions` and its size, and by index those of its samples at `singles`, each collated alone.

        Of a stream the first samples are taken, whatever the positions, and as many as there are.
        """
        order: dict[str, Any] = {"batch_sampler": [list(positions)]}
        if self.length is None:
            order = {"batch_size": len(positions)}
        fetched = self._fetch(_TogetherAndAlone(self.collate, tuple(singles)), **order)
        found: tuple[int, Any, dict[int, Any]] | None = next(fetched, None)
        if found is None:
            raise UnsupportedError(
                "the training set is empty",
                expected="at least one sample",
                found="none",
                hint="look at the dataset of the training loader",
            )
        return found

    def _fetch(self, collate: Callable[[list[Any]], Any], **order: Any) -> Iterator[Any]:
        loader, options = self.loader, dict[str, Any]()
        if self.num_workers:
            options = {"timeout": loader.timeout, "multiprocessing_context": loader.multiprocessing_context}
            if loader.num_workers == 0:  # the user's dataset may not survive any other way into a process
                options["multiprocessing_context"] = "fork"
        yield from DataLoader(
            self.dataset,
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=loader.worker_init_fn,
            generator=torch.Generator().manual_seed(0),
            **options,
            **order,
        )


@dataclass(frozen=True)
class _TogetherAndAlone:
    collate: Callable[[list[Any]], Any]
    singles: tuple[int, ...]

    def __call__(self, samples: list[Any]) -> tuple[int, Any, dict[int, Any]]:
        alone = {i: self.collate([samples[i]]) for i in self.singles if i < len(samples)}
        return len(samples), self.collate(samples), alone


def shard_positions(length: int, shard_size: int, rank: int = 0, world_size: int = 1) -> list[range]:
    """The spans of dataset positions that rank `rank` walks: every `world_size`-th shard, none padded, none twice."""
    starts = range(0, length, shard_size)[rank::world_size]
    return [range(a, min(a + shard_size, length)) for a in starts]


def walk(
    data: TrainingData, spans: Sequence[range], module: LightningModule, trainer: Trainer | None = None
) -> Iterator[tuple[range, Any]]:
    """Batches in dataset order, each inside one span and on the module's device, with the positions of its samples."""
    positions = [
        range(a, min(a + data.batch_size, span.stop))
        for span in spans
        for a in range(span.start, span.stop, data.batch_size)
    ]
    for ids, batch in zip(positions, data.batches(positions), strict=True):
        yield ids, to_device(batch, module, trainer)
