"""A corpus of a few words for whole runs of recipes, there at once; the standard library's docstrings take seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipes.data.corpus import Corpus

_WORDS = ("good", "bad", "film", "the", "a", "plot", "dull", "fine")


@dataclass(frozen=True)
class FewTexts:
    """Texts of one to eight words, in the class "yes" with "good" or "fine" in them.

    Args:
        train: number of training texts.
        test: number of held-out texts.
    """

    train: int = 40
    test: int = 12

    def load(self) -> Corpus:
        draw = torch.Generator().manual_seed(0)

        def texts(count: int) -> tuple[str, ...]:
            lengths = torch.randint(1, 9, (count,), generator=draw).tolist()
            return tuple(" ".join(_WORDS[i] for i in torch.randint(8, (n,), generator=draw).tolist()) for n in lengths)

        train, test = texts(self.train), texts(self.test)
        labels = [tuple(int("good" in text or "fine" in text) for text in part) for part in (train, test)]
        return Corpus(("no", "yes"), train, labels[0], test, labels[1])
