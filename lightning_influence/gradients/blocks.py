"""Per-sample gradients of one parameter as blocks, and the inner products between blocks.

A block holds the gradients of N samples with respect to one parameter, in whatever form is small: ``Dense``
here, ``Factored`` (outer products, in factored.py) and ``Rows`` (an inverted index over words, in rows.py).
``Gradients`` maps full parameter names to blocks. Products accumulate in float32, or in float64 where a block
is stored so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_influence.errors import QueryError

if TYPE_CHECKING:
    from lightning_influence.gradients.factored import Factored
    from lightning_influence.gradients.rows import Rows

BlockT = TypeVar("BlockT", bound="GradientBlock")

CHUNK_ELEMENTS = 1 << 24  # intermediates of a product stay below 64 MiB in float32
_TOUCH = 8  # multiplications in the time that writing and reading one intermediate number takes


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precision is for storage."""
    return _accumulated(*(tensor.dtype for tensor in tensors))


def _accumulated(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def spans(length: int, elements_each: int) -> Iterator[slice]:
    """Consecutive slices of ``range(length)`` holding at most CHUNK_ELEMENTS elements each (and at least one
    item)."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for start in range(0, length, step):
        yield slice(start, min(length, start + step))


class GradientBlock(ABC):
    """The gradients of ``num_samples`` samples with respect to one parameter of shape ``shape``.

    Blocks are values: every operation returns a new block. A subclass that is to be stored names its
    ``kind``.
    """

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[GradientBlock]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            GradientBlock.kinds[cls.kind] = cls

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """N, the number of samples in the block."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, without the sample dimension."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The type in which the values are held; products accumulate in float32 or float64."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the values are."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The gradients written out, (N, *shape), in the accumulation type."""

    def written_out(self, dtype: torch.dtype) -> Tensor:
        """The gradients written out in a type of the caller's choice, (N, *shape)."""
        return self.dense().to(dtype)

    @abstractmethod
    def select(self, index: Tensor) -> GradientBlock:
        """The samples at ``index`` (K,) in that order; repeats are allowed."""

    @abstractmethod
    def scaled(self, weights: Tensor) -> GradientBlock:
        """Every sample's gradient times its weight; ``weights`` (N,)."""

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GradientBlock:
        """The block elsewhere or in another floating type."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The fields of the block as plain tensors, for the store; ``from_tensors`` reads them back."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GradientBlock:
        """The block whose ``tensors()`` these are; memory-mapped values are not read."""

    @classmethod
    @abstractmethod
    def join(cls: type[BlockT], blocks: Sequence[BlockT]) -> GradientBlock:
        """Blocks of this one type laid one after the other along the samples."""

    def compact(self) -> GradientBlock:
        """The same gradients in the form that holds fewer numbers: this one, or Dense."""
        return self

    @abstractmethod
    def all_finite(self) -> bool:
        """False when a value is NaN or infinite."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the values and indices held."""

    def sum(self) -> Tensor:
        """Sum over the samples, (*shape): what autograd itself would give."""
        return self.dense().sum(0)

    def summed(self) -> GradientBlock:
        """The sum over the samples as a block of one."""
        return Dense(self.sum()[None])

    def multiplied(self, factor: Tensor) -> GradientBlock:
        """Every sample's gradient times ``factor`` (*shape), element by element."""
        dense = self.dense()
        return Dense(dense * factor.to(dense))

    def plus(self, other: GradientBlock) -> GradientBlock:
        """The gradients of the same samples added, as for a parameter that is used twice."""
        self._check_alike(other, same_samples=True)
        return Dense(self.dense() + other.dense())

    def inner(self, query: GradientBlock) -> Tensor:
        """⟨query q, sample n⟩ for every pair, (Q, N), on the device of the query; ``self`` is the training side.

        Queries held in bfloat16 beside gradients in float32 ask for products in it: operands and sums are rounded to 8
        bits, a processor with bfloat16 units adds up in float32, and is several times as fast. All others are
        multiplied in float32 or more.
        """
        self._check_alike(query)
        narrow = query.dtype == torch.bfloat16 and self.dtype == torch.float32
        wanted = query.written_out(query.dtype if narrow else _accumulated(query.dtype, self.dtype))
        wanted = wanted.flatten(1)  # (Q, P)
        products = []
        for span in spans(self.num_samples, wanted.shape[1]):
            whole = span.stop - span.start == self.num_samples
            some = self if whole else self.select(torch.arange(span.start, span.stop))
            mine = some.written_out(wanted.dtype).flatten(1)  # (n, P)
            products.append(wanted @ mine.to(wanted.device).T)
        found = torch.cat(products, 1) if products else wanted.new_zeros(query.num_samples, 0)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def pairwise(self, other: GradientBlock) -> Tensor:
        """⟨other n, self n⟩ row by row, (N,)."""
        self._check_alike(other, same_samples=True)
        mine, theirs = self.dense().flatten(1), other.dense().flatten(1)
        kind = accumulation_dtype(mine, theirs)
        return (mine.to(kind) * theirs.to(kind)).sum(1)

    def norm(self) -> Tensor:
        """Euclidean norm of every sample's gradient, (N,)."""
        return self.pairwise(self).clamp_min(0).sqrt()

    def against_rows(self, train: Rows) -> Tensor:
        """The inner products of this query with a training block of rows, (Q, N).

        ``Rows.inner`` hands over to here, so that a query block of another type can say how it meets an
        inverted index (synonym matching does). This general form gathers the query's rows at the words of the
        index.
        """
        self._check_alike(train)
        dense = self.dense()  # (Q, V, D)
        kind = accumulation_dtype(dense, train.values)
        out = torch.zeros(self.num_samples, train.num_samples, dtype=kind, device=dense.device)
        for span in spans(train.values.shape[0], train.values.shape[1]):
            values = train.values[span].to(dense.device, kind)  # (M, D)
            words, owners = train.words[span].to(dense.device), train.owners[span].to(dense.device)
            for q in range(self.num_samples):
                out[q].index_add_(0, owners, (dense[q, words].to(kind) * values).sum(1))
        return out

    def against_factors(self, train: Factored) -> Tensor:
        """The inner products of this query with a training block of factors, (Q, N).

        ``Factored.inner`` hands over to here, so that a query block of another type can meet the factors in the
        way that is cheapest for it. This general form writes both out.
        """
        return GradientBlock.inner(train, self)

    def _check_alike(self, other: GradientBlock, *, same_samples: bool = False) -> None:
        if self.shape != other.shape:
            raise QueryError(
                "two gradient blocks belong to parameters of different shapes",
                expected=self.shape,
                found=other.shape,
                hint="use gradients that were captured from the same model",
            )
        if same_samples and self.num_samples != other.num_samples:
            raise QueryError(
                "two gradient blocks hold different numbers of samples",
                expected=self.num_samples,
                found=other.num_samples,
                hint="this operation goes sample by sample: select the same samples in both",
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_samples} samples of {self.shape}, {self.dtype})"


