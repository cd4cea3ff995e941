"""The dataset positions of every training batch of a Lightning Trainer, known when the batch starts."""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import lightning
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor

from lightning_influence.errors import SampleIdError, UnsupportedError
from lightning_influence.samples.tagging import (
    SAMPLE_ID_HINT,
    Gate,
    Positions,
    obstacle,
    subclass,
    track,
    untrack,
)

SampleId: TypeAlias = str | Callable[[Any], Sequence[int] | Tensor]
SampleIds: TypeAlias = Tensor | list[Tensor | None]


class SampleTracker:
    """Tells which positions of the training set the samples of each training batch have.

    A position is an index into the `dataset` of the DataLoader that yielded the batch: with a `Subset` it
    counts within the subset. `attach` belongs in a callback's `setup(stage="fit")`, `pop` in
    `on_train_batch_start`, `detach` in `teardown` and `on_exception`. Batches, their order, random numbers
    and the user's loaders are the same as without a tracker, and several trackers can watch one Trainer.

    Args:
        sample_id: where the positions are in a batch, for loaders that cannot tell (streams, iterables that
            are no DataLoader, collate functions that drop or add samples): the key of a dictionary batch, or
            a function of the batch. It sees the batch as the loader yields it, before transfer hooks and
            devices; with several loaders, the part of each. None: positions are followed through the loader.
    """

    def __init__(self, sample_id: SampleId | None = None) -> None:
        if sample_id is not None and not isinstance(sample_id, str) and not callable(sample_id):
            raise SampleIdError(
                "sample_id is neither a key nor a function.",
                expected="a str, a callable or None",
                found=f"{type(sample_id).__name__} {sample_id!r:.60}",
                hint=SAMPLE_ID_HINT,
            )
        self.sample_id = sample_id
        self._trainer: Trainer | None = None
        self._records: deque[list[Tensor | SampleIdError | None]] = deque()  # by step, by loader

    def attach(self, trainer: Trainer) -> None:
        """Follows every batch of the fit that is being set up.

        Raises:
            UnsupportedError: this Lightning release hands out its training loaders in another way.
        """
        if self._trainer is not None:
            self.detach(self._trainer)
        source = _loader_source(trainer)
        watched = vars(source).get("dataloader")
        if not isinstance(watched, _WatchedSource):
            watched = source.dataloader = _WatchedSource(source)
        watched.trackers.append(self)
        self._trainer = trainer

    def detach(self, trainer: Trainer) -> None:
        """Restores the Trainer and the loaders; does nothing if they are not being followed."""
        source = _loader_source(trainer)
        watched = vars(source).get("dataloader")
        if isinstance(watched, _WatchedSource):
            watched.trackers = [tracker for tracker in watched.trackers if tracker is not self]
            if not watched.trackers:
                del source.dataloader
                watched.release()
        self._trainer = None
        self._records.clear()

    def pop(self, batch: Any) -> SampleIds:
        """The positions of the samples of the training batch that starts now.

        Args:
            batch: as `on_train_batch_start` gets it; its size is compared with the number of positions.

        Returns:
            (B,) int64 on the CPU, in the order of the batch. With several training loaders a list with one
            such tensor a loader, in the order of the collection passed to the Trainer, and None for a loader
            that is exhausted. It is the latest batch's, whether or not earlier ones were asked about.

        Raises:
            SampleIdError: the positions cannot be known: streams without `sample_id`, keys that are no
                integers, a batch of another size than the number of positions,
                `training_step(dataloader_iter)`, or a loader class that makes its own batches.
        """
        ahead = self._fetched_ahead()
        while len(self._records) > ahead + 1:  # steps of batches that nobody asked about, or that were None
            self._records.popleft()
        if len(self._records) != ahead + 1:
            raise SampleIdError(
                "No training batch was fetched that this step could be about.",
                expected="one pop() in each on_train_batch_start, after attach() in setup()",
                found=f"{len(self._records)} batch(es) fetched, {ahead} of them for later steps",
                hint="call attach(trainer) in setup(stage='fit') and pop(batch) once in on_train_batch_start",
            )
        known: list[Tensor | None] = []
        for entry in self._records.popleft():
            if isinstance(entry, SampleIdError):
                raise entry
            if entry is not None:
                _check_size(entry, batch)
            known.append(entry)
        return known[0] if len(known) == 1 and known[0] is not None else known

    def pop_one(self, batch: Any) -> Tensor:
        """`pop` where one training loader is followed, (B,).

        Raises:
            SampleIdError: there are several; whatever `pop` raises.
        """
        ids = self.pop(batch)
        if not isinstance(ids, Tensor):
            raise SampleIdError(
                "mode='in_flight' follows one training loader",
                expected="one loader",
                found=f"{len(ids)} loaders",
                hint="use mode='replay' with `dataloader=` for the one whose samples are to be attributed",
            )
        return ids

    def _fetched_ahead(self) -> int:
        if self._trainer is None:
            return 0
        fetcher = _fetcher(self._trainer)
        if hasattr(fetcher, "iterator_wrapper"):
            raise SampleIdError(
                "training_step takes the loader's iterator, so no batch is known when a step starts.",
                expected="training_step(self, batch, batch_idx)",
                found="training_step(self, dataloader_iter)",
                hint="let Lightning fetch the batches: write training_step(self, batch, batch_idx)",
            )
        return len(getattr(fetcher, "batches", ()))

    def _record(self, parts: Sequence[tuple[Any, Any]], positions: Sequence[Positions | None]) -> None:
        if self.sample_id is not None:
            entries = [None if part is None else _ids_in(part, self.sample_id) for _, part in parts]
        else:
            entries = [
                None if part is None and known is None else _ids_from(known, loader)
                for (loader, part), known in zip(parts, positions, strict=True)
            ]
        self._records.append(entries)


