"""Remembers python objects that can change in place, and puts them back as they were."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Collection, Iterator, MutableMapping, MutableSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_MANY = 1000  # entries; what lies in a longer container is data, not state: it is kept in place but not copied
_DEPTH = 8


class Remembered:
    """A snapshot of object graphs: containers, tensors, arrays, random generators and the attributes of plain objects.

    `restore` puts contents back in place, so that references to the same objects elsewhere see them too, and touches
    nothing that has not changed.

    Args:
        packages: top-level packages whose objects' attributes are followed; objects of others (a logger's run, a
            tokenizer) are left alone.
    """

    def __init__(self, packages: Collection[str] = ()) -> None:
        self._packages = frozenset(packages)
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice

    def restore(self) -> None:
        """Put everything back."""
        for undo in self._undo:
            undo()

    def remember(self, value: Any, depth: int = 0) -> None:
        """Note the present content of a value and of everything in it."""
        if id(value) in self._seen or depth > _DEPTH:
            return
        self._seen[id(value)] = value
        inner: list[Any] = []
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray):
            self._array(value)
        elif isinstance(value, torch.Generator):
            self._state(value.get_state(), value.set_state)
        elif isinstance(value, random.Random):
            self._state(value.getstate(), value.setstate)
        elif isinstance(value, np.random.Generator):
            self._state(value.bit_generator.state, lambda state: setattr(value.bit_generator, "state", state))
        elif isinstance(value, np.random.RandomState):
            self._state(value.get_state(), value.set_state)
        elif isinstance(value, MutableMapping):
            inner = self._mapping(value)
        elif isinstance(value, (list, deque)):
            inner = self._sequence(value)
        elif isinstance(value, MutableSet):
            self._set(value)
        elif isinstance(value, tuple):
            inner = list(value)
        elif self._is_followed(value):
            inner = self._mapping(value.__dict__)
        for each in inner if len(inner) <= _MANY else ():
            self.remember(each, depth + 1)

    def attributes(self, attributes: dict[str, Any], left_alone: frozenset[str]) -> None:
        """Note some entries of an object's `__dict__`; entries that appear later are removed by `restore`."""
        saved = {name: value for name, value in attributes.items() if name not in left_alone}

        def undo() -> None:
            for name in [n for n in attributes if n not in left_alone and n not in saved]:
                del attributes[name]
            attributes.update(saved)

        self._undo.append(undo)
        for value in saved.values():
            self.remember(value)

    def tensor(self, value: Tensor) -> None:
        """Note a tensor's content, whatever it is part of."""
        content = value.detach().clone()

        def undo() -> None:
            if not _same(value, content):
                with torch.inference_mode(value.is_inference()), torch.no_grad():
                    value.copy_(content)

        self._undo.append(undo)

    def flag(self, parameter: nn.Parameter) -> None:
        """Note whether a parameter requires a gradient."""
        flag = parameter.requires_grad

        def undo() -> None:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)

        self._undo.append(undo)

    def _is_followed(self, value: Any) -> bool:
        """An object of the user's own class that holds state in attributes; data sets and modules are none."""
        return (
            type(value).__module__.split(".")[0] in self._packages
            and isinstance(getattr(value, "__dict__", None), dict)
            and not isinstance(value, (type, nn.Module, Dataset, DataLoader))
        )

    def _tensor(self, value: Tensor) -> None:
        if not isinstance(value, nn.Parameter) and not value.requires_grad:
            self.tensor(value)

    def _array(self, value: np.ndarray[Any, Any]) -> None:
        content = value.copy()

        def undo() -> None:
            if value.flags.writeable:
                value[...] = content

        self._undo.append(undo)

    def _state(self, state: Any, put_back: Callable[[Any], Any]) -> None:
        self._undo.append(lambda: put_back(state))

    def _mapping(self, value: MutableMapping[Any, Any]) -> list[Any]:
        items = list(value.items())

        def undo() -> None:
            now = list(value.items())
            if len(now) != len(items) or any(
                a is not c or b is not d for (a, b), (c, d) in zip(now, items, strict=True)
            ):
                value.clear()
                for key, entry in items:
                    value[key] = entry

        self._undo.append(undo)
        return [entry for _, entry in items]

    def _sequence(self, value: list[Any] | deque[Any]) -> list[Any]:
        items = list(value)

        def undo() -> None:
            if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
                value.clear()
                value.extend(items)

        self._undo.append(undo)
        return items

    def _set(self, value: MutableSet[Any]) -> None:
        items = set(value)

        def undo() -> None:
            if set(value) != items:
                value.clear()
                for item in items:
                    value.add(item)

        self._undo.append(undo)


@contextmanager
def dataset_remembered(dataset: Any) -> Iterator[None]:
    """Put back what reading a dataset in this process changes in its attributes, and in those of datasets inside it.

    Tensors and arrays are its data, not copied; iterators and open files cannot be put back.
    """
    memory = Remembered({type(dataset).__module__.split(".")[0]})
    for _ in range(_DEPTH):
        own = getattr(dataset, "__dict__", {})
        data = frozenset(name for name, value in own.items() if isinstance(value, (Tensor, np.ndarray)))
        memory.attributes(own, data)
        dataset = own.get("dataset")  # of a subset
    try:
        yield
    finally:
        memory.restore()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
