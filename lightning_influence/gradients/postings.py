"""The product of two inverted indices: one multiplication of matrices per shared word, rare words taken together.

A word that q queries and n samples contain costs one (n, D) x (D, q) product and the addition of its cells into the
score table. Nearly all cells belong to a few frequent words; nearly all words are rare, with lists of a few rows, for
which the calls would cost more than the arithmetic. Rare words with lists of about the same lengths are therefore
multiplied as one batch, their lists filled up to a common length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence.gradients.blocks import accumulation_dtype

if TYPE_CHECKING:
    from lightning_influence.gradients.rows import Rows

PRODUCT_CELLS = 1 << 18  # cells of one product: it and the indices of its scatter stay in the cache
BATCH_ELEMENTS = 1 << 19  # entries of the copied rows, and cells of the products, of one batch of rare words
RARE = 1 << 13  # cells up to which a word is rare: filling up costs less than the calls for a word alone
COMMON_SHARE = 0.6  # of the queries: from here on padding costs less than adding cell by cell


def posting_products(query: Rows, train: Rows) -> Tensor:
    """Σ over shared words of the products of their rows, (Q, N), accumulated in float32 (float64 if stored so)."""
    kind, device = accumulation_dtype(query.values, train.values), query.device
    shape = (train.num_samples + 1, query.num_samples + 1)  # the last row and the last column belong to nobody
    table = torch.zeros(shape, dtype=kind, device=device)
    bounds = _shared_bounds(query, train)
    i, j, k, m = bounds.unbind(1)
    rare = (j - i) * (m - k) <= RARE
    for word in bounds[~rare].tolist():
        _add_word(table, query, train, *word)
    _add_rare(table, query, train, bounds[rare])
    return table[:-1, :-1].T


def _shared_bounds(query: Rows, train: Rows) -> Tensor:
    """For every shared word its rows in both indices: (W, 4) of query start, stop, training start, stop."""
    words, starts = query.postings
    train_words, train_starts = (part.to(words.device) for part in train.postings)
    shared = words[torch.isin(words, train_words, assume_unique=True)]
    a, b = torch.searchsorted(words, shared), torch.searchsorted(train_words, shared)
    return torch.stack([starts[a], starts[a + 1], train_starts[b], train_starts[b + 1]], 1)


def _add_word(table: Tensor, query: Rows, train: Rows, i: int, j: int, k: int, m: int) -> None:
    """The product of one word's lists, rows i:j of the queries and k:m of the training side, into the table."""
    columns = table.shape[1]
    values, query_owners = query.values[i:j].to(table.dtype), query.owners[i:j]  # (q, D), (q,)
    common = 16 <= columns < (j - i) / COMMON_SHARE
    if common:  # with a row for every column, zero or not, whole lines of the table are added
        every = torch.zeros(columns, values.shape[1], dtype=table.dtype, device=table.device)
        values = every.index_copy_(0, query_owners, values)
    step = max(1, PRODUCT_CELLS // values.shape[0])
    for start in range(k, m, step):
        stop = min(m, start + step)
        products = F.linear(train.values[start:stop].to(table), values)  # (n, q) or (n, Q + 1)
        owners = train.owners[start:stop].to(table.device)
        if common:
            table.index_add_(0, owners, products)
        else:
            cells = (owners * columns).unsqueeze(1) + query_owners
            table.view(-1).scatter_add_(0, cells.view(-1), products.view(-1))


def _add_rare(table: Tensor, query: Rows, train: Rows, bounds: Tensor) -> None:
    """The products of many short lists into the table, in batches of words whose lists fill up to equal lengths."""
    i, j, k, m = bounds.unbind(1)
    base = 2 * RARE + 1  # more than any filled-up length
    lengths, order = torch.sort(_filled_up(m - k) * base + _filled_up(j - i), stable=True)
    different, counts = torch.unique_consecutive(lengths, return_counts=True)
    start, width = 0, query.values.shape[1]
    for length, count in zip(different.tolist(), counts.tolist(), strict=True):
        n, q = divmod(length, base)
        batch = max(1, BATCH_ELEMENTS // max(n * q, (n + q) * width))
        for words in torch.split(order[start : start + count], batch):  # type: ignore[no-untyped-call,unused-ignore]
            _add_batch(table, query, train, bounds[words], n, q)
        start += count


def _add_batch(table: Tensor, query: Rows, train: Rows, bounds: Tensor, n: int, q: int) -> None:
    """One product for G words: rows i:j of the queries filled up to q and k:m of the training side to n.

    A row too many is some other word's; what it gives is added to the last column or the last row of the table.
    """
    i, j, k, m = bounds.unsqueeze(2).unbind(1)  # (G, 1) each
    left, lines = _rows_at(train, k, m, n, table.shape[0] - 1)
    right, columns = _rows_at(query, i, j, q, table.shape[1] - 1)
    cells = lines.to(table.device).mul_(table.shape[1]).unsqueeze(2) + columns.unsqueeze(1)  # (G, n, q)
    products = torch.bmm(left.to(table), right.to(table.dtype).transpose(1, 2))
    table.view(-1).scatter_add_(0, cells.view(-1), products.view(-1))


def _rows_at(rows: Rows, start: Tensor, stop: Tensor, length: int, nobody: int) -> tuple[Tensor, Tensor]:
    """(values (G, length, D), owners (G, length)) of the rows after start (G, 1); nobody owns those from stop on."""
    at = start.to(rows.device) + torch.arange(length, device=rows.device)
    beyond = at >= stop.to(rows.device)
    at = at.clamp_(max=rows.words.shape[0] - 1).view(-1)
    owners = rows.owners.index_select(0, at).view_as(beyond).masked_fill_(beyond, nobody)
    return rows.values.index_select(0, at).view(*beyond.shape, -1), owners


def _filled_up(lengths: Tensor) -> Tensor:
    """Every length raised to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few different ones, a fifth more in all."""
    mantissa, exponent = torch.frexp(lengths.double())  # mantissa in [1/2, 1)
    step = torch.where(mantissa == 0.5, 0.5, torch.where(mantissa <= 0.75, 0.75, 1.0))
    return torch.ldexp(step, exponent).ceil().long()
