"""Dataset positions that travel with the batches of a DataLoader, put on at fetching, taken off on arrival.

A sampler that writes down what it hands out is not enough: workers may return batches out of order, and a
loader that resumes in the middle of an epoch skips some. So the positions ride inside the batch. While a
loader builds an iterator, and only then, it shows a dataset, a collate function and a worker start that carry
positions along; the iterator it gets takes them off again and reports them to the loader's `Gate`. The
loader's own attributes never change, samplers and random numbers are not touched, and an iterator that
outlives the tracking still yields the user's batches.
"""

from __future__ import annotations

import inspect
import operator
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch.utils.data
from torch.utils.data import DataLoader, IterableDataset

from lightning_influence.errors import SampleIdError, UnsupportedError

SAMPLE_ID_HINT = (
    "pass sample_id: the key under which a dictionary batch holds the dataset positions, or a function of "
    "the batch that returns them"
)

_GATE = "_influence_gate"  # in a loader: where its iterators report to
_BUILDER = "_influence_builder"  # in a loader: the process in which it is building an iterator just now
_LOADER = "_influence_loader"  # in an iterator: weakly, its loader (a cycle would delay worker shutdown)

Positions = tuple[int, ...] | str  # dataset positions of a batch, or in words what was there instead


class Delivery(NamedTuple):
    """A batch that left an iterator: the id() of its loader, the batch itself, its positions."""

    loader: int
    batch: Any
    positions: Positions


class Gate:
    """Where tracked iterators report their batches; what comes while it is closed is nobody's and dropped."""

    def __init__(self) -> None:
        self.is_open = False
        self.deliveries: list[Delivery] = []
        self.unclear: set[int] = set()  # loaders of which a batch could not be told, nor can any later one

    def __enter__(self) -> None:
        self.is_open = True

    def __exit__(self, *exc_info: object) -> None:
        self.is_open = False

    def clear(self) -> None:
        """Forgets everything: the loaders are about to start again."""
        self.deliveries.clear()
        self.unclear.clear()

    def take(self, loader: object, batch: Any) -> Positions | None:
        """Takes out the delivery of a batch of `loader`: its positions, or None if they cannot be told.

        A loader class with an `__iter__` of its own may run ahead or drop batches: then the batch itself is
        looked for, and older deliveries of that loader are forgotten. If it also transforms batches, only a
        single open delivery is unambiguous.
        """
        mine = [delivery for delivery in self.deliveries if delivery.loader == id(loader)]
        others = [delivery for delivery in self.deliveries if delivery.loader != id(loader)]
        same = (i for i, delivery in enumerate(mine) if delivery.batch is batch)
        at = next(same, 0 if len(mine) == 1 else -1)
        if at < 0 or id(loader) in self.unclear:
            self.unclear.add(id(loader))
            self.deliveries = others
            return None
        self.deliveries = others + mine[at + 1 :]
        return mine[at].positions


def obstacle(loader: object) -> SampleIdError | None:
    """Why the positions of this loader's samples can never be known, None if they can."""
    if not isinstance(loader, DataLoader):
        return SampleIdError(
            f"A {type(loader).__name__} does not tell which samples it yields.",
            expected="a torch.utils.data.DataLoader",
            found=f"a {type(loader).__module__}.{type(loader).__qualname__}",
            hint=SAMPLE_ID_HINT,
        )
    if isinstance(loader.dataset, (IterableDataset, _map_data_pipe())):
        return SampleIdError(
            f"The samples of {type(loader.dataset).__name__} have no known position in a dataset.",
            expected="a map-style dataset, with __getitem__ and __len__",
            found=f"{type(loader).__name__} over {type(loader.dataset).__name__}, a stream",
            hint=SAMPLE_ID_HINT,
        )
    return None


def track(loader: DataLoader[Any], gate: Gate) -> None:
    """Makes every iterator that `loader` builds from now on report to `gate`; harmless when done already."""
    vars(loader)[_GATE] = gate
    if not hasattr(type(loader), "_influence_original"):
        kind: Any = type(loader)
        loader.__class__ = _tracked_loader(kind)


