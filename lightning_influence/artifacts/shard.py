"""One stored piece of per-sample gradients: which samples, their tensors, and what was recorded with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_influence.artifacts.json_values import Json
from lightning_influence.artifacts.records import Artifact
from lightning_influence.artifacts.tensor_files import TensorFile
from lightning_influence.errors import StoreError

SAMPLE_IDS = "sample_ids"
DYNAMICS = ("loss", "margin", "probability")  # the training-dynamics record of a classifier


class Named(Mapping[str, Tensor]):
    """Some entries of another mapping, under the same names, read only when asked for."""

    def __init__(self, source: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._source, self._names = source, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._source[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Shard:
    """Per-sample gradients of N samples and the records that were written with them.

    Names with a ``|`` are gradient tensors (``gradients.pack``); every other name is a record with one row
    per sample: ``sample_ids`` always, and what the callback added (loss, margin, step, ...).

    Args:
        contents: all tensors by name; memory-mapped and lazy when they come from a store.
        span: replay: the dataset positions [start, stop) that the shard covers; in flight: (0, dataset
            length).
        meta: JSON facts that were written with it.
    """

    contents: Mapping[str, Tensor]
    span: tuple[int, int]
    meta: Mapping[str, Json] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """N, from the header alone."""
        contents = self.contents
        return contents.shape(SAMPLE_IDS)[0] if isinstance(contents, TensorFile) else len(contents[SAMPLE_IDS])

    @property
    def sample_ids(self) -> Tensor:
        """Dataset position of every sample, (N,) int64.

        Raises:
            StoreError: an id lies outside the span: the file belongs to another dataset.
        """
        ids = self.contents[SAMPLE_IDS]
        if len(ids) and not self.span[0] <= int(ids.min()) <= int(ids.max()) < self.span[1]:
            raise StoreError(
                "a gradient shard holds sample ids outside its span",
                expected=f"positions in [{self.span[0]}, {self.span[1]})",
                found=f"positions from {int(ids.min())} to {int(ids.max())}",
                hint="the store was written for another dataset or by another program; write it anew",
            )
        return ids

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The gradient tensors, ready for ``gradients.unpack``; each is read when asked for."""
        return Named(self.contents, (name for name in self.contents if "|" in name))

    @property
    def records(self) -> Mapping[str, Tensor]:
        """What was recorded per sample, each (N, ...), without the sample ids."""
        names = (name for name in self.contents if "|" not in name and name != SAMPLE_IDS)
        return Named(self.contents, names)


def open_shard(file: TensorFile, artifact: Artifact, dataset_length: int) -> Shard:
    """The shard in ``file``, its sample ids' shape checked against the span that the manifest promises."""
    span = artifact.span or (0, dataset_length)
    wanted = span[1] - span[0] if artifact.span else None
    present = SAMPLE_IDS in file and len(file.shape(SAMPLE_IDS)) == 1 and file.dtype(SAMPLE_IDS) == torch.int64
    count = file.shape(SAMPLE_IDS)[0] if present else None
    if count is None or (wanted is not None and count != wanted):
        raise StoreError(
            f"{file.path} does not hold the samples that its manifest entry promises",
            expected="one int64 sample id a sample" + ("" if wanted is None else f", {wanted} of them"),
            found="no such tensor" if count is None else f"{count} of them",
            hint="write the store anew: this file was not written by this library",
        )
    return Shard(file, span, artifact.meta)


def check_rows(records: Mapping[str, Tensor], tensors: Mapping[str, Tensor], sample_ids: Tensor) -> None:
    """StoreError unless names follow the convention of `Shard` and records have one row per sample."""
    problem = None
    if sample_ids.ndim != 1 or sample_ids.dtype != torch.int64:
        problem = f"sample ids of shape {tuple(sample_ids.shape)} and dtype {sample_ids.dtype}"
    for name, record in records.items():
        if "|" in name or name == SAMPLE_IDS:
            problem = f"the record name {name!r}"
        elif record.ndim == 0 or len(record) != len(sample_ids):
            problem = f"the record {name!r} of shape {tuple(record.shape)} for {len(sample_ids)} samples"
    for name in tensors:
        if "|" not in name:
            problem = f"the gradient tensor name {name!r}"
    if problem is not None:
        raise StoreError(
            "a gradient shard cannot be written",
            expected="(N,) int64 sample ids, records with N rows and no '|' in their name, tensors with one",
            found=problem,
            hint="pack gradients with gradients.pack, and name records plainly",
        )
