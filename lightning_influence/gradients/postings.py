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
import torch.nn.functional as F
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
    # plain numbers instead of a _Strip that grows: with tens of thousands of rare words this loop is felt
    first, i0, j1, k0, m1 = -1, 0, 0, 0, 0  # the open strip, of rare words only; none while first < 0
    for word, (i, j, k, m) in enumerate(bounds):
        rare = (j - i) * (m - k) <= RARE
        if first >= 0:
            cells = (j - i0) * (m - k0)
            if rare and cells <= STRIP_CELLS and cells <= CALL_CELLS * (word + 1 - first):
                j1, m1 = j, m
                continue
            yield _Strip(first, word, i0, j1, k0, m1)
            first = -1
        if rare:
            first, i0, j1, k0, m1 = word, i, j, k, m
        else:
            yield _Strip(word, word + 1, i, j, k, m)
    if first >= 0:
        yield _Strip(first, len(bounds), i0, j1, k0, m1)


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
        stop = min(m, start + step)
        products = F.linear(train.values[start:stop].to(table), values)  # (n, q) or (n, Q)
        owners = train.owners[start:stop].to(table.device)
        if common:
            table.index_add_(0, owners, products)
        else:
            cells = (owners * num_queries).unsqueeze(1) + query_owners
            table.view(-1).scatter_add_(0, cells.view(-1), products.view(-1))


def _add_strips(table: Tensor, query: Rows, train: Rows, bounds: Tensor, strips: list[_Strip]) -> None:
    """The products of many rare words into the table: one product per strip, its cells picked out by index.

    Pairs are enumerated word by word, within a word by query row, within that by training row: what belongs to a query
    row is worked out once, on R rows, and repeated over the P pairs.
    """
    device = table.device
    words = torch.cat([torch.arange(strip.first, strip.last, device=device) for strip in strips])
    i, j, k, m = bounds[words].unbind(1)  # (W,) each
    corners = torch.tensor([[s.last - s.first, s.i, s.k, s.j - s.i] for s in strips], device=device)
    corner_i, corner_k, width = corners[:, 1:].repeat_interleave(corners[:, 0], 0).unbind(1)
    ends = ((j - i) * (m - k)).cumsum(0)
    stops = [0, *ends[corners[:, 0].cumsum(0) - 1].tolist()]
    word = torch.arange(len(words), device=device).repeat_interleave(j - i)  # (R,) of every query row
    row = torch.arange(len(word), device=device) + (i - (j - i).cumsum(0) + (j - i))[word]
    heights, width, k = (m - k)[word], width[word], k[word]
    first = heights.cumsum(0) - heights  # the number of the query row's first pair
    corner = (k - corner_k[word] - first) * width + row - corner_i[word]
    column = query.owners.index_select(0, row)
    pair = torch.arange(stops[-1], device=device)
    picked = (pair * width.repeat_interleave(heights)).add_(corner.repeat_interleave(heights))  # (P,) in its strip
    cells = train.owners.to(device).index_select(0, pair.add_((k - first).repeat_interleave(heights)))
    cells = cells.mul_(table.shape[1]).add_(column.repeat_interleave(heights))
    for strip, start, stop in zip(strips, stops[:-1], stops[1:], strict=True):
        products = F.linear(train.values[strip.k : strip.m].to(table), query.values[strip.i : strip.j].to(table.dtype))
        table.view(-1).scatter_add_(0, cells[start:stop], products.view(-1).take(picked[start:stop]))