def untrack(loader: DataLoader[Any]) -> None:
    """Gives the loader its class back; iterators that are still running go on without reporting."""
    vars(loader).pop(_GATE, None)
    loader.__class__ = getattr(type(loader), "_influence_original", type(loader))


def subclass(base: type[Any], **members: Any) -> type[Any]:
    """A subclass with these members in place of those of `base`; copies and pickles are of `base`."""

    inherited: Any = base

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = inherited.__reduce_ex__(self, protocol)
        if not isinstance(reduced, tuple):
            return reduced
        make, arguments, *rest = reduced
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if not name.startswith("_influence_")}
        arguments = tuple(base if argument is derived else argument for argument in arguments)
        if getattr(make, "__name__", "") == "__newobj__":  # pickle holds its class against the object's
            make = _new
        return make, arguments, *rest

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_influence_original": base}
    derived = type(base.__name__, (base,), {"__reduce_ex__": __reduce_ex__, **names, **members})
    return derived


def _new(kind: Any, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


@cache
def _tracked_loader(base: Any) -> type[Any]:
    def _get_iterator(self: Any) -> Any:
        vars(self)[_BUILDER] = os.getpid()
        try:
            iterator = _build_iterator(base, self)
        finally:
            del vars(self)[_BUILDER]
        vars(iterator)[_LOADER] = weakref.ref(self)
        kind: Any = type(iterator)
        if not hasattr(kind, "_influence_original"):
            iterator.__class__ = _stripping_iterator(kind)
        return iterator

    return subclass(
        base,
        _get_iterator=_get_iterator,
        dataset=_Shown("dataset", base, _tagging),
        collate_fn=_Shown("collate_fn", base, _TaggingCollate),
        worker_init_fn=_Shown("worker_init_fn", base, _WorkerStart),
    )


@cache
def _stripping_iterator(base: Any) -> type[Any]:
    def __next__(self: Any) -> Any:
        tagged = base.__next__(self)
        if not isinstance(tagged, Tagged):  # the user's iterator class has a collate function of its own
            return tagged
        loader = vars(self)[_LOADER]()
        gate: Gate | None = None if loader is None else vars(loader).get(_GATE)
        if gate is not None and gate.is_open:
            gate.deliveries.append(Delivery(id(loader), tagged.batch, tagged.positions))
        return tagged.batch

    return subclass(base, __next__=__next__)


def _build_iterator(base: type[Any], loader: DataLoader[Any]) -> Any:
    """The seam to torch: `DataLoader._get_iterator` builds every iterator from the loader's attributes."""
    try:
        build = base._get_iterator
    except AttributeError:
        raise UnsupportedError(
            "This release of torch builds the iterators of a DataLoader in another way.",
            expected="a method DataLoader._get_iterator()",
            found=f"torch {torch.__version__} without it",
            hint="install a torch release that this library was tested with, or pass sample_id",
        ) from None
    iterator = build(loader)
    if not hasattr(iterator, "__dict__"):
        raise SampleIdError(
            f"{base.__name__} makes iterators of its own kind.",
            expected="an iterator of torch.utils.data.DataLoader",
            found=f"a {type(iterator).__name__}",
            hint=SAMPLE_ID_HINT,
        )
    return iterator


def _map_data_pipe() -> tuple[type[Any], ...]:
    """The seam to torch's data pipes: DataLoader shards them by their type, which a wrapper would hide."""
    found = getattr(torch.utils.data, "MapDataPipe", None)
    return () if found is None else (found,)


class _Shown:
    """An attribute of a tracked loader: wrapped while this process builds an iterator, else the user's.

    The process matters: a forked worker whose collate function is a method of the loader must see the user's
    dataset.
    """

    def __init__(self, name: str, base: type[Any], wrap: Callable[[Any], Any]) -> None:
        self.name, self.wrap = name, wrap
        inherited: Any = inspect.getattr_static(base, name, None)
        own_property = inspect.isdatadescriptor(inherited)  # of the user's loader class
        self.inherited: Any = inherited if own_property else None

    def __get__(self, loader: Any, owner: type[Any] | None = None) -> Any:
        if loader is None:
            return self
        if self.inherited is not None:
            value = self.inherited.__get__(loader, owner)
        elif self.name in vars(loader):
            value = vars(loader)[self.name]
        else:
            raise AttributeError(f"{type(loader).__name__!r} object has no attribute {self.name!r}")
        return self.wrap(value) if vars(loader).get(_BUILDER) == os.getpid() else value

    def __set__(self, loader: Any, value: Any) -> None:
        if self.inherited is not None:
            self.inherited.__set__(loader, value)
        else:
            vars(loader)[self.name] = value

    def __delete__(self, loader: Any) -> None:
        if self.inherited is not None:
            self.inherited.__delete__(loader)
        else:
            del vars(loader)[self.name]


@dataclass(frozen=True)
class Tagged:
    """A collated batch and the positions of its samples, on the way to the iterator."""

    batch: Any
    positions: Positions

    def pin_memory(self) -> Tagged:
        """Called by DataLoader(pin_memory=True): pins the batch as torch would pin it without the tag."""
        return Tagged(_pin(self.batch), self.positions)


def _pin(batch: Any) -> Any:
    """The seam to torch's pinning of nested batches."""
    import torch.utils.data._utils.pin_memory as torch_pin

    pin: Callable[[Any], Any] = torch_pin.pin_memory
    return pin(batch)


@dataclass(frozen=True)
class _Fetched:
    samples: Any  # exactly what the user's dataset returned
    positions: Positions


class _TaggingDataset:
    """The user's dataset, whose items come with their positions; every other attribute is the user's."""

    def __init__(self, dataset: Any) -> None:
        self._tagged_dataset = dataset

    def __len__(self) -> int:
        return len(self._tagged_dataset)

    def __getitem__(self, index: Any) -> _Fetched:  # batch_size=None: the sampler's item is the whole request
        return _Fetched(self._tagged_dataset[index], _as_positions(index, self._tagged_dataset))

    def __getitems__(self, indices: Any) -> _Fetched:
        dataset = self._tagged_dataset
        indices = list(indices) if isinstance(indices, Iterator) else indices
        positions = _as_positions(indices, dataset)
        if getattr(dataset, "__getitems__", None):
            return _Fetched(dataset.__getitems__(indices), positions)
        return _Fetched([dataset[index] for index in indices], positions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_tagged_dataset":
            raise AttributeError(name)
        return getattr(self._tagged_dataset, name)


class _StatefulTaggingDataset(_TaggingDataset):
    """The same for a dataset that saves its state: stateful loaders look for these methods on the class."""

    def state_dict(self) -> Any:
        return self._tagged_dataset.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._tagged_dataset.load_state_dict(state)


def _tagging(dataset: Any) -> _TaggingDataset:
    stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
    return _StatefulTaggingDataset(dataset) if stateful else _TaggingDataset(dataset)


class _TaggingCollate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, fetched: _Fetched) -> Tagged:
        return Tagged(self.collate(fetched.samples), fetched.positions)


class _WorkerStart:
    """Runs in a worker before the user's worker_init_fn: get_worker_info() shows the user's dataset there."""

    def __init__(self, start: Callable[[int], None] | None) -> None:
        self.start = start

    def __call__(self, worker: int) -> None:
        info = torch.utils.data.get_worker_info()
        if info is not None and isinstance(info.dataset, _TaggingDataset):
            object.__setattr__(info, "dataset", info.dataset._tagged_dataset)  # its own __setattr__ refuses
        if self.start is not None:
            self.start(worker)


def _as_positions(index: Any, dataset: Any) -> Positions:
    """The positions a sampler's item asks for: an integer, a slice, a sequence or tensor of integers."""
    if isinstance(index, slice):
        return tuple(range(*index.indices(len(dataset))))
    try:
        items: Sequence[Any] = [index] if _is_integer(index) else list(index)
    except TypeError:
        items = [index]
    for item in items:
        if not _is_integer(item):
            return f"a sampler that yields {type(item).__name__}, such as {item!r:.60}"
    positions = tuple(operator.index(item) for item in items)
    return positions if min(positions, default=0) >= 0 else f"a sampler that yields {min(positions)}"


def _is_integer(item: Any) -> bool:
    if isinstance(item, bool) or getattr(item, "dtype", None) in (torch.bool, bool):
        return False
    try:
        operator.index(item)
    except TypeError:
        return False
    return True
