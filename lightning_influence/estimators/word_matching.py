"""Which words of a query meet which words of a sample: equal ones, and near-synonyms one to one (TracIn-WE-Syn)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.gradients import Rows, accumulation_dtype

_CANDIDATES = 1 << 18  # pairs of rows that are matched at a time


@dataclass(frozen=True)
class Matches:
    """Pairs of words that meet, M of them: a word of a query with a word of a sample, and what the pair contributes.

    Attributes:
        queries, samples: (M,) positions.
        query_words, sample_words: (M,) word ids, equal for exact matches.
        contributions: (M,), the product of the two rows.
    """

    queries: Tensor
    samples: Tensor
    query_words: Tensor
    sample_words: Tensor
    contributions: Tensor

    @classmethod
    def of(cls, query: Rows, left: Tensor, train: Rows, right: Tensor) -> Matches:
        """The rows `left` (M,) of a query block met by the rows `right` (M,) of a training block."""
        kind = accumulation_dtype(query.values, train.values)
        products = (query.values[left].to(kind) * train.values[right].to(query.device, kind)).sum(1)
        return cls(query.owners[left], train.owners[right], query.words[left], train.words[right], products)


def matches_of_pairs(query: Rows, train: Rows) -> Iterator[Matches]:
    """All words that meet between query i and sample i, for every i of two blocks with equally many samples.

    The contributions of a pair add up to what `train.inner(query)` holds on its diagonal.
    """
    keys, wanted = _keys(train), _keys(query)
    left = torch.isin(wanted, keys, assume_unique=True).nonzero().squeeze(1)
    yield Matches.of(query, left, train, torch.searchsorted(keys, wanted[left]))
    if isinstance(query, SynonymRows):
        left, near, cosine = query.near()
        there = near * train.num_samples + query.owners[left]
        present = _contains(keys, there)
        yield query.matched(train, left[present], torch.searchsorted(keys, there[present]), cosine[present])


class Neighbours:
    """The near-synonyms of a vocabulary, found word by word and remembered.

    Args:
        embedding: (V, D).
        threshold: the least cosine of two near-synonyms.
    """

    def __init__(self, embedding: Tensor, threshold: float) -> None:
        self._directions = torch.nn.functional.normalize(embedding.to(accumulation_dtype(embedding)), dim=1)
        self._threshold = threshold
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(counts (W,), neighbours (P,), cosines (P,)): for each word its near-synonyms, ascending, one list after the
        other."""
        lists = [self._one(word) for word in words.tolist()]
        if not lists:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none, self._directions.new_zeros(0)
        counts = torch.tensor([len(near) for near, _ in lists])
        return counts, torch.cat([near for near, _ in lists]), torch.cat([cosine for _, cosine in lists])

    def _one(self, word: int) -> tuple[Tensor, Tensor]:
        # One word at a time: its cosines, and with them ties and the threshold, do not depend on the other words.
        if word not in self._known:
            cosine = self._directions @ self._directions[word]  # (V,)
            cosine[word] = -1.0
            near = (cosine >= self._threshold).nonzero().squeeze(1)
            self._known[word] = near, cosine[near]
        return self._known[word]


