"""Labelled texts from a folder of gzipped tables: AG News, SST-2, Jigsaw toxicity, SNLI, or one's own."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path

from recipes.data.corpus import Corpus, Text, subsample


@dataclass(frozen=True)
class TextTable:
    """A data set under ``<data_root>/<name>/``: ``labels.txt``, ``train*.csv.gz`` and ``test*.csv.gz``.

    The tables are utf-8 with the columns ``text,label``, for pairs of texts ``text,text_pair,label``; the
    name of label i is line i of ``labels.txt``. Nothing is written there.

    Args:
        name: folder of the set, such as ``ag_news``, ``sst2``, ``jigsaw_toxicity`` or ``snli``.
        data_root: folder that holds the sets; it has no default because the library carries no data.
        train_size: train on this many texts, chosen by hash; None takes all of them.
        test_size: the same for the held-out texts.
    """

    name: str
    data_root: str | None = None
    train_size: int | None = None
    test_size: int | None = None

    def load(self) -> Corpus:
        """Read both tables."""
        if self.data_root is None:
            raise ValueError(
                f"The data set {self.name!r} needs a data root, found none. "
                "HINT: name the folder that holds the sets, for example data.source.data_root=/path/to/data."
            )
        folder = Path(self.data_root).expanduser() / self.name
        if not folder.is_dir():
            root = folder.parent
            there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else "no such folder"
            raise FileNotFoundError(f"Expected the data set {self.name!r} in {folder}, found in {root}: {there}.")
        names = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
        train_texts, train_labels = subsample(*_read(folder, "train"), self.train_size, "train")
        test_texts, test_labels = subsample(*_read(folder, "test"), self.test_size, "test")
        return Corpus(
            label_names=tuple(name for name in names if name),
            train_texts=tuple(train_texts),
            train_labels=tuple(train_labels),
            test_texts=tuple(test_texts),
            test_labels=tuple(test_labels),
        )


def _read(folder: Path, split: str) -> tuple[list[Text], list[int]]:
    path = folder / f"{split}.csv.gz"
    if not path.is_file():
        candidates = sorted(folder.glob(f"{split}*.csv.gz"))
        if len(candidates) != 1:
            found = [candidate.name for candidate in candidates] or "none"
            raise FileNotFoundError(f"Expected {path} or one other table {split}*.csv.gz beside it, found {found}.")
        path = candidates[0]
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        columns = set(rows.fieldnames or ())
        if not {"text", "label"} <= columns:
            raise ValueError(f"Expected the columns text and label in {path}, found {sorted(columns)}.")
        texts: list[Text] = []
        labels: list[int] = []
        for row in rows:
            texts.append((row["text"], row["text_pair"]) if "text_pair" in columns else row["text"])
            labels.append(int(row["label"]))
    return texts, labels
