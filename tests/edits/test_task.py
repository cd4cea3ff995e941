"""Who leaves, and what their labels become: relabelled datasets, and ids and labels that are none."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_influence.edits.task import Relabelled, relabelling, removal, samples, with_label
from lightning_influence.errors import QueryError

N = 12
X = torch.arange(N * 2, dtype=torch.float32).view(N, 2)
Y = torch.arange(N) % 3


class Plain(Dataset[Any]):
    """The same samples one by one."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, i: int) -> Any:
        return tuple(tensor[i] for tensor in self.tensors)


class Pair(NamedTuple):
    x: Any
    y: Any


class Labelled(NamedTuple):
    label: Any
    x: Any


def loader(dataset: Any = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y) if dataset is None else dataset, batch_size=5, **options)


def batch(part: Any) -> list[Tensor]:
    (found,) = part.data.batches([part.positions])
    return list(found)


@pytest.mark.parametrize(
    "last", [Y, Y.double() / 3, torch.stack([Y, -Y], 1), Y > 0], ids=["class", "real", "two", "bool"]
)
def test_both_ways_of_relabelling_are_the_same(last):
    labels = {3: last[0], np.int64(5): last[1], 11: last[0]}
    quick = relabelling(loader(TensorDataset(X, last)), labels, None)
    slow = relabelling(loader(Plain(X, last)), labels, None)
    own = relabelling(loader(TensorDataset(X, last)), labels, lambda sample, label: (sample[0], label))
    assert type(quick.retained.data.dataset) is TensorDataset
    assert type(slow.retained.data.dataset) is type(own.retained.data.dataset) is Relabelled
    expected = last.clone()
    for i, label in labels.items():
        expected[i] = label
    for task in (quick, slow, own):
        assert torch.equal(batch(task.retained)[1], expected) and torch.equal(batch(task.retained)[0], X)
        assert torch.equal(batch(task.whole)[1], last)  # as they were
        (plus, old), (minus, new) = task.leaving
        assert (plus, minus, old.positions, new.positions) == (1.0, -1.0, (3, 5, 11), (3, 5, 11))
        assert torch.equal(batch(old)[1], last[[3, 5, 11]]) and torch.equal(batch(new)[1], expected[[3, 5, 11]])
    assert quick.record() == slow.record()


def test_samples_in_other_forms():
    assert with_label({"x": 1, "label": 2}, 0) == {"x": 1, "label": 0}
    assert with_label({"x": 1, "labels": 2}, torch.tensor(0)) == {"x": 1, "labels": 0}
    assert with_label([1, 2, 3], 0) == [1, 2, 0] and with_label((1, 2), 0) == (1, 0)
    assert with_label(Pair(1, 2), 0) == Pair(1, 0) and with_label(Labelled(2, "a"), 0) == Labelled(0, "a")
    assert type(with_label(Pair(1, 2), 0)) is Pair
    for odd in ({"x": 1}, 3, (1,), torch.ones(2)):
        with pytest.raises(QueryError, match="label of a training sample cannot be found"):
            with_label(odd, 0)


@pytest.mark.parametrize("wrong", [1.7, float("nan"), "a", None, [0, 1]])
def test_labels_of_another_kind(wrong):
    with pytest.raises(QueryError, match="none of the kind"):
        relabelling(loader(), {1: wrong}, None)
    with pytest.raises(QueryError, match="none of the kind"):
        with_label((X[0], Y[0]), wrong)


@pytest.mark.parametrize(
    "wrong", [None, "abc", {1, 2}, [2**70], [[1], [1, 2]], ["1"], [1j], torch.tensor(3), torch.ones(2, 1).long()]
)
def test_what_are_no_ids(wrong):
    with pytest.raises(QueryError, match="no sample ids"):
        removal(loader(), wrong)


@pytest.mark.parametrize("wrong", [{}, {N: 1}, {-1: 1}, {True: 1}, {1.0: 2}, {"1": 2}])
def test_labels_of_no_samples(wrong):
    with pytest.raises(QueryError, match=r"no sample ids|nothing to edit|not in the training set"):
        relabelling(loader(), wrong, None)


@pytest.mark.parametrize("ids", [[7, 2], (7, 2), torch.tensor([7, 2]), np.array([2, 7]), range(2, 8, 5)])
def test_ids_in_any_order_and_form(ids):
    task = removal(loader(), ids)
    assert task.leaving[0][1].positions == (2, 7) and len(task.retained) == N - 2
    assert task.record()["leaving_sha256"] == removal(loader(), [2, 7]).record()["leaving_sha256"]


def test_all_parts_of_the_training_set_are_known():
    """A step must not be picked on any of them."""
    forget, keep = loader(TensorDataset(X[:3], Y[:3])), loader(TensorDataset(X[3:], Y[3:]))
    task = samples(forget, keep)
    known = task.fingerprints()
    assert len(known) == 3
    for each in (forget, keep):
        assert removal(each, [0]).fingerprints()[0] in known
    assert len(removal(loader(), [1]).fingerprints()) == 1
    for empty in ((loader(TensorDataset(X[:0], Y[:0])), keep), (forget, loader(TensorDataset(X[:0], Y[:0])))):
        with pytest.raises(QueryError, match="is empty"):
            samples(*empty)
