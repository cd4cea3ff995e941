"""Plain text without labels, cut into passages: what a language model is pretrained on."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from recipes.data.corpus import TextSource


class PassageSource(Protocol):
    """Anything that has passages of text."""

    def load(self) -> list[str]:
        """The passages; the same call on the same data returns the same ones, in the same order."""
        ...


@dataclass(frozen=True)
class LinesOfText:
    """The lines of a gzipped text file below a data root, each a passage.

    Args:
        name: the file, such as ``lm_corpora/imdb_unsup_6k.txt.gz``.
        data_root: folder that holds it; it has no default because the library carries no data.
        size: take the first lines; None takes all.
        least_words: leave shorter lines out, such as headings and empty ones.
    """

    name: str
    data_root: str | None = None
    size: int | None = None
    least_words: int = 8

    def load(self) -> list[str]:
        """Read the file."""
        if self.data_root is None:
            raise ValueError(
                f"The text {self.name!r} needs a data root, found none. HINT: data_root=/path/to/data names the folder."
            )
        path = Path(self.data_root).expanduser() / self.name
        if not path.is_file():
            raise FileNotFoundError(f"Expected the text in {path}, found no such file. HINT: look at data_root.")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [line.strip() for line in file]
        return [line for line in lines if len(line.split()) >= self.least_words][: self.size]


@dataclass(frozen=True)
class TextsOfCorpus:
    """The training texts of a labelled corpus, without their labels."""

    source: TextSource

    def load(self) -> list[str]:
        """Its texts; of pairs, both."""
        return [text if isinstance(text, str) else " ".join(text) for text in self.source.load().train_texts]
