"""fingerprint(): equal for equal data in any process, else different, and reading leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from lightning_influence.errors import SampleIdError
from lightning_influence.samples import fingerprint


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass
class Point:
    x: float
    y: Any


class Pair(NamedTuple):
    first: Any
    second: Any


class Picture:
    """Shows itself as images of the usual library do."""

    def __init__(self, mode: str, pixels: bytes) -> None:
        self.mode, self.size, self.pixels = mode, (len(pixels), 1), pixels

    def tobytes(self) -> bytes:
        return self.pixels


class Odd:
    def __init__(self, value: Any) -> None:
        self.value = value


SAMPLES: list[tuple[Any, Any]] = [
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])),
    (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0], dtype=torch.float64)),
    (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]])),
    (torch.tensor(3, dtype=torch.bfloat16), torch.tensor(4, dtype=torch.bfloat16)),
    (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j])),
    (torch.eye(2).to_sparse(), torch.eye(2).to_sparse() * 2),
    (torch.zeros(0, 2), torch.zeros(0, 3)),
    (numpy.array([1, 2]), numpy.array([1, 3])),
    (numpy.array([1, 2], dtype="int32"), numpy.array([1, 2], dtype="int64")),
    (numpy.array([["a"], [None]], dtype=object), numpy.array([["a"], ["b"]], dtype=object)),
    (numpy.float32(1), numpy.float32(2)),
    ("word", "world"),
    ("\ud800 broken", "broken"),
    (b"ab", bytearray(b"ab")),
    (1, 1.0),
    (1, True),
    (None, 0),
    (float("nan"), float("inf")),
    ([1, 2], (1, 2)),
    ([1, [2]], [[1], 2]),
    ({"a": 1}, {"b": 1}),
    ({"a": {"b": 1}}, {"a": {"b": 2}}),
    ({1, 2}, {1, 3}),
    (Color.RED, Color.BLUE),
    (PurePosixPath("a/b"), PurePosixPath("a/c")),
    (Point(1.0, torch.ones(1)), Point(1.0, torch.zeros(1))),
    (Pair(1, 2), Pair(2, 1)),
    (Picture("L", b"aa"), Picture("L", b"ab")),
    (Picture("L", b"aa"), Picture("P", b"aa")),
    (Odd(1), Odd(2)),
]


@pytest.mark.parametrize("one, other", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_content_and_type_count(one: Any, other: Any) -> None:
    assert fingerprint([one]) == fingerprint([one])
    assert fingerprint([one]) != fingerprint([other])
    assert len(fingerprint([one])) == 16 and int(fingerprint([one]), 16) >= 0


def test_length_and_positions_count() -> None:
    data = torch.arange(100.0)
    assert fingerprint(TensorDataset(data)) != fingerprint(TensorDataset(data[:99]))
    assert fingerprint(TensorDataset(data)) != fingerprint(TensorDataset(data.flip(0)))
    assert fingerprint(Subset(TensorDataset(data), range(50))) != fingerprint(TensorDataset(data))
    assert fingerprint([]) != fingerprint([0]) != fingerprint([0, 0])
    for changed, seen in [(0, True), (99, True), (1, False)]:
        other = data.clone()
        other[changed] = -1
        assert (fingerprint(TensorDataset(other)) != fingerprint(TensorDataset(data))) is seen


@settings(max_examples=40, deadline=None)
@given(st.recursive(st.integers() | st.text() | st.floats(), lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_any_nesting_is_stable(sample: Any) -> None:
    assert fingerprint([sample, sample]) == fingerprint([sample, sample])


def test_order_of_keys_and_sets_does_not_count() -> None:
    assert fingerprint([{"a": 1, "b": 2}]) == fingerprint([{"b": 2, "a": 1}])
    assert fingerprint([{"x", "y", "z"}]) == fingerprint([{"z", "y", "x"}])


def test_same_in_every_process_and_release() -> None:
    sample = {"a": {"x", "y", "z"}, "b": 2.5, "c": torch.eye(2), "d": numpy.arange(3), "e": (None, True, "ü")}
    assert (
        fingerprint([sample] * 9) == "ffbc6415c577ca8e"
    )  # texts hash differently in every process; a store outlives releases


class Augmented(Dataset[Any]):
    """Draws from every global generator and from its own; the label is steady."""

    def __init__(self, label: int = 0, coin: bool = False, size: int = 3) -> None:
        self.label, self.coin, self.size = label, coin, size
        self.torch, self.numpy = torch.Generator().manual_seed(1), {"old": numpy.random.RandomState(1)}
        self.new, self.python = [numpy.random.default_rng(1)], Odd(random.Random(1))

    def __len__(self) -> int:
        return 40

    def __getitem__(self, position: int) -> Any:
        if self.coin:  # a flip: repeated reads are often equal
            return {"x": torch.tensor([torch.rand(()) < 0.5]), "label": self.label}
        drawn = [
            torch.rand(()).item() + random.random() + numpy.random.rand(),
            torch.rand((), generator=self.torch).item() + self.numpy["old"].rand(),
            self.new[0].random() + self.python.value.random(),
        ]
        return {"x": torch.tensor(drawn[: self.size]), "label": self.label}

    def states(self) -> list[Any]:
        return [
            self.torch.get_state().tolist(),
            str(self.numpy["old"].get_state()),
            str(self.new[0].bit_generator.state),
            self.python.value.getstate(),
        ]


def global_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate()]


@pytest.mark.parametrize("coin", [False, True])
def test_random_augmentation_counts_by_its_shape(coin: bool) -> None:
    data = Augmented(coin=coin)
    first = fingerprint(data)
    torch.rand(3), random.random(), data[0]
    assert fingerprint(data) == first == fingerprint(Augmented(coin=coin))
    assert fingerprint(Augmented(label=1, coin=coin)) != first
    if not coin:
        assert fingerprint(Augmented(size=2)) != first


def test_random_shapes_count_for_nothing() -> None:
    class Cropped(Augmented):
        def __getitem__(self, position: int) -> Any:
            words = [self.new[0].integers(9) for _ in range(self.new[0].integers(1, 6))]
            return {"x": torch.zeros(len(words)), "words": words, "label": self.label}

    data = Cropped()
    first = fingerprint(data)
    for _ in range(5):
        data[0]
        assert fingerprint(data) == first
    assert fingerprint(Cropped(label=1)) != first


def test_reading_leaves_no_trace() -> None:
    data = Augmented()
    before = global_states(), data.states()
    fingerprint(data)
    assert (global_states(), data.states()) == before


def test_generators_come_back_after_an_error() -> None:
    class Broken(Augmented):
        def __getitem__(self, position: int) -> Any:
            super().__getitem__(position)
            raise OSError("disk gone")

    data = Broken()
    before = global_states(), data.states()
    with pytest.raises(OSError, match="disk gone"):
        fingerprint(data)
    assert (global_states(), data.states()) == before


def test_streams_count_by_class() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("a stream must not be read")

    class Other(Stream):
        pass

    class Long(Stream):
        def __len__(self) -> int:
            return 5

    assert fingerprint(Stream()) == fingerprint(Stream()) != fingerprint(Other())
    assert fingerprint(Long()) == fingerprint(Long()) != fingerprint(Stream())


def test_a_dataset_without_positions() -> None:
    with pytest.raises(SampleIdError, match=r"cannot be read by position.\n  expected: .*\n  found: KeyError"):
        fingerprint({"a": 1, "b": 2})


def test_self_reference_ends() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    assert fingerprint([loop]) == fingerprint([loop])
