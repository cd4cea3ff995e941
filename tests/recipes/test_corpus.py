"""The labelled texts: sentences of docstrings, tables, the hub, and labels flipped on purpose."""

from __future__ import annotations

import csv
import gzip
import itertools
import re
import sys
from pathlib import Path

import pytest

from recipes.data import Corpus, Docstrings, HubTexts, TextTable
from recipes.data.docstrings import AREAS, sentences


@pytest.fixture(scope="module")
def docstrings() -> Corpus:
    before = set(sys.modules)
    corpus = Docstrings().load()
    assert set(sys.modules) == before, "the sources are parsed, never imported"
    return corpus


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def small() -> Corpus:
    texts = tuple(f"the sentence number {number}" for number in range(200))
    labels = tuple(number % 3 for number in range(200))
    return Corpus(("a", "b", "c"), texts, labels, ("held out",), (0,))


class TestDocstrings:
    def test_sizes_and_classes(self, docstrings: Corpus) -> None:
        total = len(docstrings.train_texts) + len(docstrings.test_texts)
        assert total >= 5000
        assert docstrings.label_names == tuple(AREAS) and len(AREAS) >= 5
        for label in range(len(AREAS)):
            assert docstrings.train_labels.count(label) >= 300, AREAS
            assert docstrings.test_labels.count(label) >= 40
        assert 0.12 < len(docstrings.test_texts) / total < 0.18

    def test_texts_are_clean_and_unique(self, docstrings: Corpus) -> None:
        texts = [*docstrings.train_texts, *docstrings.test_texts]
        assert len({text.lower() for text in texts if isinstance(text, str)}) == len(texts)
        for text in texts:
            assert isinstance(text, str)
            assert text[0].isupper() and text[-1] in ".!?" and "\n" not in text and ">>>" not in text
            assert 7 <= len(re.findall("[A-Za-z]+", text)) <= 40

    def test_a_sentence_keeps_its_half_when_sources_change(self, tmp_path: Path) -> None:
        prose = [f"Return the {word} of the queue that was read from it." for word in "abcdefghijklmnopqrstuvwxyz"]
        (tmp_path / "queue.py").write_text('"""' + "\n\n".join(prose) + '"""')
        old = Docstrings(min_sentences=1, root=str(tmp_path)).load()
        assert Docstrings(min_sentences=1, root=str(tmp_path)).load() == old
        (tmp_path / "queue.py").write_text('"""' + "\n\n".join(reversed(prose[5:])) + '"""')
        new = Docstrings(min_sentences=1, root=str(tmp_path)).load()
        assert set(new.train_texts) < set(old.train_texts) and set(new.test_texts) <= set(old.test_texts)
        assert [text for text in old.train_texts if text in new.train_texts] == list(new.train_texts)

    def test_sentences_of_two_areas_tests_and_damaged_sources_are_left_out(self, tmp_path: Path) -> None:
        shared, own = "This one is the same in both of them.", "This one is in the queue and only there."
        (tmp_path / "queue.py").write_text(f'"""{shared} {own}"""')
        (tmp_path / "json" / "tests").mkdir(parents=True)
        (tmp_path / "json" / "__init__.py").write_text(f'"""{shared}"""')
        (tmp_path / "json" / "tests" / "__init__.py").write_text('"""This one is in a test and not to be read."""')
        (tmp_path / "csv.py").write_text("def (")
        corpus = Docstrings(min_sentences=1, root=str(tmp_path), test_fraction=0.0).load()
        assert corpus.train_texts == (own,)
        assert corpus.label_names[corpus.train_labels[0]] == "concurrency"

    def test_too_few_sentences(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"Expected at least 5000 sentences.*found 0.*HINT"):
            Docstrings(root=str(tmp_path)).load()

    def test_what_is_a_sentence(self) -> None:
        docstring = """Return the first file of the list that is there.  It is
        opened in the `mode' that ``open`` knows as its default.

        >>> this is not a sentence and will not be one.
        answer(x) -- Return what is the answer to the question.

        - A bullet is one sentence of its own in here.
        - Another bullet follows and is one as well.

        mode = the {value} of it in the code.
        ------------------------------------
        """
        assert list(sentences(docstring)) == [
            "Return the first file of the list that is there.",
            "It is opened in the mode that open knows as its default.",
            "A bullet is one sentence of its own in here.",
            "Another bullet follows and is one as well.",
        ]


class TestFlippedLabels:
    def test_the_fraction_and_the_mask(self, small: Corpus) -> None:
        flipped = small.with_flipped_labels(0.08)
        changed = [new != old for new, old in zip(flipped.train_labels, small.train_labels, strict=True)]
        assert sum(changed) == 16 and tuple(changed) == flipped.flipped
        assert flipped.original_train_labels == small.train_labels
        assert flipped.test_labels == small.test_labels
        assert not any(small.flipped)

    def test_every_other_class_is_drawn(self, small: Corpus) -> None:
        flipped = small.with_flipped_labels(1.0)
        pairs = set(zip(small.train_labels, flipped.train_labels, strict=True))
        assert pairs == set(itertools.permutations(range(3), 2))

    def test_depends_on_seed_and_text_not_on_order(self, small: Corpus) -> None:
        def by_text(corpus: Corpus) -> dict[object, int]:
            return dict(zip(corpus.train_texts, corpus.train_labels, strict=True))

        backwards = Corpus(
            small.label_names, small.train_texts[::-1], small.train_labels[::-1], small.test_texts, small.test_labels
        )
        assert by_text(small.with_flipped_labels(0.2)) == by_text(backwards.with_flipped_labels(0.2))
        assert by_text(small.with_flipped_labels(0.2)) != by_text(small.with_flipped_labels(0.2, seed=1))

    def test_refusals(self, small: Corpus) -> None:
        with pytest.raises(ValueError, match="between 0 and 1, found 8"):
            small.with_flipped_labels(8)
        with pytest.raises(ValueError, match="flipped already"):
            small.with_flipped_labels(0.1).with_flipped_labels(0.1)
        with pytest.raises(ValueError, match="two classes"):
            Corpus(("one",), ("text",), (0,), (), ()).with_flipped_labels(1.0)

    def test_a_corpus_must_fit_together(self) -> None:
        with pytest.raises(ValueError, match="expected 2, found 1"):
            Corpus(("one",), ("text", "text"), (0,), (), ())
        with pytest.raises(ValueError, match=r"in 0\.\.0, found 1"):
            Corpus(("one",), ("text",), (1,), (), ())


