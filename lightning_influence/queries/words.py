"""Which words carry a score: the summands of TracIn-WE for a query and a training sample, as people read them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_influence.artifacts import UNBOUNDED
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Stage, Term, by_span, train_side
from lightning_influence.estimators.word_matching import matches_of_pairs, ragged
from lightning_influence.gradients import GradientBlock, Gradients, Rows

Decode: TypeAlias = Callable[[int], str]
Decoders: TypeAlias = Decode | Mapping[str, Decode] | None  # one for all, or by embedding weight
Meeting: TypeAlias = tuple[str, int, int]  # embedding weight, word of the query, word of the sample

_BEGINS = ("\u2581", "\u0120")  # sentence-piece and byte-level vocabularies mark the pieces that begin a word
_CONTINUES = "##"  # WordPiece marks those that continue one
_SPECIAL = re.compile(r"<[^<>]+>|\[[A-Z]+\]")
_PAIRS = 1024  # of a query and a record, taken at a time


@dataclass(frozen=True)
class WordContribution:
    """What one word shared by a query and a training sample contributes to their score.

    Attributes:
        parameter: full name of the embedding weight that the ids are rows of.
        tokens: token ids of the word in the query (several where subwords were merged).
        sample_tokens: ids of its counterparts in the sample: the tokens that are shared, or others for synonyms.
        word: as text, or None without `decode`, which takes an id to its piece as the vocabulary writes it
            (`tokenizer.convert_ids_to_tokens`; `tokenizer.decode` drops the marks that say what belongs together).
        sample_word: its counterpart as text, or None without `decode`; the same word unless it is a synonym.
        score: its summand; the summands of a pair add up to the pair's score.
    """

    parameter: str
    tokens: tuple[int, ...]
    sample_tokens: tuple[int, ...]
    word: str | None
    sample_word: str | None
    score: float


def word_contributions(
    terms: Sequence[Term], transformed: Sequence[Gradients], stage: Stage, sample_ids: Tensor
) -> list[list[dict[Meeting, float]]]:
    """For each query and each of its samples: (parameter, query word, sample word) -> contribution, summed over
    checkpoints.

    Args:
        transformed: T_c grad m of every term.
        sample_ids: (Q, k).

    Raises:
        QueryError: gradients that have no words; an id that the store does not hold.
    """
    k = sample_ids.shape[1]
    found: list[dict[Meeting, float]] = [defaultdict(float) for _ in range(sample_ids.numel())]
    if stage.projection is not None:
        raise QueryError(
            "the gradients of this store have no words",
            expected="word-embedding gradients as they were captured",
            found=f"gradients projected by {stage.projection} in {stage.store.root}",
            hint="fit with GradientSnapshot(store, 'word_embeddings') and no projection, and ask with TracInWE",
        )
    flat, length = sample_ids.flatten(), stage.store.manifest.dataset_length
    unknown = (flat < 0) | (flat >= length)
    streamed = length >= UNBOUNDED  # then only those that were seen are known
    unknown |= streamed
    for ids, shards in by_span(terms, stage.store):
        places = torch.isin(flat, ids).nonzero().squeeze(1)  # of the table, row by row
        if not len(places):
            continue
        if streamed:
            unknown[places] = False
        for index, shard in shards:
            train = train_side(terms[index], shard, ids)
            place, record = _meetings(places, flat[places], shard.sample_ids)
            for some in range(0, len(place), _PAIRS):
                p, r = place[some : some + _PAIRS], record[some : some + _PAIRS]
                weights = torch.ones(len(p)) if train.weights is None else train.weights[r]
                for name, block in transformed[index].items():
                    query, sample = _words(name, block), _words(name, train.gradients[name])
                    for matches in matches_of_pairs(query.select(p // k), sample.select(r)):
                        contributions = matches.contributions.cpu().double() * weights[matches.queries.cpu()]
                        columns = (p[matches.queries.cpu()], matches.query_words, matches.sample_words, contributions)
                        for at, w, v, score in zip(*(c.tolist() for c in columns), strict=True):
                            found[at][name, w, v] += score
    if bool(unknown.any()):
        raise QueryError(
            "the store does not hold these samples",
            expected="ids of training samples",
            found=sorted(set(flat[unknown].tolist()))[:5],
            hint="take the ids from an Attribution of the same store",
        )
    return [found[q * k : (q + 1) * k] for q in range(len(sample_ids))]


def _meetings(places: Tensor, wanted: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """(place, record), each (P,): every record of the samples `wanted` at these places, `held` (N,) being their ids."""
    order = torch.argsort(held, stable=True)
    first = torch.searchsorted(held[order], wanted)
    counts = torch.searchsorted(held[order], wanted, right=True) - first
    which, position = ragged(first, counts)
    return places[which], order[position]


def _words(name: str, block: GradientBlock) -> Rows:
    if not isinstance(block, Rows):
        raise QueryError(
            f"the gradients of '{name}' have no words",
            expected="word embeddings",
            found=type(block).__name__,
            hint="query with TracInWE; other estimators score whole samples",
        )
    return block


def readable(
    meetings: Mapping[Meeting, float], tokens: Mapping[str, Sequence[int]], decode: Decoders
) -> list[WordContribution]:
    """Contributions by word, the largest amounts first; subwords merged into the words of the query's text.

    A piece that stands in several words is shared out among them in equal parts, so that the sum stays the score. Words
    of different embedding weights are never merged.

    Args:
        meetings: (parameter, query word, sample word) -> contribution.
        tokens: parameter -> the query's token ids in order; pieces that are not among them stay words of their own.
        decode: token id -> text; or one for each parameter (words of the others stay ids).
    """
    found: list[WordContribution] = []
    for table in dict.fromkeys(name for name, _, _ in meetings):
        own = decode.get(table) if isinstance(decode, Mapping) else decode
        pairs = {(w, v): score for (name, w, v), score in meetings.items() if name == table}
        found += _of_table(table, pairs, tokens.get(table, ()), own)
    return sorted(found, key=lambda contribution: -abs(contribution.score))


def _of_table(
    parameter: str, pairs: Mapping[tuple[int, int], float], tokens: Sequence[int], decode: Decode | None
) -> Iterator[WordContribution]:
    homes: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for group in dict.fromkeys(merge_subwords(tokens, decode)) if decode is not None else ():
        for token in set(group):
            homes[token].append(group)
    totals: dict[tuple[int, ...], float] = defaultdict(float)
    counterparts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for (w, v), score in pairs.items():
        groups = homes.get(w, [(w,)])
        for group in groups:
            totals[group] += score / len(groups)
            counterparts[group].append(v)
    for group, score in totals.items():
        matched = set(counterparts[group])
        same = matched <= set(group)
        sample = tuple(t for t in group if t in matched) if same else tuple(dict.fromkeys(counterparts[group]))
        word = None if decode is None else spelled(group, decode)
        other = word if decode is None or same else spelled(sample, decode)
        yield WordContribution(parameter, group, sample, word, other, score)


def merge_subwords(tokens: Sequence[int], decode: Decode) -> list[tuple[int, ...]]:
    """Token ids of each word of a text.

    WordPiece marks pieces that continue ("##ing"), sentence-piece and byte-level vocabularies those that begin (with an
    underline or a dotted G), and there punctuation begins anew as well; without marks every token is a word. Special
    tokens ("[CLS]", "<s>") stand alone.
    """
    pieces = [decode(token) for token in tokens]
    marked = any(piece.startswith(_BEGINS) for piece in pieces)
    groups: list[list[int]] = []
    alone = True  # nothing may be joined to what came last
    for token, piece in zip(tokens, pieces, strict=True):
        special = _SPECIAL.fullmatch(piece) is not None
        inner = piece[:1].isalnum() and not piece.startswith(_BEGINS) if marked else piece.startswith(_CONTINUES)
        if inner and not special and not alone:
            groups[-1].append(token)
        else:
            groups.append([token])
        alone = special
    return [tuple(group) for group in groups]


def spelled(tokens: Sequence[int], decode: Decode) -> str:
    """A word as text, without the marks of its pieces."""
    pieces = [decode(token) for token in tokens]
    return "".join(piece.removeprefix(_CONTINUES).lstrip("".join(_BEGINS)) for piece in pieces) or "".join(pieces)
