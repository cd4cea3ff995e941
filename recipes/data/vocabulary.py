"""Words and their numbers: a plain tokenizer and a vocabulary built from the training texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from recipes.data.corpus import Text

PADDING, UNKNOWN, SEPARATOR = 0, 1, 2

_WORD = re.compile(r"\w+(?:['’]\w+)*|[!?]")


def tokenize(text: str) -> list[str]:
    """Split a text into lower-case words; of the punctuation, ``!`` and ``?`` stay.

    >>> tokenize("Doesn't it return None?")
    ["doesn't", 'it', 'return', 'none', '?']
    """
    return _WORD.findall(text.lower())


class Vocabulary:
    """A fixed list of words: id 0 is padding, 1 an unknown word, 2 separates the two texts of a pair.

    >>> vocabulary = Vocabulary(["file", "open"])
    >>> vocabulary.encode("Open this file")
    [4, 1, 3]
    >>> vocabulary.decode(4)
    'open'
    """

    special = ("[PAD]", "[UNK]", "[SEP]")

    def __init__(self, words: Sequence[str]) -> None:
        self.words = (*self.special, *words)
        self._ids = {word: number for number, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError("Expected every word of a vocabulary once, found repeated words.")

    @classmethod
    def build(cls, texts: Iterable[Text], size: int | None = None, min_count: int = 1) -> Vocabulary:
        """Take the ``size`` most frequent words (special ones included) that occur ``min_count`` times.

        Words that occur equally often are ordered alphabetically, so the same texts give the same ids.
        """
        counts = Counter(
            word for text in texts for part in ((text,) if isinstance(text, str) else text) for word in tokenize(part)
        )
        ranked = sorted((word for word in counts if counts[word] >= min_count), key=lambda word: (-counts[word], word))
        return cls(ranked if size is None else ranked[: max(size - len(cls.special), 0)])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: Text, max_tokens: int | None = None) -> list[int]:
        """Return the ids of a text's words, at least one and at most ``max_tokens``.

        A pair becomes ``first [SEP] second``; where it is too long, the longer of the two is cut first.
        """
        if isinstance(text, str):
            ids = [self._ids.get(word, UNKNOWN) for word in tokenize(text)[:max_tokens]]
            return ids or [UNKNOWN]
        first, second = ([self._ids.get(word, UNKNOWN) for word in tokenize(part)] for part in text)
        if max_tokens is not None:
            room = max(max_tokens - 1, 0)  # one place is the separator's
            keep = min(len(second), max(room // 2, room - len(first)))
            first, second = first[: room - keep], second[:keep]
        return [*first, SEPARATOR, *second]

    def decode(self, token_id: int) -> str:
        """Return the word of an id."""
        if not 0 <= token_id < len(self.words):
            raise IndexError(f"Expected a token id in 0..{len(self.words) - 1}, found {token_id}.")
        return self.words[token_id]