class SynonymRows(Rows):
    """Rows of queries whose words match equal words first and then, one to one, the closest free near-synonym.

        score(q, z) = sum over matched pairs (w, w') of g(q, w) . g(z, w')

    A word meets at most one word. Exact matches come first; the others are taken by falling cosine of the embeddings,
    down to the threshold; of equal cosines the lower word ids first (Yeh et al. 2022, arXiv:2202.11844, TracIn-WE-Syn).
    """

    neighbours: Neighbours

    @classmethod
    def of(cls, rows: Rows, neighbours: Neighbours) -> SynonymRows:
        """`rows` whose words also meet their near-synonyms."""
        found = cls(rows.words, rows.owners, rows.values, rows.num_samples, rows.num_words)
        found.neighbours = neighbours
        return found

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SynonymRows:
        """The rows elsewhere or in another floating type."""
        return SynonymRows.of(super().to(device, dtype), self.neighbours)

    def scaled(self, weights: Tensor) -> SynonymRows:
        """Every query's gradient times its weight, (Q,)."""
        return SynonymRows.of(super().scaled(weights), self.neighbours)

    def multiplied(self, factor: Tensor) -> SynonymRows:
        """Every row times the row of `factor` (V, D)."""
        return SynonymRows.of(super().multiplied(factor), self.neighbours)

    def select(self, index: Tensor) -> SynonymRows:
        """The queries at `index`."""
        return SynonymRows.of(super().select(index), self.neighbours)

    def against_rows(self, train: Rows) -> Tensor:
        """Scores (Q, N): exact matches by posting lists, then the synonyms, some queries at a time."""
        total = Rows(self.words, self.owners, self.values, self.num_samples, self.num_words).against_rows(train)
        rows, near, _ = self.near()
        starts, counts = _posting_list(train, near)
        load = torch.zeros(self.num_samples, dtype=torch.int64, device=self.device)
        load.index_add_(0, self.owners[rows], counts)
        _, sizes = torch.unique_consecutive(load.cumsum(0) // _CANDIDATES, return_counts=True)
        for queries in torch.split(torch.arange(self.num_samples), sizes.tolist()):
            part = self.select(queries)
            left, near, cosine = part.near()
            starts, counts = _posting_list(train, near)
            which, right = ragged(starts, counts)
            found = part.matched(train, left[which], right, cosine[which])
            cells = (queries.to(self.device)[found.queries], found.samples)
            total.index_put_(cells, found.contributions.to(total.dtype), accumulate=True)
        return total

    def near(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, near-synonym of the row's word, cosine), each (E,), for all rows."""
        words, starts = self.postings
        counts, near, cosine = (part.to(self.device) for part in self.neighbours.of(words))
        first = counts.cumsum(0) - counts
        word = torch.repeat_interleave(torch.arange(len(words), device=self.device), starts.diff())  # (M,) of every row
        rows, places = ragged(first[word], counts[word])
        return rows, near[places], cosine[places]

    def matched(self, train: Rows, left: Tensor, right: Tensor, cosine: Tensor) -> Matches:
        """One-to-one matches among candidates (row of a query, row of a sample): those whose words have no exact match
        in the other text, the closest first."""
        q, n = self.owners[left], train.owners[right]
        w, v = self.words[left], train.words[right]
        free = ~_contains(_keys(train), w * train.num_samples + n) & ~_contains(_keys(self), v * self.num_samples + q)
        left, right, q, n, cosine = (part[free] for part in (left, right, q, n, cosine))
        kept = _one_to_one(left * train.num_samples + n, right * self.num_samples + q, cosine)
        return Matches.of(self, left[kept], train, right[kept])


def _keys(rows: Rows) -> Tensor:
    """(M,) ascending: word and owner of every row as one number."""
    return rows.words * max(1, rows.num_samples) + rows.owners


def _contains(keys: Tensor, wanted: Tensor) -> Tensor:
    """Which of the wanted are among the keys, which ascend."""
    if not len(keys):
        return torch.zeros_like(wanted, dtype=torch.bool)
    return keys[torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)] == wanted


def _posting_list(rows: Rows, words: Tensor) -> tuple[Tensor, Tensor]:
    """(first row, number of rows) of each of the words; 0 rows for words that do not occur."""
    starts = torch.searchsorted(rows.words, words)
    return starts, torch.searchsorted(rows.words, words, right=True) - starts


def ragged(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """(which list, position) of all entries of lists that begin at `starts` and are `counts` long, in order."""
    which = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    offsets = torch.arange(len(which), device=counts.device) - (counts.cumsum(0) - counts)[which]
    return which, starts[which] + offsets


def _one_to_one(left: Tensor, right: Tensor, cosine: Tensor) -> Tensor:
    """Indices of the candidates kept: greedy by falling cosine, then by place, no `left` and no `right` (E,) twice.

    A candidate that is the first of all that share its left or its right is what the greedy choice takes sooner or
    later; taking all such at once and striking out their rivals gives the same matching in a few rounds.
    """
    order = torch.argsort(cosine, descending=True, stable=True)
    left, right = left[order], right[order]
    kept = []
    while len(order):
        place = torch.arange(len(order), device=order.device)
        (first_left, by_left), (first_right, by_right) = _first(left, place), _first(right, place)
        taken = (first_left[by_left] == place) & (first_right[by_right] == place)
        kept.append(order[taken])
        gone_left = torch.zeros_like(first_left, dtype=torch.bool).index_fill_(0, by_left[taken], True)
        gone_right = torch.zeros_like(first_right, dtype=torch.bool).index_fill_(0, by_right[taken], True)
        alive = ~gone_left[by_left] & ~gone_right[by_right]
        order, left, right = order[alive], left[alive], right[alive]
    return torch.cat(kept).sort().values if kept else order


def _first(keys: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """(first place of each distinct key, which distinct key every entry has)."""
    unique, group = torch.unique(keys, return_inverse=True)
    first = torch.full((len(unique),), len(keys), device=keys.device)
    return first.scatter_reduce_(0, group, place, "amin"), group