class _WatchedSource:
    """Stands in for the `dataloader` method of the object that gives Lightning the training loaders of a fit.

    Lightning may exchange loaders after it has asked for them (distributed samplers, `overfit_batches`), and
    asks again (`reload_dataloaders_every_n_epochs`, the tuners), so the loaders themselves are prepared when
    they are iterated.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self.trackers: list[SampleTracker] = []
        self.gate = Gate()
        self.touched: list[weakref.ref[Any]] = []

    def __call__(self) -> Any:
        loaders = type(self.source).dataloader(self.source)
        combined: Any = loaders  # kept as it is; a plain loader becomes what the fit loop would make of it
        if not isinstance(loaders, CombinedLoader):
            combined = CombinedLoader(loaders, "max_size_cycle")
        if not hasattr(type(combined), "_influence_original"):
            kind: Any = type(combined)
            combined.__class__ = _watched_combined(kind)
        vars(combined)["_influence_source"] = self
        self._remember(combined)
        return combined

    def start(self, combined: CombinedLoader) -> None:
        """Called when the combined loader is about to make new iterators: what was fetched before is void."""
        self.gate.clear()
        for tracker in self.trackers:
            tracker._records.clear()
        if all(tracker.sample_id is not None for tracker in self.trackers):
            return
        for loader in combined.flattened:
            if obstacle(loader) is None:  # else pop() says so; Lightning's clean-up would hide an error here
                track(loader, self.gate)
                self._remember(loader)

    def step(self, combined: CombinedLoader, batch: Any) -> None:
        """Called with every batch of the combined loader."""
        parts = list(_parts(combined.iterables, batch, {id(loader) for loader in combined.flattened}))
        positions = [self.gate.take(loader, part) for loader, part in parts]
        for tracker in self.trackers:
            tracker._record(parts, positions)

    def release(self) -> None:
        """Gives every loader that was touched its class back."""
        for reference in self.touched:
            loader = reference()
            if isinstance(loader, CombinedLoader):
                vars(loader).pop("_influence_source", None)
                loader.__class__ = getattr(type(loader), "_influence_original", type(loader))
            elif loader is not None:
                untrack(loader)
        self.touched.clear()

    def _remember(self, loader: Any) -> None:
        alive = [reference for reference in self.touched if reference() is not None]
        known = any(reference() is loader for reference in alive)
        self.touched = alive if known else [*alive, weakref.ref(loader)]


@cache
def _watched_combined(base: type[Any]) -> type[Any]:
    def __iter__(self: Any) -> Any:
        source: _WatchedSource | None = vars(self).get("_influence_source")
        if source is not None:
            source.start(self)
        return base.__iter__(self)

    def __next__(self: Any) -> Any:
        source: _WatchedSource | None = vars(self).get("_influence_source")
        if source is None:
            return base.__next__(self)
        with source.gate:
            fetched = base.__next__(self)
        source.step(self, _batch_of(fetched))
        return fetched

    return subclass(base, __iter__=__iter__, __next__=__next__)


def _loader_source(trainer: Trainer) -> Any:
    """The seam to Lightning's fit loop: the object whose `dataloader()` it asks for the training loaders."""
    source = getattr(trainer.fit_loop, "_data_source", None)
    if not callable(getattr(source, "dataloader", None)) or not hasattr(source, "__dict__"):
        raise UnsupportedError(
            "This release of Lightning hands its training loaders to the fit loop in another way.",
            expected="trainer.fit_loop._data_source with a method dataloader()",
            found=f"lightning {lightning.__version__} without it",
            hint="install a Lightning release that this library was tested with",
        )
    return source


