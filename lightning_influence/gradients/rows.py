"""Gradients of an embedding as an inverted index: the rows that each sample touched, sorted by word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_influence.gradients.blocks import (
    GradientBlock,
    accumulation_dtype,
    tensor_is_finite,
)
from lightning_influence.gradients.postings import posting_products


class Rows(GradientBlock):
    """Row-sparse gradients of an embedding (V, D): one row for every word that a sample contains.

    Args:
        words: (M,) int64, ascending; the row of the embedding.
        owners: (M,) int64, the sample that the row belongs to; ascending within a word, pairs are unique.
        values: (M, D), the gradient of that row: the sum over the word's positions in the sample.
        num_samples: N.
        num_words: V.
    """

    kind = "rows"

    def __init__(self, words: Tensor, owners: Tensor, values: Tensor, num_samples: int, num_words: int) -> None:
        if values.dim() != 2 or words.shape != owners.shape or words.shape != values.shape[:1]:
            raise ValueError(
                f"rows need words (M,), owners (M,), values (M, D), not "
                f"{tuple(words.shape)}, {tuple(owners.shape)}, {tuple(values.shape)}"
            )
        self.words, self.owners, self.values = words, owners, values
        self._num_samples, self.num_words = num_samples, num_words

    @classmethod
    def from_pairs(cls, words: Tensor, owners: Tensor, values: Tensor, *, num_samples: int, num_words: int) -> Rows:
        """Rows from (word, owner) pairs in any order, with the values of repeated pairs added.

        Args:
            words: (M,) integers in [0, num_words).
            owners: (M,) integers in [0, num_samples).
            values: (M, D).
        """
        keys = words.long() * max(1, num_samples) + owners.long()
        unique, position = torch.unique(keys, return_inverse=True)  # ascending in (word, owner)
        kind = accumulation_dtype(values)
        merged = torch.zeros(unique.shape[0], values.shape[1], dtype=kind, device=values.device)
        merged.index_add_(0, position, values.to(kind))
        return cls(
            unique // max(1, num_samples),
            unique % max(1, num_samples),
            merged.to(values.dtype),
            num_samples,
            num_words,
        )

    @classmethod
    def from_dense(cls, values: Tensor) -> Rows:
        """The rows of written-out gradients (N, V, D) that are not zero."""
        owners, words = (values != 0).any(2).nonzero(as_tuple=True)
        count, num_words, _ = values.shape
        return cls.from_pairs(words, owners, values[owners, words], num_samples=count, num_words=num_words)

    @classmethod
    def from_tokens(
        cls, token_ids: Tensor, output_grads: Tensor, *, num_words: int, padding_idx: int | None = None
    ) -> Rows:
        """Rows of look-ups ``token_ids`` (N, T) from the gradients at the look-up's output (N, T, D).

        Repeated words of a sample are merged; ``padding_idx`` receives no gradient and is left out.
        """
        num_samples, length = token_ids.shape
        words = token_ids.reshape(-1)
        owners = torch.arange(num_samples, device=words.device).repeat_interleave(length)
        values = output_grads.reshape(-1, output_grads.shape[-1])
        if padding_idx is not None:
            kept = (words != padding_idx).nonzero().squeeze(1)
            words, owners, values = words[kept], owners[kept], values[kept]
        return cls.from_pairs(words, owners, values, num_samples=num_samples, num_words=num_words)

    @property
    def num_samples(self) -> int:
        return self._num_samples

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.num_words, self.values.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @cached_property
    def postings(self) -> tuple[Tensor, Tensor]:
        """(words (W,), starts (W+1,)): the rows of word w are starts[w]:starts[w+1]."""
        unique, counts = torch.unique_consecutive(self.words, return_counts=True)
        return unique, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def _keys(self) -> Tensor:
        return self.words * max(1, self.num_samples) + self.owners  # (M,) ascending

    def dense(self) -> Tensor:
        kind = accumulation_dtype(self.values)
        out = torch.zeros(self.num_samples, *self.shape, dtype=kind, device=self.device)
        out[self.owners, self.words] = self.values.to(kind)
        return out

    def sum(self) -> Tensor:
        kind = accumulation_dtype(self.values)
        out = torch.zeros(*self.shape, dtype=kind, device=self.device)
        return out.index_add_(0, self.words, self.values.to(kind))

    def summed(self) -> Rows:
        """The sum over the samples as a block of one, which touches the words of all of them."""
        nobody = torch.zeros_like(self.owners)
        return Rows.from_pairs(self.words, nobody, self.values, num_samples=1, num_words=self.num_words)

    def inner(self, query: GradientBlock) -> Tensor:
        """Σ over shared words of the products of their rows, (Q, N)."""
        return query.against_rows(self)

    def against_rows(self, train: Rows) -> Tensor:
        """Σ over shared words of the products of their rows, (Q, N), word by word (see postings.py)."""
        self._check_alike(train)
        return posting_products(self, train)

    def pairwise(self, other: GradientBlock) -> Tensor:
        self._check_alike(other, same_samples=True)
        kind = accumulation_dtype(self.values)
        if isinstance(other, Rows):
            kind = accumulation_dtype(self.values, other.values)
            shared = torch.isin(self._keys, other._keys, assume_unique=True).nonzero().squeeze(1)
            there = torch.searchsorted(other._keys, self._keys[shared])
            products = (self.values[shared].to(kind) * other.values[there].to(kind)).sum(1)
            owners = self.owners[shared]
        else:
            dense = other.dense()
            kind = accumulation_dtype(self.values, dense)
            owners = self.owners
            products = (self.values.to(kind) * dense[owners, self.words].to(kind)).sum(1)
        return torch.zeros(self.num_samples, dtype=kind, device=self.device).index_add_(0, owners, products)

    def norm(self) -> Tensor:
        kind = accumulation_dtype(self.values)
        squares = self.values.to(kind).square().sum(1)
        return torch.zeros(self.num_samples, dtype=kind, device=self.device).index_add_(0, self.owners, squares).sqrt()

    def plus(self, other: GradientBlock) -> GradientBlock:
        if not isinstance(other, Rows):
            return super().plus(other)
        self._check_alike(other, same_samples=True)
        return Rows.from_pairs(
            torch.cat([self.words, other.words]),
            torch.cat([self.owners, other.owners]),
            torch.cat([self.values, other.values]),
            num_samples=self.num_samples,
            num_words=self.num_words,
        )

    def multiplied(self, factor: Tensor) -> Rows:
        factor = factor.to(self.device, accumulation_dtype(self.values))
        return self._with_values((self.values * factor[self.words]).to(self.dtype))

    def scaled(self, weights: Tensor) -> Rows:
        weights = weights.to(self.device, accumulation_dtype(self.values))[self.owners, None]
        return self._with_values((self.values * weights).to(self.dtype))

    def select(self, index: Tensor) -> Rows:
        index = index.to(self.device)
        by_owner = torch.argsort(self.owners, stable=True)
        counts = torch.bincount(self.owners, minlength=self.num_samples)  # (N,)
        starts = counts.cumsum(0) - counts
        taken = counts[index]  # (K,)
        owners = torch.arange(index.shape[0], device=self.device).repeat_interleave(taken)
        offsets = torch.arange(owners.shape[0], device=self.device) - (taken.cumsum(0) - taken)[owners]
        rows = by_owner[starts[index][owners] + offsets]
        order = torch.argsort(self.words[rows], stable=True)  # owners ascend within a word: rows came in owner order
        rows = rows[order]
        return Rows(self.words[rows], owners[order], self.values.index_select(0, rows), index.shape[0], self.num_words)

    def top_words(self, k: int) -> Rows:
        """Per sample the ``k`` words whose rows have the largest norms; of equal norms the lower word id
        stays."""
        norms = self.values.to(accumulation_dtype(self.values)).square().sum(1)
        order = torch.argsort(norms, descending=True, stable=True)
        order = order[torch.argsort(self.owners[order], stable=True)]  # by owner, then by falling norm
        counts = torch.bincount(self.owners, minlength=self.num_samples)
        rank = torch.arange(order.shape[0], device=self.device)
        rank = rank - (counts.cumsum(0) - counts)[self.owners[order]]
        return self._taking(order[rank < k].sort().values)

    def without_words(self, ids: Tensor | Sequence[int]) -> Rows:
        """The rows of all words except ``ids`` (padding, separators, common words)."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.device).reshape(-1)
        return self._taking((~torch.isin(self.words, ids)).nonzero().squeeze(1))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rows:
        device = device or self.device
        values = self.values.to(device=device, dtype=dtype or self.dtype)
        return Rows(self.words.to(device), self.owners.to(device), values, self.num_samples, self.num_words)

    def tensors(self) -> dict[str, Tensor]:
        index = torch.int32 if max(self.num_words, self.num_samples) < 2**31 else torch.int64
        extent = torch.tensor([self.num_samples, self.num_words], dtype=torch.int64)
        return {
            "words": self.words.to(index),
            "owners": self.owners.to(index),
            "values": self.values,
            "extent": extent,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Rows:
        num_samples, num_words = (int(size) for size in tensors["extent"])
        return cls(tensors["words"].long(), tensors["owners"].long(), tensors["values"], num_samples, num_words)

    @classmethod
    def join(cls, blocks: Sequence[Rows]) -> Rows:
        offset, owners = 0, []
        for block in blocks:
            owners.append(block.owners + offset)
            offset += block.num_samples
        words = torch.cat([block.words for block in blocks])
        order = torch.argsort(words, stable=True)  # owners ascend from block to block, so they ascend within a word
        values = torch.cat([block.values for block in blocks]).index_select(0, order)
        return cls(words[order], torch.cat(owners)[order], values, offset, blocks[0].num_words)

    def all_finite(self) -> bool:
        return tensor_is_finite(self.values)

    def nbytes(self) -> int:
        return self.words.nbytes + self.owners.nbytes + self.values.nbytes

    def _with_values(self, values: Tensor) -> Rows:
        return Rows(self.words, self.owners, values, self.num_samples, self.num_words)

    def _taking(self, rows: Tensor) -> Rows:
        values = self.values.index_select(0, rows)  # several times faster than indexing
        return Rows(self.words[rows], self.owners[rows], values, self.num_samples, self.num_words)