class TestTextTable:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        folder = tmp_path / "reviews"
        folder.mkdir()
        (folder / "labels.txt").write_text("bad\ngood\n")
        rows = [{"text": f'a "text", with a comma\nnumber {number}', "label": str(number % 2)} for number in range(20)]
        write_table(folder / "train.csv.gz", rows)
        write_table(folder / "test.csv.gz", rows[:6])
        return tmp_path

    def test_reads_a_set(self, root: Path) -> None:
        corpus = TextTable("reviews", str(root)).load()
        assert corpus.label_names == ("bad", "good")
        assert corpus.train_texts[3] == 'a "text", with a comma\nnumber 3'
        assert corpus.train_labels == (0, 1) * 10
        assert len(corpus.test_texts) == 6

    def test_subsampling_is_nested_and_keeps_labels_and_order(self, root: Path) -> None:
        everything = TextTable("reviews", str(root)).load()
        label_of = dict(zip(everything.train_texts, everything.train_labels, strict=True))
        eight, five = (TextTable("reviews", str(root), train_size=size, test_size=2).load() for size in (8, 5))
        assert len(eight.train_texts) == 8 and len(eight.test_texts) == 2
        assert set(five.train_texts) < set(eight.train_texts)
        assert [label_of[text] for text in eight.train_texts] == list(eight.train_labels)
        positions = [everything.train_texts.index(text) for text in eight.train_texts]
        assert positions == sorted(positions)
        with pytest.raises(ValueError, match="at least one text, found 0"):
            TextTable("reviews", str(root), train_size=0).load()

    def test_pairs_and_longer_file_names(self, root: Path) -> None:
        folder = root / "pairs"
        folder.mkdir()
        (folder / "labels.txt").write_text("no\nyes\n")
        row = {"text": "a dog runs", "text_pair": "an animal moves", "label": "1"}
        write_table(folder / "train_from_dev.csv.gz", [row])
        write_table(folder / "test_from_test.csv.gz", [row])
        assert TextTable("pairs", str(root)).load().train_texts == (("a dog runs", "an animal moves"),)
        write_table(folder / "train_other.csv.gz", [row])
        with pytest.raises(FileNotFoundError, match=r"train_from_dev.*train_other"):
            TextTable("pairs", str(root)).load()

    def test_no_data_root(self) -> None:
        with pytest.raises(ValueError, match=r"'ag_news' needs a data root, found none.*HINT"):
            TextTable("ag_news").load()

    def test_not_there(self, root: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"'review'.*found in .*reviews"):
            TextTable("review", str(root)).load()
        with pytest.raises(FileNotFoundError, match="no such folder"):
            TextTable("reviews", str(root / "nowhere")).load()
        (root / "reviews" / "test.csv.gz").unlink()
        with pytest.raises(FileNotFoundError, match="found none"):
            TextTable("reviews", str(root)).load()

    def test_columns(self, root: Path) -> None:
        write_table(root / "reviews" / "train.csv.gz", [{"sentence": "a", "label": "0"}])
        with pytest.raises(ValueError, match=r"columns text and label.*\['label', 'sentence'\]"):
            TextTable("reviews", str(root)).load()


class TestHubTexts:
    @pytest.fixture
    def files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()
        files = {}
        for split, count in (("train", 6), ("test", 4)):
            path = tmp_path / f"{split}.csv"
            lines = [f"text {number},other {number},{('no', 'yes')[number % 2]}" for number in range(count)]
            path.write_text("\n".join(["sentence,second,verdict", *lines]))
            files[split] = str(path)
        return files

    def test_reads_files_with_named_labels(self, files: dict[str, str]) -> None:
        source = HubTexts("csv", text="sentence", label="verdict", data_files=files, train_size=4)
        corpus = source.load()
        assert corpus.label_names == ("no", "yes")
        assert len(corpus.train_texts) == 4
        assert corpus.test_texts == ("text 0", "text 1", "text 2", "text 3")
        assert corpus.test_labels == (0, 1, 0, 1)

    def test_pairs(self, files: dict[str, str]) -> None:
        source = HubTexts("csv", text="sentence", text_pair="second", label="verdict", data_files=files)
        assert source.load().train_texts[2] == ("text 2", "other 2")

    def test_missing_column_and_split(self, files: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="column 'text'"):
            HubTexts("csv", label="verdict", data_files=files).load()
        with pytest.raises(ValueError, match="split 'validation'"):
            HubTexts("csv", text="sentence", label="verdict", test_split="validation", data_files=files).load()

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ModuleNotFoundError, match=r"lightning-influence\[hf\]"):
            HubTexts("ag_news").load()
