"""Case deletion deletes what it says, trains again as torch does, and the packed text CNN is the text CNN."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from lightning_influence import BM25, TracIn, TracInLast, TracInWE
from recipes import case_deletion
from recipes.data import TextDataModule
from recipes.data.vocabulary import PADDING, SEPARATOR, UNKNOWN
from recipes.deletions.deleting import Truths, delete_texts, replace_texts
from recipes.deletions.fitting import Explained, SetUp, explained, explained_in_all_ways
from recipes.deletions.methods import SHARED_RANKINGS, methods
from recipes.deletions.packed import PackedTextCNN
from recipes.deletions.texts import Texts
from recipes.deletions.words import Word, _others, _ranked, _without, delete_words
from recipes.models import TextCNN
from recipes.truths.retraining import Samples
from recipes.truths.training import Recipe, initial
from tests.recipes.few_texts import FewTexts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=0.1, momentum=0.9)
SIZE = dict(embedding_dim=6, channels=[5], kernel_size=3, dropout=0.0, optimizer="sgd", learning_rate=0.1)


@pytest.fixture(scope="module")
def set_up() -> SetUp:
    texts = Texts.of(TextDataModule(FewTexts(), max_tokens=6))
    sizes: dict[str, Any] = {"vocabulary_size": len(texts.data.vocabulary), "num_classes": 2} | SIZE
    return SetUp(partial(TextCNN, **sizes), partial(PackedTextCNN, **sizes), RECIPE, texts, texts.drawn(4, 0))


@pytest.fixture(scope="module")
def fit(set_up: SetUp, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    return explained_in_all_ways(set_up, 3, tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize(("channels", "kernel"), [([5], 3), ([5, 4], 5), ([3], 1)])
def test_the_packed_model_is_the_model(channels: list[int], kernel: int) -> None:
    tokens = torch.randint(1, 20, (7, 9), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(9) >= torch.tensor([1, 9, 4, 2, 8, 3, 5]).unsqueeze(1)] = PADDING
    found = []
    for kind in (TextCNN, PackedTextCNN):
        torch.manual_seed(0)
        model = kind(20, 3, embedding_dim=4, channels=channels, kernel_size=kernel, dropout=0.0).double()
        logits = model(tokens)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-10, atol=1e-12)


def test_deleting_is_training_again_without(set_up: SetUp, fit: Explained, tmp_path: Path) -> None:
    order = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(q)) for q in range(2)])
    found = delete_texts(fit, {"one": order, "other": order.flip(1)[:1]}, [2, 5], Truths(tmp_path))
    assert torch.equal(found["one"].proponents[0], found["other"].opponents[0])
    train = set_up.texts.train
    for query, k in ((0, 5), (1, 2)):
        for deleted, changed in (
            (order[query, :k], found["one"].proponents),
            (order[query, -k:], found["one"].opponents),
        ):
            weight = torch.ones(40).index_fill(0, deleted, 0.0)
            after = probability(train_plainly(set_up, train.inputs, train.labels, weight), fit, query)
            torch.testing.assert_close(changed[query, [2, 5].index(k)], after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["one"].before[1], probability(fit.module, fit, 1), rtol=1e-4, atol=1e-5)


def test_other_words_stand_in_the_places_of_the_first(set_up: SetUp, fit: Explained, tmp_path: Path) -> None:
    train = set_up.texts.train
    other = Samples(train.inputs[:1].flip(0), train.labels[3:4], padding=train.padding)
    _, after = replace_texts(fit, other, [{7: 0}], [2], Truths(tmp_path))
    inputs, labels = train.inputs.clone(), train.labels.clone()
    inputs[7], labels[7] = other.inputs[0], other.labels[0]
    expected = probability(train_plainly(set_up, inputs, labels, torch.ones(40)), fit, 2)
    torch.testing.assert_close(after[0], expected, rtol=1e-4, atol=1e-5)


def test_words_come_in_the_order_of_their_contributions(fit: Explained) -> None:
    scores = fit.scores("ends", TracInWE(), 2).double()
    for row, words in zip(scores, _ranked(fit, 2), strict=True):
        assert [w.score for w in words] == sorted((w.score for w in words), reverse=True)
        summed = torch.zeros(40, dtype=torch.float64)
        for word in words:
            summed[word.text] += word.score
        torch.testing.assert_close(summed, row, rtol=1e-4, atol=1e-6)


def test_a_word_is_taken_out_wherever_it_stands() -> None:
    assert _without(torch.tensor([5, 6, 5, 7, 0, 0]), [5]).tolist() == [6, 7, 0, 0, 0, 0]
    assert _without(torch.tensor([5, 5, 0]), [5]).tolist() == [UNKNOWN, 0, 0]


def test_other_words_are_as_many_of_the_same_texts_but_not_the_chosen() -> None:
    inputs = torch.tensor([[5, 6, 7, 5, 8], [9, 5, PADDING, PADDING, PADDING], [6, SEPARATOR, 7, 8, PADDING]])
    train = Samples(inputs, torch.zeros(3, dtype=torch.long), padding=PADDING)
    chosen = [Word(0, 5, 3.0), Word(1, 9, 2.0), Word(0, 8, 1.0), Word(1, 5, 0.5)]
    found = [_others(chosen, train, torch.Generator().manual_seed(seed)) for seed in range(20)]
    of_first = [sorted(word.token for word in words if word.text == 0) for words in found]
    assert of_first == [[6, 7]] * 20  # the only two that are left
    assert all(word.text == 0 for words in found for word in words)  # of the second text no other word is left
    drawn = {_others([Word(2, 6, 1.0)], train, torch.Generator().manual_seed(seed))[0].token for seed in range(20)}
    assert drawn == {7, 8}


def test_words_are_deleted_at_both_ends(fit: Explained, tmp_path: Path) -> None:
    found = delete_words(fit, 2, [1, 3], Truths(tmp_path))
    assert list(found) == ["words by TracIn-WE", "other words of the same texts"]
    words = found["words by TracIn-WE"]
    assert words.proponents.shape == words.opponents.shape == (2, 2)
    assert bool((words.proponents != words.before.unsqueeze(1)).all())


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_every_method_scores_every_training_text(fit: Explained) -> None:
    found = {method.name: method.scores(fit, 3) for method in methods(frequent=1)}
    assert all(scores.shape == (3, 40) and scores.isfinite().all() for scores in found.values())
    torch.testing.assert_close(found["TracIn-Last"], fit.scores("ends", TracInLast(), 3))
    same = fit.set_up.texts.train.labels == fit.queries.labels[:3].unsqueeze(1)
    similar = fit.scores("ends", BM25(), 3)
    torch.testing.assert_close(found["BM25, signed by the label"], torch.where(same, similar, -similar))
    factor = fit.ask("final", TracIn()).self_influence().sqrt()
    torch.testing.assert_close(found["gradient cosine"] * factor, found["gradient dot product"])


def test_random_rankings_are_shared(set_up: SetUp, tmp_path: Path) -> None:
    many = SetUp(set_up.build, set_up.again, RECIPE, set_up.texts, set_up.texts.drawn(10, 0))
    fit = explained(many, 0, tmp_path)
    random = next(method for method in methods() if method.name == "random").scores(fit, 10)
    assert torch.equal(random[0], random[SHARED_RANKINGS]) and not torch.equal(random[0], random[1])


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_the_program_writes_its_table(tmp_path: Path) -> None:
    overrides = [
        "quick=true", "data.source._target_=tests.recipes.few_texts.FewTexts", "+data.source.train=120",
        "recipe.epochs=1", "when_quick.points=2", "when_quick.few_points=1",
        "when_quick.word_points=1", "when_quick.sizes=[3,9]", "model.embedding_dim=4",
        f"results={tmp_path / 'table'}",
    ]  # fmt: skip
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("case_deletion", overrides=overrides)
    found = case_deletion.main.__wrapped__(config)
    table = (tmp_path / "table.md").read_text()
    assert -1 <= found <= 1
    assert table.count("| TracIn-WE |") == 2 and "| TracIn-Last, both in one |" in table
    assert "| words by TracIn-WE |" in table and (tmp_path / "table.png").stat().st_size > 0


def train_plainly(set_up: SetUp, inputs: Tensor, labels: Tensor, weight: Tensor) -> torch.nn.Module:
    model = initial(set_up.build, 3)
    optimizer = RECIPE.optimizer(model)
    for order in RECIPE.orders(len(labels), 3):
        for batch in order.split(RECIPE.batch_size):
            losses = F.cross_entropy(model(inputs[batch]), labels[batch], reduction="none")
            optimizer.zero_grad()
            ((losses * weight[batch]).sum() / len(batch)).backward()
            optimizer.step()
    return model.eval()


def probability(model: torch.nn.Module, fit: Explained, query: int) -> Tensor:
    with torch.no_grad():
        logits = model(fit.queries.inputs[query : query + 1]).double()
    return logits.softmax(1)[0, fit.queries.labels[query]]