Gradients: TypeAlias = Mapping[str, GradientBlock]


class Dense(GradientBlock):
    """Gradients written out; ``values`` (N, *shape)."""

    kind = "dense"

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def num_samples(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def dense(self) -> Tensor:
        return self.values.to(accumulation_dtype(self.values))

    def written_out(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    def inner(self, query: GradientBlock) -> Tensor:
        from lightning_influence.gradients.rows import Rows

        if isinstance(query, Rows):
            return query.to(device=self.device).inner(self).T.to(query.device)
        return super().inner(query)

    def against_factors(self, train: Factored) -> Tensor:
        """Σ_t output_grads · (query @ inputs), or products of written-out gradients where those cost less: with
        several positions and more than a few queries."""
        self._check_alike(train)
        q, t, width = self.num_samples, train.inputs.shape[1], train.inputs.shape[2]
        direct = q * t * (width + _TOUCH)  # operations for one output of one sample
        if train.groups > 1 or direct > width * (q + t + _TOUCH):
            return super().against_factors(train)
        kind = accumulation_dtype(self.values, train.inputs, train.output_grads)
        height = self.shape[0]
        wanted = self.values.to(kind).reshape(q * height, width).T  # (I, QO)
        products = []
        for span in spans(train.num_samples, t * q * height):
            inputs = train.inputs[span].to(self.device, kind).flatten(0, 1)  # (nT, I)
            grads = train.output_grads[span].to(self.device, kind).flatten(0, 1)  # (nT, O)
            found = torch.bmm((inputs @ wanted).view(-1, q, height), grads[:, :, None])  # (nT, Q, 1)
            products.append(found.view(-1, t, q).sum(1).T)
        return torch.cat(products, 1) if products else self.values.new_zeros(q, 0, dtype=kind)

    def select(self, index: Tensor) -> Dense:
        return Dense(self.values[index.to(self.values.device)])

    def scaled(self, weights: Tensor) -> Dense:
        weights = weights.to(self.device, accumulation_dtype(self.values))
        return Dense((self.values * weights.view(-1, *[1] * (self.values.dim() - 1))).to(self.dtype))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dense:
        return Dense(self.values.to(device=device or self.device, dtype=dtype or self.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Dense:
        return cls(tensors["values"])

    @classmethod
    def join(cls, blocks: Sequence[Dense]) -> Dense:
        return cls(torch.cat([block.values for block in blocks]))

    def all_finite(self) -> bool:
        return tensor_is_finite(self.values)

    def nbytes(self) -> int:
        return self.values.nbytes


def tensor_is_finite(tensor: Tensor) -> bool:
    """True when no element is NaN or infinite; one pass, no temporary."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def join_dense(blocks: Sequence[GradientBlock]) -> Dense:
    """Blocks of any forms laid one after the other along the samples, written out in the widest of their types."""
    widest = max((block.dtype for block in blocks), key=lambda dtype: torch.finfo(dtype).bits)
    return Dense(torch.cat([block.dense() for block in blocks]).to(widest))