def _fetcher(trainer: Trainer) -> Any:
    """The seam to Lightning's prefetching: what fetches batches, keeping those fetched ahead in `batches`."""
    return getattr(trainer.fit_loop, "_data_fetcher", None)


def _batch_of(fetched: Any) -> Any:
    """The seam to CombinedLoader: its items are (batch, batch index, loader index)."""
    batch, _, _ = fetched
    return batch


def _parts(structure: Any, batch: Any, loaders: set[int]) -> Iterator[tuple[Any, Any]]:
    """(loader, its part of the batch) for a nested collection of loaders."""
    if id(structure) in loaders:
        yield structure, batch
    elif isinstance(structure, Mapping):
        for key, inner in structure.items():
            yield from _parts(inner, batch[key], loaders)
    elif isinstance(structure, Iterable):
        for inner, part in zip(structure, batch, strict=True):
            yield from _parts(inner, part, loaders)


def _ids_from(positions: Positions | None, loader: Any) -> Tensor | SampleIdError:
    if isinstance(positions, tuple):
        return torch.tensor(positions, dtype=torch.int64)  # (B,)
    return obstacle(loader) or SampleIdError(
        f"The dataset positions of a batch of {type(loader).__name__} are not known.",
        expected="batches that the loader's own iterators fetched by integer positions",
        found=positions
        or "a batch from no iterator of this fit (a loader class with its own __iter__, "
        "or persistent workers that were started before the fit)",
        hint=SAMPLE_ID_HINT,
    )


def _ids_in(batch: Any, sample_id: SampleId) -> Tensor | SampleIdError:
    if isinstance(sample_id, str):
        if not isinstance(batch, Mapping) or sample_id not in batch:
            keys = f"the keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            return SampleIdError(
                f"The batch has no {sample_id!r} to take sample ids from.",
                expected=f"a dictionary batch with the key {sample_id!r}",
                found=keys,
                hint="let the dataset return its position under that key, or pass a function of the batch",
            )
        found = batch[sample_id]
    else:
        found = sample_id(batch)
    try:
        ids = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0, dtype=torch.float32)
    whole = not (ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex())
    if not whole or ids.dim() > 1 or bool((ids < 0).any()):
        return SampleIdError(
            "sample_id did not give dataset positions.",
            expected="a sequence or a tensor of B integers from zero on",
            found=f"{type(found).__name__} {found!r:.80}",
            hint="return one integer a sample, its position in the training set",
        )
    return ids.detach().to("cpu", torch.int64).reshape(-1)


def _check_size(ids: Tensor, batch: Any) -> None:
    sizes = set(_possible_sizes(batch, top=True))
    if sizes and len(ids) not in sizes:
        raise SampleIdError(
            "The training batch does not have as many samples as the dataset positions it was made from.",
            expected=f"a batch of {len(ids)}: {ids[:4].tolist()}{' and more' if len(ids) > 4 else ''}",
            found=f"leading sizes {sorted(sizes)} in the batch",
            hint="a collate function or transfer hook that drops or adds samples, or a dataset whose items "
            f"are batches (batch_size=None), hides which sample is which: {SAMPLE_ID_HINT}",
        )


def _possible_sizes(batch: Any, top: bool = False) -> Iterator[int]:
    """What could be the number of samples: leading sizes of tensors and arrays, lengths of lists and tuples.

    The outermost sequence may be (inputs, labels) as well as a list of samples: its length does not count if
    its tensors have different shapes and one leading size.
    """
    shape = getattr(batch, "shape", None)
    if isinstance(shape, tuple):
        yield from shape[:1]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _possible_sizes(value)
    elif isinstance(batch, (list, tuple)):
        shapes = {tuple(item.shape) for item in batch if hasattr(item, "shape")}
        if not top or len(shapes) < 2 or len({shape[:1] for shape in shapes}) > 1:
            yield len(batch)
        for item in batch:
            if not isinstance(item, (str, bytes)):
                yield from _possible_sizes(item)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _possible_sizes(getattr(batch, field.name))
