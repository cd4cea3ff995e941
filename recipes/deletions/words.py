"""Words deleted instead of texts: the word of a training text that pushed a prediction is taken out of that text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence import TracInWE
from recipes.data.vocabulary import PADDING, SEPARATOR, UNKNOWN
from recipes.deletions.deleting import Deletions, Truths, replace_texts
from recipes.deletions.fitting import Explained
from recipes.truths.retraining import Samples

_CANDIDATES = 500  # texts at either end of a ranking whose words are looked at


@dataclass(frozen=True)
class Word:
    """A word of a training text and its share of the text's score."""

    text: int
    token: int
    score: float


def delete_words(fit: Explained, count: int, sizes: Sequence[int], truths: Truths) -> dict[str, Deletions]:
    """Train again without the first words of TracIn-WE, and without as many other words of the same texts.

    Args:
        count: of the first questions.
        sizes: numbers of deleted words, K of them.
    """
    train = fit.set_up.texts.train
    draw = torch.Generator().manual_seed(fit.seed)
    edited: list[Tensor] = []
    labels: list[int] = []
    replaced: list[dict[int, int]] = []
    for words in _ranked(fit, count):
        for k in sizes:
            for chosen in (words[:k], words[-k:]):
                for taken in (chosen, _others(chosen, train, draw)):
                    of_model: dict[int, int] = {}
                    for text in dict.fromkeys(word.text for word in taken):
                        of_model[text] = len(edited)
                        edited.append(_without(train.inputs[text], [w.token for w in taken if w.text == text]))
                        labels.append(int(train.labels[text]))
                    replaced.append(of_model)
    whose = [query for query in range(count) for _ in range(4 * len(sizes))]
    texts = Samples(torch.stack(edited), torch.tensor(labels), padding=train.padding)
    before, after = replace_texts(fit, texts, replaced, whose, truths)
    parts = after.view(count, len(sizes), 2, 2)  # query, number, proponents or opponents, chosen or others
    return {
        name: Deletions(before[:count], parts[:, :, 0, kind], parts[:, :, 1, kind])
        for kind, name in enumerate(("words by TracIn-WE", "other words of the same texts"))
    }


def _ranked(fit: Explained, count: int) -> list[list[Word]]:
    """For each question, words from the one that pushed most to the one that resisted most, among the texts at either
    end of the ranking."""
    influence = fit.ask("ends", TracInWE())
    batch = fit.batch(count)
    order = influence.scores(batch).argsort(dim=1, descending=True)
    half = min(_CANDIDATES, order.shape[1] // 2)
    ids = torch.cat([order[:, :half], order[:, -half:]], 1)
    found = []
    for texts, row in zip(ids.tolist(), influence.words(batch, ids), strict=True):
        words = [
            Word(text, token, word.score)
            for text, of_text in zip(texts, row, strict=True)
            for word in of_text
            for token in word.sample_tokens
            if token > SEPARATOR  # the ids below words are no words
        ]
        found.append(sorted(words, key=lambda word: -word.score))
    return found


def _others(chosen: Sequence[Word], train: Samples, draw: torch.Generator) -> list[Word]:
    """As many words of the same texts, others where a text has others, at random."""
    found = []
    for text in dict.fromkeys(word.text for word in chosen):
        own = [word.token for word in chosen if word.text == text]
        known = torch.unique(train.inputs[text])
        rest = [token for token in known[known > SEPARATOR].tolist() if token not in own]
        for place in torch.randperm(len(rest), generator=draw)[: len(own)].tolist():
            found.append(Word(text, rest[place], 0.0))
    return found


def _without(tokens: Tensor, taken: Sequence[int]) -> Tensor:
    """A text without some words, the others moved up; a text that has no other word says an unknown one."""
    kept = tokens[(tokens != PADDING) & ~torch.isin(tokens, torch.tensor(list(taken)))]
    text = torch.full_like(tokens, PADDING)
    text[0] = UNKNOWN
    text[: len(kept)] = kept
    return text
