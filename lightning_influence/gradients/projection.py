"""Random projections of per-sample gradients: fewer numbers, with the inner products of the gradients on average.

A projection is a linear map P of each parameter by itself, drawn from a seed and the parameter's name, with
E[PᵀP] = I: <P u, P v> is <u, v> on average over seeds. Parameters that are small enough already are not changed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_influence.errors import StoreError, UnsupportedError
from lightning_influence.gradients.blocks import Dense, GradientBlock, Gradients, accumulation_dtype, spans
from lightning_influence.gradients.counted_signs import key_of, orthonormal, signs
from lightning_influence.gradients.factored import Factored
from lightning_influence.gradients.rows import Rows

Shape: TypeAlias = tuple[int, ...]


class Projection(ABC):
    """A linear map of the gradients of every parameter; an object holds its settings."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Projection]]] = {}
    factored: ClassVar[bool] = False  # gradients cost less to project as factors than written out

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Projection.kinds[cls.kind] = cls

    @abstractmethod
    def shape(self, shape: Shape) -> Shape:
        """Shape of the projected gradient of a parameter of this shape."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The settings as plain JSON; `from_record` reads them."""

    def apply(self, gradients: Gradients) -> dict[str, GradientBlock]:
        """P g of every sample, under the same names; in float32, or float64 where the gradients are held so."""
        return {name: Dense(self._applied(name, block)) for name, block in gradients.items()}

    def lift(self, projected: Gradients, shapes: Mapping[str, Shape]) -> dict[str, GradientBlock]:
        """Pᵀ v, in the shapes of the parameters: <Pᵀ v, g> = <v, P g>."""
        lifted: dict[str, GradientBlock] = {}
        for name, block in projected.items():
            shape = shapes[name]
            lifted[name] = Dense(self._lifted(name, block.dense(), shape).reshape(-1, *shape))
        return lifted

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Projection:
        """The projection that `record` wrote.

        Raises:
            StoreError: this version knows no such projection.
        """
        settings = dict(record)
        kind = Projection.kinds.get(str(settings.pop("kind", None)))
        try:
            if kind is not None:
                return kind(**settings)
        except (TypeError, UnsupportedError):  # settings that it does not have
            pass
        raise StoreError(
            "the gradients of this store were projected in an unknown way",
            expected=" or ".join(sorted(Projection.kinds)),
            found=repr(dict(record)),
            hint="read the store with the version of the library that wrote it",
        )

    @abstractmethod
    def _applied(self, name: str, block: GradientBlock) -> Tensor: ...

    @abstractmethod
    def _lifted(self, name: str, values: Tensor, shape: Shape) -> Tensor: ...


@dataclass(frozen=True)
class RandomProjection(Projection):
    """Each parameter's gradient times a matrix of random signs, to `size` numbers (TRAK; Park et al. 2023, 2303.14186).

        P g,    P (size, number of weights) of +-1 / sqrt(size)

    Parameters of at most `size` weights are kept as they are. P is drawn anew, a part at a time, whenever it is used,
    and nothing of its size is ever held; that takes time in proportion to weights x size, for which `FactorProjection`
    is the remedy in large layers. Of word embeddings only the rows of the words that occur are drawn.

    Args:
        size: numbers kept for each parameter. The error of an inner product is about |u| |v| / sqrt(size).
        seed: of the signs.
    """

    size: int
    seed: int = 0

    kind: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        _whole_numbers(self, size=(self.size, 1), seed=(self.seed, None))

    def shape(self, shape: Shape) -> Shape:
        """(size,), or fewer where the parameter has fewer weights."""
        return (min(self.size, math.prod(shape)),)

    def record(self) -> dict[str, Any]:
        """Kind, size and seed."""
        return {"kind": self.kind, **asdict(self)}

    def _applied(self, name: str, block: GradientBlock) -> Tensor:
        if math.prod(block.shape) <= self.size:
            return block.dense().reshape(block.num_samples, math.prod(block.shape))
        key = key_of(self.seed, name)
        total: Tensor | None = None
        for places, values in _flat_parts(block):  # (n,), (N, n)
            total = values.new_zeros(len(values), self.size) if total is None else total
            for part in spans(len(places), self.size):
                total.addmm_(values[:, part], signs(key, places[part], self.size, values.dtype))
        if total is None:
            kind = torch.promote_types(block.dtype, torch.float32)
            return torch.zeros(block.num_samples, self.size, dtype=kind, device=block.device)
        return total.div_(math.sqrt(self.size))

    def _lifted(self, name: str, values: Tensor, shape: Shape) -> Tensor:
        if math.prod(shape) <= self.size:
            return values
        key, lifted = key_of(self.seed, name), values.new_empty(len(values), math.prod(shape))
        for part in spans(lifted.shape[1], self.size):
            places = torch.arange(part.start, part.stop, device=values.device)
            lifted[:, part] = values @ signs(key, places, self.size, values.dtype).T
        return lifted.div_(math.sqrt(self.size))


