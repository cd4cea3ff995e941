"""Labelled texts, split into train and test, and the training labels that were flipped on purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

Text = str | tuple[str, str]  # one text, or the two texts of a pair task


class TextSource(Protocol):
    """Anything that can produce a corpus: the standard library's docstrings, a folder of tables, the hub."""

    def load(self) -> Corpus:
        """Return the corpus; the same call on the same data returns the same corpus, in the same order."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Texts and labels of a training and a test set.

    ``train_labels`` are the labels that a model is trained on. Where some were flipped on purpose,
    ``flipped[i]`` is True and ``original_train_labels[i]`` is what stood there before.
    """

    label_names: tuple[str, ...]
    train_texts: tuple[Text, ...]
    train_labels: tuple[int, ...]
    test_texts: tuple[Text, ...]
    test_labels: tuple[int, ...]
    flipped: tuple[bool, ...] = ()
    original_train_labels: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "flipped", self.flipped or (False,) * len(self.train_texts))
        object.__setattr__(self, "original_train_labels", self.original_train_labels or self.train_labels)
        for texts, labels in (
            (self.train_texts, self.train_labels),
            (self.test_texts, self.test_labels),
            (self.train_texts, self.flipped),
            (self.train_texts, self.original_train_labels),
        ):
            if len(texts) != len(labels):
                raise ValueError(f"A corpus needs one label a text: expected {len(texts)}, found {len(labels)}.")
        for label in (*self.train_labels, *self.test_labels):
            if not 0 <= label < len(self.label_names):
                raise ValueError(f"Expected labels in 0..{len(self.label_names) - 1}, found {label}.")

    def with_flipped_labels(self, fraction: float, seed: int = 0) -> Corpus:
        """Return a corpus in which ``round(fraction * N)`` training labels were replaced by another class.

        Which ones, and by which class, depends on the text and the seed alone: reordering the corpus flips
        the same texts, and a few texts more or less (another Python version) leave nearly all flips alone.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"Expected a fraction of labels between 0 and 1, found {fraction}.")
        if any(self.flipped):
            raise ValueError("The labels of this corpus are flipped already. HINT: start from the original corpus.")
        count = round(fraction * len(self.train_texts))
        if count and len(self.label_names) < 2:
            raise ValueError("A label can be flipped only where there are two classes or more, found one.")
        keys = [stable_hash(text, f"flip-{seed}") for text in self.train_texts]
        chosen = set(sorted(range(len(keys)), key=lambda position: (keys[position], position))[:count])
        labels = list(self.train_labels)
        for position in chosen:
            draw = stable_hash(self.train_texts[position], f"class-{seed}")
            shift = 1 + draw % (len(self.label_names) - 1)  # 1 .. C-1, so the class always changes
            labels[position] = (labels[position] + shift) % len(self.label_names)
        return replace(
            self,
            train_labels=tuple(labels),
            flipped=tuple(position in chosen for position in range(len(labels))),
            original_train_labels=self.train_labels,
        )


def in_one_line(text: Text) -> str:
    """A text as people and other tools read it; of a pair, both texts.

    >>> in_one_line(("A dog runs.", "It moves."))
    'A dog runs. / It moves.'
    """
    return text if isinstance(text, str) else " / ".join(text)


def stable_hash(text: Text, salt: str) -> int:
    """Return a 64-bit hash of a text that is the same on every machine and in every process."""
    content = text if isinstance(text, str) else "\0".join(text)
    return int.from_bytes(hashlib.sha256(f"{salt}\0{content}".encode()).digest()[:8], "big")


def subsample(
    texts: Sequence[Text], labels: Sequence[int], size: int | None, salt: str
) -> tuple[list[Text], list[int]]:
    """Keep ``size`` texts (all of them if None) chosen by hash, in their original order."""
    if size is None or size >= len(texts):
        return list(texts), list(labels)
    if size < 1:
        raise ValueError(f"Expected a sample of at least one text, found {size}.")
    ranked = sorted(range(len(texts)), key=lambda position: (stable_hash(texts[position], salt), position))
    kept = sorted(ranked[:size])
    return [texts[position] for position in kept], [labels[position] for position in kept]
