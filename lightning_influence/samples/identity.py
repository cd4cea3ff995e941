"""By what a dataset is recognised when a store is resumed or asked about it, without reading all of it."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_influence.errors import SampleIdError

_POSITIONS = 8  # how many samples are read
_DRAWS = 3  # how often each is read, to find out what is random in it
_DEPTH = 12  # how deep samples and dataset objects are looked into

Path = tuple[str, ...]
Digests = dict[Path, tuple[str, str]]  # where in a sample → (structure, content)


def fingerprint(dataset: Any) -> str:
    """Sixteen hexadecimal digits over the length of a dataset and the content of eight fixed positions.

    The positions are the first, the last, and six spread evenly between them, so the cost does not grow with
    the dataset; a change elsewhere that keeps the length is not seen. Tensors, arrays, texts, numbers, images
    and containers of them count by value, other objects by their class and attributes. What differs between
    repeated reads of one position (random augmentation) counts by type and shape only, at every position, and
    not at all where the shape differs too. A stream (no length, or no positions) counts by its class alone.

    Reading happens behind isolated global random states (torch, numpy, python); generators that the dataset
    owns are put back. The result is the same in every process and for every Python release.

    Raises:
        SampleIdError: the dataset has a length but cannot be read by integer position.

    Example:
        >>> fingerprint([1, 2, 3]) == fingerprint([1, 2, 3]), fingerprint([1, 2, 3]) == fingerprint([1, 2, 4])
        (True, False)
    """
    whole = hashlib.sha256()
    length = _length(dataset)
    whole.update(f"length {length};".encode())
    if length is None:
        whole.update(type(dataset).__qualname__.encode())
        return whole.hexdigest()[:16]
    spread = (round(i * (length - 1) / (_POSITIONS - 1)) for i in range(_POSITIONS))
    positions = sorted(set(spread)) if length else []
    reads: list[list[Digests]] = []  # by position, by draw
    with _global_generators_restored(), _generators_restored(dataset):
        for position in positions:
            reads.append([])
            for draw in range(_DRAWS):
                _seed(draw)
                reads[-1].append(_digests(_read(dataset, position)))
    random_content: set[Path] = set()
    random_structure: set[Path] = set()
    for draws in reads:
        for path in set().union(*draws):
            found = [draw.get(path) for draw in draws]
            if None in found or len({each[0] for each in found if each}) > 1:
                random_structure.add(path)
            elif len(set(found)) > 1:
                random_content.add(path)
    for position, (first, *_) in zip(positions, reads, strict=True):
        whole.update(f"position {position};".encode())
        for path, (structure, content) in sorted(first.items()):
            if path not in random_structure:
                steady = "" if path in random_content else content
                whole.update("\x1f".join((*path, structure, steady, "\x1e")).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()[:16]


def _length(dataset: Any) -> int | None:
    if isinstance(dataset, IterableDataset):  # may have a length, but never positions
        return None
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _read(dataset: Any, position: int) -> Any:
    try:
        return dataset[position]
    except (KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise SampleIdError(
            f"{type(dataset).__name__} cannot be read by position.",
            expected=f"dataset[{position}] to be one of its {len(dataset)} samples",
            found=f"{type(error).__name__}: {error}",
            hint="give the training dataset a __getitem__ that takes the positions 0 … len(dataset) - 1",
        ) from error


def _seed(draw: int) -> None:
    torch.default_generator.manual_seed(draw)  # torch.manual_seed would seed accelerators as well
    numpy.random.seed(draw)
    random.seed(draw)


@contextmanager
def _global_generators_restored() -> Iterator[None]:
    """Puts the global random states back, also after an error."""
    ours, theirs, python = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    initialized: Callable[[], bool] = torch.cuda.is_initialized  # asking for the states would initialise CUDA
    cuda = torch.cuda.get_rng_state_all() if initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(ours)
        numpy.random.set_state(theirs)
        random.setstate(python)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def _generators_restored(dataset: Any) -> Iterator[None]:
    """Puts the random generators that a dataset and its transforms own back to where they were."""
    owned = [(generator, _state(generator)) for generator in _generators(dataset, set(), 0)]
    try:
        yield
    finally:
        for generator, state in owned:
            _restore(generator, state)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, numpy.random.Generator) else generator.get_state()


def _restore(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = state
    else:  # torch.Generator, numpy.random.RandomState
        generator.set_state(state)


def _generators(value: Any, seen: set[int], depth: int) -> Iterator[Any]:
    if id(value) in seen or depth > _DEPTH or len(seen) > 10_000:
        return
    if isinstance(value, (Tensor, numpy.ndarray, str, bytes, int, float, complex, type, type(None))):
        return
    seen.add(id(value))
    if isinstance(value, (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)):
        yield value
    elif isinstance(value, Mapping):
        for inner in list(value.values())[:100]:
            yield from _generators(inner, seen, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value[:100]:
            yield from _generators(inner, seen, depth + 1)
    else:
        for inner in list(getattr(value, "__dict__", {}).values()):
            yield from _generators(inner, seen, depth + 1)


def _digests(sample: Any) -> Digests:
    return {path: (structure, content) for path, structure, content in _leaves(sample, (), 0)}


def _leaves(value: Any, path: Path, depth: int) -> Iterator[tuple[Path, str, str]]:
    """(where, type and shape, hash of the content) of everything in a sample."""
    kind = type(value).__qualname__
    if value is None or isinstance(value, (bool, int, float, complex)):
        yield path, kind, repr(value)
    elif isinstance(value, (str, bytes, bytearray)):
        yield path, kind, _hash(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value)
    elif isinstance(value, Tensor):
        yield path, f"Tensor {value.dtype} {tuple(value.shape)}", _hash(_tensor_bytes(value))
    elif isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype != object:
        array = numpy.ascontiguousarray(value)
        yield path, f"array {array.dtype.str} {tuple(value.shape)}", _hash(array.tobytes())
    elif isinstance(value, enum.Enum):
        yield path, kind, value.name
    elif isinstance(value, PurePath):
        yield path, kind, value.as_posix()
    elif depth > _DEPTH:
        yield path, kind, ""
    elif isinstance(value, Mapping):
        yield path, f"mapping {len(value)}", ""
        for key, inner in value.items():
            yield from _leaves(inner, (*path, f"{key!s}"), depth + 1)
    elif isinstance(value, Set):
        yield path, f"set {len(value)}", _hash(b";".join(sorted(_joined(inner, depth) for inner in value)))
    elif isinstance(value, (Sequence, numpy.ndarray)):
        yield path, f"{kind} {len(value)}", ""
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, f"{i}"), depth + 1)
    elif callable(getattr(value, "tobytes", None)) and hasattr(value, "size"):  # PIL images
        yield path, f"{kind} {getattr(value, 'mode', '')} {value.size}", _hash(value.tobytes())
    else:
        yield path, kind, ""
        for name, inner in _attributes(value):
            yield from _leaves(inner, (*path, name), depth + 1)


def _joined(value: Any, depth: int) -> bytes:
    return repr(list(_leaves(value, (), depth + 1))).encode()


def _attributes(value: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(getattr(value, "__dict__", {}).items())


def _tensor_bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach()
    if plain.layout != torch.strided:
        plain = plain.to_dense()
    plain = plain.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _hash(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()
