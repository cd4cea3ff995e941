"""An explanation that no fit gave, with everything that is awkward to show."""

from __future__ import annotations

from lightning_influence.queries.words import WordContribution
from lightning_influence.report import Description, Evidence, Explanation

LONG = (
    "Return a new subclass of tuple named typename, which costs $5 or $10 and is used to create tuple-like objects "
    "that have fields accessible by attribute lookup as well as being indexable and iterable; instances of the "
    "subclass also have a helpful docstring, see https://example.org/" + "without_any_space_" * 12
)


def word(text: str, score: float, other: str | None = None, parameter: str = "words.weight") -> WordContribution:
    return WordContribution(parameter, (3,), (4 if other else 3,), text, other or text, score)


def evidence(sample_id: int, score: float, text: str, *words: WordContribution, note: str = "") -> Evidence:
    return Evidence(sample_id, score, Description(text, note), words)


def explanation() -> Explanation:
    return Explanation(
        Description("Create a named tuple; a café costs $3 or $4 — 中文 <b>text</b>", "predicted: collections"),
        (
            evidence(12, 1.25, LONG, word("tuple", 0.75), word("create", 0.5), note="collections"),
            evidence(4711, 0.5, "The NAMED fields & more.", word("named", 0.25), word("tuple", 0.25, "fields")),
            evidence(3, 3.4e-05, "no shared word"),
        ),
        (evidence(99, -1.0, "A tuple of $bytes$ is given.", word("a", -0.75), word("tuple", -0.25), note="x" * 90),),
    )
