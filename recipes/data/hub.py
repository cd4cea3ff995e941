"""Labelled texts of the Hugging Face hub, or of any files its `datasets` package reads (extra `[hf]`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.data.corpus import Corpus, Text, subsample


@dataclass(frozen=True)
class HubTexts:
    """A data set by its name on the hub, such as ``ag_news`` or ``nyu-mll/glue``.

    Args:
        name: what ``load_dataset`` is asked for; a file format (``csv``, ``json``) goes with ``data_files``.
        configuration: the set's configuration, such as ``sst2`` of GLUE.
        text: column of the text.
        text_pair: column of the second text of a pair task.
        label: column of the class, an integer or a name.
        train_split: split to train on.
        test_split: split that is held out, with labels (GLUE's ``test`` has none, its ``validation`` has).
        data_files: local files by split, for sets that are not on the hub.
        train_size: train on this many texts, chosen by hash; None takes all of them.
        test_size: the same for the held-out texts.
    """

    name: str
    configuration: str | None = None
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    train_split: str = "train"
    test_split: str = "test"
    data_files: Mapping[str, str] | None = None
    train_size: int | None = None
    test_size: int | None = None

    def load(self) -> Corpus:
        """Download the set (once, into the hub's own cache) and return it."""
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ModuleNotFoundError(
                f"The data set {self.name!r} is read by the package `datasets`, which is not installed. "
                "HINT: pip install 'lightning-influence[hf]'"
            ) from error
        files = dict(self.data_files) if self.data_files else None
        splits = load_dataset(self.name, self.configuration, data_files=files)
        for split in (self.train_split, self.test_split):
            if split not in splits:
                raise ValueError(f"Expected a split {split!r} of {self.name!r}, found {sorted(splits)}.")
        train, test = splits[self.train_split], splits[self.test_split]
        for column in filter(None, (self.text, self.text_pair, self.label)):
            if column not in train.column_names:
                raise ValueError(f"Expected a column {column!r} in {self.name!r}, found {train.column_names}.")
        names: list[str] | None = getattr(train.features[self.label], "names", None)
        if names is None:
            values = sorted({*train[self.label], *test[self.label]})
            number_of = {value: number for number, value in enumerate(values)}
            names = [str(value) for value in values]
        else:
            number_of = {number: number for number in range(len(names))}
        train_texts, train_labels = subsample(*self._rows(train, number_of), self.train_size, "train")
        test_texts, test_labels = subsample(*self._rows(test, number_of), self.test_size, "test")
        return Corpus(
            label_names=tuple(names),
            train_texts=tuple(train_texts),
            train_labels=tuple(train_labels),
            test_texts=tuple(test_texts),
            test_labels=tuple(test_labels),
        )

    def _rows(self, split: Any, number_of: Mapping[Any, int]) -> tuple[list[Text], list[int]]:
        labels = list(split[self.label])
        unlabelled = sum(label not in number_of for label in labels)
        if unlabelled:
            raise ValueError(
                f"Expected a label for every text of {self.name!r}, found {unlabelled} without one. "
                "HINT: choose a labelled split with test_split=..."
            )
        texts: list[Text] = list(split[self.text])
        if self.text_pair is not None:
            texts = list(zip(split[self.text], split[self.text_pair], strict=True))
        return texts, [number_of[label] for label in labels]
