"""Words, ids, padded batches, and the data module that hands them out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.data import Corpus, Text, TextDataModule, Vocabulary
from recipes.data.vocabulary import PADDING, SEPARATOR, UNKNOWN, tokenize


@dataclass
class Fixed:
    """A source that returns the corpus it was given."""

    corpus: Corpus

    def load(self) -> Corpus:
        return self.corpus


def corpus(texts: tuple[Text, ...] = ("a b c", "b c", "c", "c d")) -> Corpus:
    labels = tuple(position % 2 for position in range(len(texts)))
    return Corpus(("even", "odd"), texts, labels, ("b unseen", ""), (0, 1))


class TestVocabulary:
    def test_most_frequent_first_then_alphabetical(self) -> None:
        vocabulary = Vocabulary.build(["b a c", "c", ("c d", "d")])
        assert vocabulary.words == ("[PAD]", "[UNK]", "[SEP]", "c", "d", "a", "b")
        assert len(vocabulary) == 7

    def test_size_and_min_count(self) -> None:
        texts = ["a a a b b c"]
        assert Vocabulary.build(texts, size=5).words[3:] == ("a", "b")
        assert Vocabulary.build(texts, min_count=3).words[3:] == ("a",)
        assert len(Vocabulary.build(texts, size=0)) == 3

    def test_encode_and_decode(self) -> None:
        vocabulary = Vocabulary(["open", "file"])
        ids = vocabulary.encode("Open the FILE!")
        assert ids == [3, UNKNOWN, 4, UNKNOWN]
        assert [vocabulary.decode(token) for token in ids] == ["open", "[UNK]", "file", "[UNK]"]
        assert vocabulary.decode(PADDING) == "[PAD]"
        for wrong in (-1, 5):
            with pytest.raises(IndexError, match=r"in 0\.\.4"):
                vocabulary.decode(wrong)

    def test_no_text_is_empty(self) -> None:
        assert Vocabulary([]).encode("") == [UNKNOWN]
        assert Vocabulary([]).encode("...") == [UNKNOWN]
        assert Vocabulary([]).encode(("", "")) == [SEPARATOR]

    def test_repeated_words_are_refused(self) -> None:
        with pytest.raises(ValueError, match="once"):
            Vocabulary(["a", "a"])
        with pytest.raises(ValueError, match="once"):
            Vocabulary(["[PAD]"])

    def test_tokenize(self) -> None:
        assert tokenize("It's 2 o’clock, isn't it?") == ["it's", "2", "o’clock", "isn't", "it", "?"]

    @given(st.integers(0, 12), st.integers(0, 12), st.integers(1, 12))
    def test_pairs_are_cut_where_they_are_longer(self, first: int, second: int, room: int) -> None:
        vocabulary = Vocabulary(["a", "b"])
        ids = vocabulary.encode((" ".join("a" * first), " ".join("b" * second)), max_tokens=room + 1)
        kept_first, kept_second = ids.count(3), ids.count(4)
        assert ids == [3] * kept_first + [SEPARATOR] + [4] * kept_second
        assert kept_first + kept_second == min(first + second, room)
        if kept_first < first and kept_second < second:
            assert abs(kept_first - kept_second) <= 1
        elif kept_first < first:
            assert kept_first >= kept_second - 1
        elif kept_second < second:
            assert kept_second >= kept_first - 1

    @given(st.text(), st.integers(1, 5))
    def test_any_text_is_encoded(self, text: str, max_tokens: int) -> None:
        assert 1 <= len(Vocabulary([]).encode(text, max_tokens)) <= max_tokens


class TestTextDataModule:
    def test_batches_are_padded_to_their_own_longest_text(self) -> None:
        data = TextDataModule(Fixed(corpus()), batch_size=2)
        data.setup()
        for batch in data.train_dataloader():
            assert set(batch) == {"tokens", "label"}
            tokens, label = batch["tokens"], batch["label"]
            assert tokens.dtype == label.dtype == torch.int64
            assert tokens.shape == (2, int((tokens != PADDING).sum(1).max())) and label.shape == (2,)
        [test] = data.test_dataloader()
        assert test["tokens"].tolist() == [data.vocabulary.encode("b unseen"), [UNKNOWN, PADDING]]
        assert test["label"].tolist() == [0, 1]

    def test_the_vocabulary_knows_training_words_only(self) -> None:
        data = TextDataModule(Fixed(corpus()))
        data.setup()
        assert data.vocabulary.words[3:] == ("c", "b", "a", "d")

    def test_attributes(self) -> None:
        data = TextDataModule(Fixed(corpus()), flip_fraction=0.5, seed=3)
        data.setup()
        assert data.train_texts == corpus().train_texts and data.test_texts == corpus().test_texts
        assert data.label_names == ("even", "odd")
        assert sum(data.flipped) == 2 and len(data.flipped) == 4
        assert data.original_train_labels == corpus().train_labels
        assert data.train_labels == corpus().with_flipped_labels(0.5, seed=3).train_labels
        assert data.test_labels == corpus().test_labels
        dataset = data.train_dataloader().dataset
        assert [int(dataset[position]["label"]) for position in range(4)] == list(data.train_labels)

    def test_texts_are_loaded_once(self) -> None:
        class Counting(Fixed):
            calls = 0

            def load(self) -> Corpus:
                self.calls += 1
                return super().load()

        source = Counting(corpus())
        data = TextDataModule(source)
        with pytest.raises(RuntimeError, match=r"setup\(\) first"):
            _ = data.vocabulary
        for stage in ("fit", "test", "predict"):
            data.setup(stage)
        assert source.calls == 1

    def test_long_texts_and_pairs(self) -> None:
        data = TextDataModule(Fixed(corpus((("a b c d", "e"), ("a", "b")))), max_tokens=4, batch_size=2)
        data.setup()
        lengths = sorted(int((row != PADDING).sum()) for batch in data.train_dataloader() for row in batch["tokens"])
        assert lengths == [3, 4]

    def test_worker_processes(self) -> None:
        data = TextDataModule(Fixed(corpus()), batch_size=3, num_workers=1)
        data.setup()
        assert sum(len(batch["label"]) for batch in data.predict_dataloader()) == 2
