"""The product of two inverted indices: one multiplication of matrices per shared word, rare words taken together.

A word that q queries and n samples contain costs one (n, D) x (D, q) product and the addition of its cells into the
score table. Nearly all cells belong to a few frequent words; nearly all words are rare, with lists of a few rows, for
which the calls would cost more than the arithmetic. Rare words that lie next to one another in both indices
therefore share a product (a strip), of which only the cells where both sides hold the same word are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_influence.gradients.blocks import accumulation_dtype

if TYPE_CHECKING:
    from lightning_influence.gradients.rows import Rows

PRODUCT_CELLS = 1 << 18  # cells of one product: it and the indices of its scatter stay in the cache
STRIP_CELLS = 1 << 16  # cells of a strip
CALL_CELLS = 1 << 13  # cells that are multiplied in the time that the calls for one word take
COMMON_SHARE = 0.6  # of the queries: from here on padding costs less than adding cell by cell
RARE = 1 << 12  # pairs of rows up to which a word joins a strip: picking costs more than multiplying
PAIRS = 1 << 20  # pairs of rows that are enumerated together


class _Strip(NamedTuple):
    """Shared words ``first`` to ``last`` (exclusive): rows i:j of the queries and k:m of the training side."""

    first: int
    last: int
    i: int
    j: int
    k: int
    m: int


def posting_products(query: Rows, train: Rows) -> Tensor:
    """Σ over shared words of the products of their rows, (Q, N), accumulated in float32 (float64 if stored so)."""
    kind, device = accumulation_dtype(query.values, train.values), query.device
    table = torch.zeros(train.num_samples, query.num_samples, dtype=kind, device=device)  # (N, Q)
    bounds = _shared_bounds(query, train)
    waiting: list[_Strip] = []
    pairs = 0
    for strip in _strips(bounds.tolist()):
        if strip.last - strip.first == 1:
            _add_word(table, query, train, strip)
            continue
        waiting.append(strip)
        pairs += (strip.j - strip.i) * (strip.m - strip.k)  # at most: not all cells are pairs
        if pairs > PAIRS:
            _add_strips(table, query, train, bounds, waiting)
            waiting, pairs = [], 0
    if waiting:
        _add_strips(table, query, train, bounds, waiting)
    return table.T


def _shared_bounds(query: Rows, train: Rows) -> Tensor:
    """For every shared word its rows in both indices: (W, 4) of query start, stop, training start, stop."""
    words, starts = query.postings
    train_words, train_starts = (part.to(words.device) for part in train.postings)
    shared = words[torch.isin(words, train_words, assume_unique=True)]
    a, b = torch.searchsorted(words, shared), torch.searchsorted(train_words, shared)
    return torch.stack([starts[a], starts[a + 1], train_starts[b], train_starts[b + 1]], 1)


def _strips(bounds: list[list[int]]) -> Iterator[_Strip]:
    """Neighbouring words, as long as the cells multiplied for nothing cost less than the calls that are saved."""
    strip: _Strip | None = None  # of rare words only
    for word, (i, j, k, m) in enumerate(bounds):
        alone = _Strip(word, word + 1, i, j, k, m)
        if (j - i) * (m - k) > RARE:
            if strip is not None:
                yield strip
            yield alone
            strip = None
            continue
        if strip is None:
            strip = alone
        elif (j - strip.i) * (m - strip.k) <= min(STRIP_CELLS, CALL_CELLS * (word + 1 - strip.first)):
            strip = strip._replace(last=word + 1, j=j, m=m)
        else:
            yield strip
            strip = alone
    if strip is not None:
        yield strip


def _add_word(table: Tensor, query: Rows, train: Rows, strip: _Strip) -> None:
    """The product of one word's lists into the table."""
    _, _, i, j, k, m = strip
    num_queries = table.shape[1]
    values, query_owners = query.values[i:j].to(table.dtype), query.owners[i:j]  # (q, D), (q,)
    common = 16 <= num_queries < (j - i) / COMMON_SHARE
    if common:  # with a row for every query, zero or not, whole lines of the table are added
        every = torch.zeros(num_queries, values.shape[1], dtype=table.dtype, device=table.device)
        values = every.index_copy_(0, query_owners, values)
    step = max(1, PRODUCT_CELLS // values.shape[0])
    for start in range(k, m, step):
        rows = slice(start, min(m, start + step))
        products = train.values[rows].to(table) @ values.T  # (n, q) or (n, Q)
        owners = train.owners[rows].to(table.device)
        if common:
            table.index_add_(0, owners, products)
        else:
            cells = owners[:, None] * num_queries + query_owners
            table.view(-1).scatter_add_(0, cells.view(-1), products.view(-1))


def _add_strips(table: Tensor, query: Rows, train: Rows, bounds: Tensor, strips: list[_Strip]) -> None:
    """The products of many rare words into the table: one product per strip, its cells picked out by index."""
    device = table.device
    words = torch.cat([torch.arange(strip.first, strip.last, device=device) for strip in strips])
    i, j, k, m = bounds[words].unbind(1)  # (W,) each
    counts = torch.tensor([strip.last - strip.first for strip in strips], device=device)
    corners = torch.tensor([[strip.i, strip.k, strip.j - strip.i] for strip in strips], device=device)
    corner_i, corner_k, width = corners.repeat_interleave(counts, 0).unbind(1)
    pairs = (j - i) * (m - k)
    ends = pairs.cumsum(0)
    heights = (m - k).repeat_interleave(j - i)  # (R,) one for every query row, whose training rows follow
    upper = torch.arange(heights.shape[0], device=device) - ((j - i).cumsum(0) - (j - i)).repeat_interleave(j - i)
    corner = ((k - corner_k) * width + i - corner_i).repeat_interleave(j - i) + upper
    column = query.owners.index_select(0, i.repeat_interleave(j - i) + upper)
    first = heights.cumsum(0) - heights
    beside = torch.arange(int(ends[-1]), device=device) - first.repeat_interleave(heights)  # (P,)
    picked = beside * width.repeat_interleave(pairs) + corner.repeat_interleave(heights)
    cells = train.owners.to(device).index_select(0, beside + k.repeat_interleave(pairs))
    cells = cells * table.shape[1] + column.repeat_interleave(heights)
    stops = [0, *ends[counts.cumsum(0) - 1].tolist()]
    for strip, start, stop in zip(strips, stops[:-1], stops[1:], strict=True):
        left = train.values[strip.k : strip.m].to(table)
        products = left @ query.values[strip.i : strip.j].to(table.dtype).T
        table.view(-1).scatter_add_(0, cells[start:stop], products.view(-1).take(picked[start:stop]))
