"""A training set and how its loader makes batches, so that it can be walked by position in dataset order."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from lightning_influence.errors import InfluenceError, UnsupportedError
from lightning_influence.replay.open_files import open_files_anew, places_kept
from lightning_influence.replay.remembered import dataset_remembered
from lightning_influence.replay.sample_gradients import to_device
from lightning_influence.samples import fingerprint


@dataclass(frozen=True)
class TrainingData:
    """A dataset and how its loader turns samples into batches, apart from the order.

    Attributes:
        dataset: the loader's dataset; a sample's id is its position here.
        collate: from a list of samples to a batch.
        batch_size: samples a batch.
        num_workers: worker processes that fetch and collate.
        loader: the loader it was read from.
        undisturbed: what reading changes in the dataset is put back where no worker process reads.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any]
    batch_size: int
    num_workers: int
    loader: DataLoader[Any]
    undisturbed: bool = False

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
                from a generator of its own, counts, or holds an open file, is left as it was. Elsewhere its attributes
                are put back.
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
        can_fork = "fork" in multiprocessing.get_all_start_methods() and not multiprocessing.current_process().daemon
        if forked and workers == 0 and can_fork and not _leaves_no_trace(loader):
            workers = 1
        return cls(loader.dataset, loader.collate_fn, int(size), workers, loader, undisturbed=forked)

    def fingerprint(self) -> str:
        """The dataset's `samples.fingerprint`, read where training samples are: in a worker process if there is one.

        Raises:
            SampleIdError: the dataset cannot be read by position.
        """
        workers = min(1, self.num_workers)
        with closing(self._read(_Recognised(self.dataset), workers, batch_size=None)) as read:
            found: str | InfluenceError = next(read)
        if isinstance(found, InfluenceError):
            raise found
        return found

    def batches(self, positions: Sequence[Sequence[int]]) -> Generator[Any, None, None]:
        """Collated batches of the samples at the given positions, one list of positions each."""
        if self.num_workers == 0 and type(self.dataset) is TensorDataset and self.collate is default_collate:
            for chosen in positions:  # what collating the samples one by one would give, in one step
                yield [tensor[torch.as_tensor(chosen)] for tensor in self.dataset.tensors]
            return
        yield from self._fetch(self.collate, batch_sampler=[list(p) for p in positions])

    def alone(self, positions: Sequence[int], singles: Sequence[int]) -> tuple[int, Any, dict[int, Any]]:
        """The batch of `positions` and its size, and by index those of its samples at `singles`, each collated alone.

        Of a stream the first samples are taken, whatever the positions, and as many as there are.
        """
        order: dict[str, Any] = {"batch_sampler": [list(positions)]}
        if self.length is None:
            order = {"batch_size": len(positions)}
        with closing(self._fetch(_TogetherAndAlone(self.collate, tuple(singles)), **order)) as fetched:
            found: tuple[int, Any, dict[int, Any]] | None = next(fetched, None)
        if found is None:
            raise UnsupportedError(
                "the training set is empty",
                expected="at least one sample",
                found="none",
                hint="look at the dataset of the training loader",
            )
        return found

    def _fetch(self, collate: Callable[[list[Any]], Any], **order: Any) -> Generator[Any, None, None]:
        timeout = {"timeout": self.loader.timeout} if self.num_workers else {}
        yield from self._read(self.dataset, self.num_workers, collate_fn=collate, **timeout, **order)

    def _read(self, dataset: Any, workers: int, **options: Any) -> Generator[Any, None, None]:
        """What a loader of the dataset yields; when this ends or is closed, its processes are gone."""
        if workers:
            fork = self.loader.num_workers == 0  # the user's dataset may not survive any other way into a process
            options["multiprocessing_context"] = "fork" if fork else self.loader.multiprocessing_context
        reader: DataLoader[Any] = DataLoader(
            dataset,
            num_workers=workers,
            worker_init_fn=_WorkerStart(self.loader.worker_init_fn),
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        in_process = dataset_remembered(self.dataset) if self.undisturbed else nullcontext()
        with places_kept() if workers else in_process:
            iterator = iter(reader)
            try:
                yield from iterator
            finally:
                if workers:  # a failure's traceback would keep them
                    iterator._shutdown_workers()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _WorkerStart:
    """What a worker process does first: it gets files of its own, and then does what the user's loader says."""

    init: Callable[[int], None] | None

    def __call__(self, worker: int) -> None:
        open_files_anew()
        info: Any = get_worker_info()
        if isinstance(info.dataset, _Recognised):  # users look for their own dataset here
            object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.init is not None:
            self.init(worker)


@dataclass(frozen=True)
class _Recognised(Dataset[Any]):
    """One item: the fingerprint of a dataset, or why it has none, which would not survive as an exception."""

    dataset: Any

    def __len__(self) -> int:
        return 1

    def __getitem__(self, position: int) -> str | InfluenceError:
        try:
            return fingerprint(self.dataset)
        except InfluenceError as error:
            return error


def _leaves_no_trace(loader: DataLoader[Any]) -> bool:
    """Whether reading samples here is known to change nothing: tensors that are indexed and stacked, no user code."""
    waiting = [loader.dataset]
    while waiting:
        dataset = waiting.pop()
        if type(dataset) is Subset:
            waiting.append(dataset.dataset)
        elif type(dataset) is ConcatDataset:
            waiting.extend(dataset.datasets)
        elif type(dataset) is not TensorDataset:
            return False
    return loader.collate_fn is default_collate


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