@dataclass(frozen=True)
class FactorProjection(Projection):
    """Both sides of a layer's gradient projected, to rank x rank (LoGra; Choe et al. 2024, 2405.13954).

        P_oᵀ G P_i = sum over positions t of (P_oᵀ g_t)(P_iᵀ a_t)ᵀ

    with a_t the inputs and g_t the output gradients. P_i and P_o have random orthonormal columns, scaled so that inner
    products are kept on average, and are small: the gradient itself is never formed. A side with at most `rank` entries
    is not projected, so that a large enough rank is exact.

    The rule is the same for every parameter, seen as a matrix (first dimension, all others): the weight of a
    convolution has (channels in x kernel) inputs; an embedding (V, D) is projected from its rows, to rank x rank; a
    vector such as a bias has one column, and is projected to `rank` numbers.

    Args:
        rank: kept of either side. The error of an inner product is about |u| |v| / rank, and up to |u| |v| / sqrt(rank)
            for gradients that have one side in common.
        seed: of the bases.
    """

    rank: int
    seed: int = 0
    _bases: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    kind: ClassVar[str] = "factor"
    factored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _whole_numbers(self, rank=(self.rank, 1), seed=(self.seed, None))

    def shape(self, shape: Shape) -> Shape:
        """(rank, rank), a side shorter where the parameter is; of vectors (rank,)."""
        sides = _sides(shape)
        return tuple(min(self.rank, side) for side in (sides if len(shape) > 1 else sides[:1]))

    def record(self) -> dict[str, Any]:
        """Kind, rank and seed."""
        return {"kind": self.kind, "rank": self.rank, "seed": self.seed}

    def _applied(self, name: str, block: GradientBlock) -> Tensor:
        height, width = _sides(block.shape)
        kind = torch.promote_types(block.dtype, torch.float32)
        left, right = (self._basis(name, s, n, block.device, kind) for s, n in (("rows", height), ("columns", width)))
        if isinstance(block, Factored):
            product = _of_factors(block, left, right)
        elif isinstance(block, Rows) and left is not None:
            product = _of_rows(block, left, right)
        else:
            product = block.dense().reshape(block.num_samples, height, width)
            product = product if right is None else product @ right
            product = product if left is None else left.T @ product
        return product.reshape(block.num_samples, *self.shape(block.shape))

    def _lifted(self, name: str, values: Tensor, shape: Shape) -> Tensor:
        height, width = _sides(shape)
        left, right = (
            self._basis(name, s, n, values.device, values.dtype) for s, n in (("rows", height), ("columns", width))
        )
        lifted = values.reshape(len(values), min(self.rank, height), min(self.rank, width))
        lifted = lifted if right is None else lifted @ right.T
        return lifted if left is None else left @ lifted

    def _basis(self, name: str, side: str, size: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """Scaled orthonormal columns (size, rank), made once; `None` for a side that is not projected."""
        if size <= self.rank:
            return None
        key = (name, side, size, device, dtype)
        if key not in self._bases:
            basis = orthonormal(key_of(self.seed, name, side), size, self.rank) * math.sqrt(size / self.rank)
            self._bases[key] = basis.to(device, dtype)
        return self._bases[key]


def _sides(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def _of_factors(block: Factored, left: Tensor | None, right: Tensor | None) -> Tensor:
    """P_oᵀ G P_i of every sample, (N, r, s), from the factors of G; groups of rows see their own inputs."""
    kind = accumulation_dtype(block.inputs, block.output_grads)
    inputs = torch.unflatten(block.inputs.to(kind), 2, (block.groups, -1))  # (N, T, G, I)
    output_grads = torch.unflatten(block.output_grads.to(kind), 2, (block.groups, -1))  # (N, T, G, O)
    if block.groups > 1 and left is None:
        left = torch.eye(block.shape[0], dtype=kind, device=block.device)
    if left is not None:
        output_grads = torch.einsum("ntgo,gor->ntgr", output_grads, torch.unflatten(left, 0, (block.groups, -1)))
    if right is not None:
        inputs = inputs @ right
    return output_grads.flatten(1, 2).transpose(1, 2) @ inputs.flatten(1, 2)


def _of_rows(block: Rows, left: Tensor, right: Tensor | None) -> Tensor:
    """P_oᵀ G P_i of every sample, (N, r, s), from the rows of G that it touched."""
    order = torch.argsort(block.owners, stable=True)
    owners, counts = block.owners[order], torch.bincount(block.owners, minlength=block.num_samples)
    slots = torch.arange(len(owners), device=block.device) - (counts.cumsum(0) - counts)[owners]
    longest = int(counts.max()) if len(counts) else 0

    def by_sample(rows: Tensor) -> Tensor:  # (M, r) -> (N, words of a sample, r), filled up with zeros
        padded = rows.new_zeros(block.num_samples, longest, rows.shape[1])
        padded[owners, slots] = rows[order]
        return padded

    values = block.values.to(left.dtype)
    values = values if right is None else values @ right
    return by_sample(left[block.words]).transpose(1, 2) @ by_sample(values)


def _flat_parts(block: GradientBlock) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients laid out flat, some weights at a time: which weights (n,), and their gradients (N, n).

    Rows of an embedding that no sample touched are left out.
    """
    if isinstance(block, Rows):
        yield from _parts_of_rows(block)
    elif isinstance(block, Factored):
        yield from _parts_of_factors(block)
    else:
        values = block.dense().flatten(1)
        yield torch.arange(values.shape[1], device=values.device), values


def _parts_of_rows(block: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    words, starts = block.postings
    kind, width = accumulation_dtype(block.values), block.values.shape[1]
    for some in spans(len(words), block.num_samples * width):
        rows = slice(int(starts[some.start]), int(starts[some.stop]))
        values = torch.zeros(block.num_samples, some.stop - some.start, width, dtype=kind, device=block.device)
        local = torch.searchsorted(words[some], block.words[rows])
        values[block.owners[rows], local] = block.values[rows].to(kind)
        places = words[some, None] * width + torch.arange(width, device=block.device)
        yield places.flatten(), values.flatten(1)


def _parts_of_factors(block: Factored) -> Iterator[tuple[Tensor, Tensor]]:
    kind, groups = accumulation_dtype(block.inputs, block.output_grads), block.groups
    inputs = block.inputs.to(kind).chunk(groups, 2)
    output_grads = block.output_grads.to(kind).chunk(groups, 2)
    width, height = inputs[0].shape[2], output_grads[0].shape[2]
    for group in range(groups):
        for rows in spans(height, block.num_samples * width):
            values = output_grads[group][:, :, rows].transpose(1, 2) @ inputs[group]  # (N, n, I)
            first = (group * height + rows.start) * width
            yield torch.arange(first, first + values[0].numel(), device=block.device), values.flatten(1)


def _whole_numbers(owner: Projection, **values: tuple[object, int | None]) -> None:
    """UnsupportedError for the first value that is no whole number, or is below its least."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise UnsupportedError(
                f"{name} of {type(owner).__name__} must be a whole number",
                expected="an int" if least is None else f"an int >= {least}",
                found=repr(value),
                hint=f"pass for example {type(owner).__name__}({'16' if name == 'rank' else '512'})",
            )
