"""What an edit is to bring about: samples that were never trained on, or were trained on with other labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset, default_collate

from lightning_influence.errors import QueryError
from lightning_influence.replay import TrainingData

Replace = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Part:
    """Some samples of a dataset, by their positions."""

    data: TrainingData
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class Task:
    """The retrained model's objective, and what tells it from the trained one's.

        J_new = (1/N) Σ_retained ℓ + decay,        J_old = J_new + (1/N) Σ_leaving ± ℓ

    Attributes:
        kind: `"removal"`, `"relabelling"` or `"samples"`.
        retained: what the edited model should look trained on.
        whole: what it was trained on.
        leaving: parts with the sign with which they count.
        num_samples: N, kept when samples leave (METHODS: 1/N stays).
        labels: of a relabelling, the new label by position.
    """

    kind: str
    retained: Part
    whole: Part
    leaving: tuple[tuple[float, Part], ...]
    num_samples: int
    labels: Mapping[int, Any] | None = None

    def fingerprints(self) -> list[str]:
        """That of the training set, and those of the datasets that it was put together from."""
        waiting = [self.whole.data, self.retained.data, *(part.data for _, part in self.leaving)]
        for data in waiting:  # which grows meanwhile
            if isinstance(data.dataset, ConcatDataset):
                waiting += [replace(data, dataset=each) for each in data.dataset.datasets]
        different = {id(data.dataset): data for data in waiting}
        return list(dict.fromkeys(data.fingerprint() for data in different.values()))

    def record(self) -> dict[str, Any]:
        """Who leaves, as plain JSON."""
        ids = self.leaving[0][1].positions
        record = {
            "kind": self.kind,
            "num_samples": self.num_samples,
            "num_leaving": len(ids),
            "leaving_sha256": hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest(),
            "num_retained": len(self.retained),
        }
        if self.labels is not None:
            told = "\n".join(_written(self.labels[i]) for i in ids)
            record["labels_sha256"] = hashlib.sha256(told.encode()).hexdigest()
        return record


def removal(loader: Any, sample_ids: Tensor | Sequence[int]) -> Task:
    """The task of having trained without some samples.

    Raises:
        QueryError: no sample, all samples, a sample twice, or an id that is none.
    """
    data = TrainingData.of(loader, forked=True)
    ids = _checked_ids(sample_ids, len(data))
    leaving = set(ids)
    retained = tuple(i for i in range(len(data)) if i not in leaving)
    if not retained:
        raise QueryError(
            "all training samples are to be removed",
            expected=f"fewer than {len(data)} sample ids",
            found=f"{len(ids)}",
            hint="a model that was trained on nothing is its initial one",
        )
    whole = Part(data, tuple(range(len(data))))
    return Task("removal", Part(data, retained), whole, ((1.0, Part(data, ids)),), len(data))


def relabelling(loader: Any, labels: Mapping[int, Any], relabel: Replace | None) -> Task:
    """The task of having trained on other labels for some samples.

    Raises:
        QueryError: no sample, an id that is none, or samples whose label cannot be found.
    """
    data = TrainingData.of(loader, forked=True)
    if not isinstance(labels, Mapping):
        raise QueryError(
            "new labels are given by sample",
            expected="a mapping {sample id: label}",
            found=type(labels).__name__,
            hint="write dict(zip(sample_ids.tolist(), labels.tolist()))",
        )
    ids = _checked_ids(list(labels), len(data))
    changed = replace(data, dataset=_relabelled(data, labels, relabel))
    every = tuple(range(len(data)))
    leaving = ((1.0, Part(data, ids)), (-1.0, Part(changed, ids)))
    new = {int(i): label for i, label in labels.items()}
    return Task("relabelling", Part(changed, every), Part(data, every), leaving, len(data), new)


def samples(forget_loader: Any, retained_loader: Any) -> Task:
    """The task of having trained on the samples of the second loader alone, and not on those of the first too.

    Raises:
        QueryError: one of the two is empty.
    """
    forgotten, retained = (TrainingData.of(loader, forked=True) for loader in (forget_loader, retained_loader))
    for name, data in (("forget_loader", forgotten), ("retained_loader", retained)):
        if not len(data):
            raise QueryError(f"{name} is empty", expected="samples", found="none", hint="look at its dataset")
    both = replace(retained, dataset=ConcatDataset([retained.dataset, forgotten.dataset]))
    part = Part(forgotten, tuple(range(len(forgotten))))
    return Task(
        "samples",
        Part(retained, tuple(range(len(retained)))),
        Part(both, tuple(range(len(both)))),
        ((1.0, part),),
        len(both),
    )


@dataclass(frozen=True)
class Relabelled(Dataset[Any]):
    """A dataset some of whose samples have another label.

    Attributes:
        dataset: the samples as they were.
        labels: new label by position.
        relabel: makes of a sample and its new label the new sample.
    """

    dataset: Any
    labels: Mapping[int, Any]
    relabel: Replace

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        sample = self.dataset[position]
        return self.relabel(sample, self.labels[position]) if position in self.labels else sample


def with_label(sample: Any, label: Any) -> Any:
    """A sample (..., label), or one with a "label" or "labels" in a dictionary or a named tuple, with another label of
    the same type.

    Raises:
        QueryError: a sample of another form.
    """
    if isinstance(sample, (tuple, list)) and len(sample) >= 2:
        if fields := getattr(sample, "_fields", None):
            field = next((name for name in ("label", "labels") if name in fields), fields[-1])
            return sample._replace(**{field: _alike(getattr(sample, field), label)})  # type: ignore[union-attr]
        return type(sample)([*sample[:-1], _alike(sample[-1], label)])
    if isinstance(sample, Mapping):
        for key in ("label", "labels"):
            if key in sample:
                return {**sample, key: _alike(sample[key], label)}
    raise QueryError(
        "the label of a training sample cannot be found",
        expected='(input, label), or a dictionary with "label" or "labels"',
        found=type(sample).__name__,
        hint="pass relabel=, a function (sample, new label) -> sample",
    )


def label_like(old: Tensor, new: Any) -> Tensor:
    """A new label in the type and shape of the old one.

    Raises:
        QueryError: one that does not fit into them.
    """
    try:
        given = torch.as_tensor(new)
        fitting = given.to(old.dtype)
        fits = old.is_floating_point() or bool((fitting == given).all())
        if fits:
            return fitting.expand_as(old).clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise QueryError(
        "a new label is none of the kind that the sample had",
        expected=f"what fits into shape {tuple(old.shape)} of {old.dtype}",
        found=repr(new),
        hint="give labels of the type and shape that the dataset has, or pass relabel=",
    )


def _written(label: Any) -> str:
    """A label in words that do not depend on whether it is a number or a tensor of one."""
    try:
        return repr(torch.as_tensor(label).tolist())
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return repr(label)


def _alike(old: Any, new: Any) -> Any:
    if isinstance(old, Tensor):
        return label_like(old, new)
    return new.item() if isinstance(new, Tensor) and new.numel() == 1 else new


def _relabelled(data: TrainingData, labels: Mapping[int, Any], relabel: Replace | None) -> Dataset[Any]:
    dataset = data.dataset
    if relabel is None and type(dataset) is TensorDataset and data.collate is default_collate:
        last = dataset.tensors[-1].clone()  # stays what can be indexed in one step
        for position, label in labels.items():
            last[int(position)] = label_like(last[int(position)], label)
        return TensorDataset(*dataset.tensors[:-1], last)
    return Relabelled(dataset, {int(i): label for i, label in labels.items()}, relabel or with_label)


def _checked_ids(sample_ids: Tensor | Sequence[int], length: int) -> tuple[int, ...]:
    """Ascending.

    Raises:
        QueryError: none, or not different positions in the training set.
    """
    try:
        found = torch.as_tensor(sample_ids)
        whole = not (found.dtype == torch.bool or found.is_floating_point() or found.is_complex())
        told = f"{tuple(found.shape)} of {found.dtype}"
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        found, whole, told = torch.zeros(()), False, f"{type(sample_ids).__name__}: {error}"
    if found.dim() != 1 or not (whole or not found.numel()):
        raise QueryError(
            "these are no sample ids",
            expected="one dimension of whole numbers",
            found=told,
            hint="sample ids are positions in the training set; of a mask take mask.nonzero().flatten()",
        )
    ids = sorted(int(i) for i in found.tolist())
    wrong = [i for i in ids if not 0 <= i < length]
    if not ids or wrong or len(set(ids)) != len(ids):
        raise QueryError(
            "these samples are not in the training set" if wrong else "there is nothing to edit by these sample ids",
            expected=f"one or more different ids from 0 to {length - 1}",
            found=f"{wrong[:5]}" if wrong else "an id twice" if ids else "none",
            hint="sample ids are positions in the training set",
        )
    return tuple(ids)
