"""The gradients of several parameters together: batches joined, inner products summed, tensors packed for a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from lightning_influence.errors import QueryError, StoreError
from lightning_influence.gradients.blocks import GradientBlock, Gradients, join_dense


def cat(parts: Sequence[Gradients]) -> dict[str, GradientBlock]:
    """The same parameters' blocks of several batches, one after the other along the samples.

    Blocks of one parameter that come in different types (a long batch compacted to Dense, a short one
    Factored) are joined as Dense. Sequences of different lengths are padded with zeros.
    """
    if not parts:
        raise QueryError("there are no gradients to join", expected="at least one batch", found=0, hint="capture first")
    names = list(parts[0])
    for part in parts[1:]:
        if set(part) != set(names):
            raise QueryError(
                "batches of gradients name different parameters",
                expected=sorted(names),
                found=sorted(part),
                hint="capture every batch with the same selection",
            )
    joined: dict[str, GradientBlock] = {}
    for name in names:
        blocks = [part[name] for part in parts]
        if len({block.shape for block in blocks}) > 1:
            blocks[0]._check_alike(next(block for block in blocks if block.shape != blocks[0].shape))
        types = {type(block) for block in blocks}
        if len(blocks) == 1:
            joined[name] = blocks[0]
        elif len(types) == 1:
            joined[name] = types.pop().join(blocks)
        else:
            joined[name] = join_dense(blocks)
    return joined


def inner(train: Gradients, query: Gradients) -> Tensor:
    """⟨query q, sample n⟩ summed over the parameters of the query, (Q, N).

    Errors:
        QueryError: the query names a parameter that the training gradients lack, or names none.
    """
    total: Tensor | None = None
    for name, block in query.items():
        if name not in train:
            raise QueryError(
                f"the training gradients hold nothing for parameter {name!r}",
                expected=sorted(train),
                found=sorted(query),
                hint="select for the query a subset of the parameters that were captured from training",
            )
        product = train[name].inner(block)
        total = product if total is None else total + product
    if total is None:
        raise QueryError("the query names no parameter", expected="one or more", found=0, hint="select parameters")
    return total


def pack(gradients: Gradients) -> dict[str, Tensor]:
    """Plain tensors for a file, under keys ``<kind>|<parameter>|<field>``."""
    packed: dict[str, Tensor] = {}
    for name, block in gradients.items():
        if type(block) is not GradientBlock.kinds.get(block.kind):
            raise TypeError(f"{type(block).__name__} is a block for queries and is not stored")
        for field, tensor in block.tensors().items():
            packed[f"{block.kind}|{name}|{field}"] = tensor
    return packed


def unpack(tensors: Mapping[str, Tensor]) -> Gradients:
    """The gradients that ``pack`` wrote, each block built at its first use; keys of other origin are passed
    over.

    Errors:
        StoreError: a block kind that this version does not know.
    """
    fields: dict[str, tuple[str, list[str]]] = {}
    for key in tensors:
        parts = key.split("|")
        if len(parts) != 3:
            continue
        kind, name, field = parts
        if kind not in GradientBlock.kinds:
            raise StoreError(
                f"gradients of {name!r} are stored in an unknown form",
                expected=sorted(GradientBlock.kinds),
                found=kind,
                hint="the store was written by a newer version of the library, or the file is damaged",
            )
        fields.setdefault(name, (kind, []))[1].append(field)
    return _Unpacked(tensors, fields)


class _Unpacked(Mapping[str, GradientBlock]):
    """Blocks over stored tensors, built at first use so that unused parameters are never read."""

    def __init__(self, tensors: Mapping[str, Tensor], fields: Mapping[str, tuple[str, list[str]]]) -> None:
        self._tensors, self._fields = tensors, fields
        self._built: dict[str, GradientBlock] = {}

    def __getitem__(self, name: str) -> GradientBlock:
        if name not in self._built:
            kind, fields = self._fields[name]
            found = {field: self._tensors[f"{kind}|{name}|{field}"] for field in fields}
            try:
                self._built[name] = GradientBlock.kinds[kind].from_tensors(found)
            except KeyError as error:
                raise StoreError(
                    f"gradients of {name!r} lack a tensor",
                    expected=f"a field named {error}",
                    found=sorted(fields),
                    hint="the file is damaged: verify the store",
                ) from error
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)
