"""An answer as people read it: the query's text, its proponents and opponents, and the words that carry each score."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lightning_influence.errors import QueryError
from lightning_influence.module import InfluenceModule
from lightning_influence.queries import Decoders, WordContribution


@dataclass(frozen=True)
class Description:
    """A sample in words: its text and a short note, such as its label."""

    text: str
    note: str = ""


Describe: TypeAlias = Callable[[int], Description | str]

_COMPOUND = re.compile(r"\w+(?:['’-]\w+)*|\s+|[^\w\s]")
_SIMPLE = re.compile(r"\w+|\s+|[^\w\s]")
_LEAST_SHOWN = 0.02  # of the largest contribution


@dataclass(frozen=True)
class Evidence:
    """One training sample that speaks for or against a prediction.

    Attributes:
        sample_id: position in the training set.
        score: positive for a proponent.
        sample: its text and note.
        words: contributions of the words it shares with the query, largest first; empty where scores have no words.
    """

    sample_id: int
    score: float
    sample: Description
    words: tuple[WordContribution, ...]

    def weights(self) -> dict[str, float]:
        """Contribution by word of the sample, in lower case, summed over embedding weights."""
        return _summed((c.sample_word, c.score) for c in self.words)


@dataclass(frozen=True)
class Explanation:
    """A query with its strongest proponents and opponents."""

    query: Description
    proponents: tuple[Evidence, ...]
    opponents: tuple[Evidence, ...]

    def weights(self) -> dict[str, float]:
        """Contribution by word of the query, in lower case, summed over the evidence shown."""
        evidence = (*self.proponents, *self.opponents)
        return _summed((c.word, c.score) for e in evidence for c in e.words)


def explain(
    influence: InfluenceModule,
    batch: Any,
    *,
    queries: Sequence[Description | str],
    describe: Describe,
    decode: Decoders = None,
    k: int = 3,
) -> list[Explanation]:
    """Ask `influence` about a batch and put the answer into words.

    Args:
        queries: what each query of the batch says.
        describe: training sample id -> its text (and note).
        decode: token id -> text, as in `InfluenceModule.words`; without it no words are shown.
        k: proponents and opponents shown.

    Raises:
        QueryError: as `InfluenceModule.query`; not one text for each query; with `decode`, scores without words.
    """
    if len(queries) != (asked := len(attribution := influence.query(batch, k=k))):
        raise QueryError(
            "every query needs its text",
            expected=f"{asked} texts, as many as the batch has queries",
            found=f"{len(queries)} texts",
            hint="pass queries=[what the first query says, ...]",
        )
    sides = (attribution.proponents, attribution.opponents)
    ids = torch.cat([side.sample_ids for side in sides], 1)  # (Q, 2 k)
    scores = torch.cat([side.scores for side in sides], 1)
    words = [[()] * ids.shape[1]] * asked if decode is None else influence.words(batch, ids, decode)
    found = []
    for query, *row in zip(queries, ids.tolist(), scores.tolist(), words, strict=True):
        evidence = [Evidence(i, s, _described(describe(i)), tuple(w)) for i, s, w in zip(*row, strict=True)]
        found.append(Explanation(_described(query), tuple(evidence[:k]), tuple(evidence[k:])))
    return found


def _summed(parts: Iterable[tuple[str | None, float]]) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for word, score in parts:
        if word is not None:  # words of a weight that has no vocabulary stay out of the texts
            totals[word.lower()] += score
    return dict(totals)


def _described(value: Description | str) -> Description:
    return value if isinstance(value, Description) else Description(value)


def signed(score: float) -> str:
    """A score with its sign and three digits, without an exponent where people can do without.

    >>> signed(943.2), signed(-2071.0), signed(0.01234), signed(-3.2e-7), signed(0.0)
    ('+943', '-2,070', '+0.0123', '-3.2e-07', '+0')
    """
    if score == 0 or not 1e-4 <= abs(score) < 1e7:
        return f"{score:+.2g}"
    digits = 2 - math.floor(math.log10(abs(score)))
    return f"{round(score, digits):+,.{max(0, digits)}f}"


def pieces(text: str, weights: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """The text cut into words and what stands between them, each with its contribution (0 for the rest).

    A compound without a contribution of its own is cut at its hyphens and apostrophes.

    >>> list(pieces("It's tuple-like.", {"tuple": 0.5, "it's": -1.0}))
    [("It's", -1.0), (' ', 0.0), ('tuple', 0.5), ('-', 0.0), ('like', 0.0), ('.', 0.0)]
    """
    for compound in _COMPOUND.findall(text):
        for piece in [compound] if compound.lower() in weights else _SIMPLE.findall(compound):
            yield piece, weights.get(piece.lower(), 0.0)


def strength(weight: float, weights: Mapping[str, float]) -> float:
    """How strongly to shade a word, from -1 (all against) to 1 (all for); 0 for what is too little to show.

    >>> strength(-0.5, {"tuple": 1.0, "the": -0.5}), strength(0.001, {"tuple": 1.0})
    (-0.5, 0.0)
    """
    top = max((abs(w) for w in weights.values()), default=0.0)
    part = weight / top if top else 0.0
    return part if abs(part) > _LEAST_SHOWN else 0.0
