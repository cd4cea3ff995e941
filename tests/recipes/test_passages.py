"""The text recipe on a made-up language: it runs to its page, and words carry what the scores say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_influence import InfluenceModule, MultiStage, SmallProximity, TracInWE
from recipes.data.corpus import Corpus
from recipes.data.passages import LinesOfText
from recipes.language.models import LanguageModel, TextTask
from recipes.pretraining_passages import SHARED, report

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]
FRUIT, TOOLS = ["apple", "pear", "plum", "fig"], ["saw", "nail", "file", "plane"]


def sentence(words: list[str], number: int) -> str:
    return " ".join(words[(number + step) % len(words)] for step in range(4)) + f" number{number % 3}"


@dataclass(frozen=True)
class Reading:
    def load(self) -> list[str]:
        return [sentence(words, n) for n in range(8) for words in (FRUIT, TOOLS)]


@dataclass(frozen=True)
class Sorting:
    def load(self) -> Corpus:
        texts = tuple(sentence(words, n + 1) for n in range(6) for words in (FRUIT, TOOLS))
        labels = (0, 1) * 6
        return Corpus(("fruit", "tools"), texts, labels, texts[:4], labels[:4])


def test_the_recipe_runs_to_its_page_and_words_carry_the_scores(tmp_path):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(
            "pretraining_passages",
            [
                "~passages.source", "passages._target_=tests.recipes.test_passages.Reading",
                "task._target_=tests.recipes.test_passages.Sorting", "min_count=1", "batch_size=4", "width=6", "k=3",
                "pretraining_epochs=4", "finetuning_epochs=80", f"store={tmp_path}", f"results={tmp_path}/page",
            ],
        )  # fmt: skip
    page = report(config)
    assert page.count("Predicted and right: **") == 2 and page.count("| +") == 6
    # word by word the contributions of TracIn-WE behind the link sum to its scores
    language, task = LanguageModel(14, 6), TextTask(14, 2, 6)
    influence = InfluenceModule(
        task, tmp_path / "finetuning", MultiStage(TracInWE(unmatched="zeros"), SmallProximity(), module=language)
    )
    batch = {"tokens": torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]]), "label": torch.tensor([0, 1])}
    scores = influence.scores(batch)
    ids = scores.abs().topk(3, dim=1).indices
    words = influence.words(batch, ids)
    totals = torch.tensor([[sum(w.score for w in pair) for pair in row] for row in words])
    torch.testing.assert_close(totals, scores.gather(1, ids).to(totals), rtol=1e-4, atol=1e-6)
    link = influence.store.link
    assert link is not None and set(link.shared) == set(SHARED)


def test_lines_of_a_file_are_passages(tmp_path):
    import gzip

    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.write("= heading =\n" + "one two three four five six seven eight\n" * 3)
    assert len(LinesOfText("text.txt.gz", str(tmp_path), size=2).load()) == 2
    with pytest.raises(ValueError, match="data_root"):
        LinesOfText("text.txt.gz").load()
    with pytest.raises(FileNotFoundError, match="data_root"):
        LinesOfText("other.txt.gz", str(tmp_path)).load()
