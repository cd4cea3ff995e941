"""Words and tokens of pretraining texts that carry the score of a finetuned model's query."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import (
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MatrixFree,
    MultiStage,
    Proximity,
    StageLinker,
    TracIn,
    TracInWE,
    questions,
)
from lightning_influence.queries import readable
from tests.callbacks.fits import WARNINGS
from tests.two_stages import fit

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
]
WORDS, LENGTH = 12, 5


class Texts(LightningModule):
    """A bag of words, and a head of its own."""

    def __init__(self, classes: int, frozen: bool = False) -> None:
        super().__init__()
        self.words, self.layer, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, 4), nn.Linear(4, classes)
        self.words.requires_grad_(not frozen)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.words(tokens).mean(1))))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.3)


def texts(count: int, classes: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (count, LENGTH), generator=draw)
    return TensorDataset(tokens, torch.randint(0, classes, (count,), generator=draw))


PRE, FINE, ASKED = texts(20, 3, 0), texts(16, 2, 1), texts(4, 2, 2)


class Runs:
    """Pretraining with gradients of everything, finetuning with the look-up frozen or tuned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        torch.manual_seed(0)
        self.pre = Texts(3)
        fit(root, self.pre, PRE, GradientSnapshot(root / "pre", "all"), CurvatureSnapshot(root / "pre"))
        self.fine = {}
        for name, frozen in (("tuned", False), ("frozen", True)):
            torch.manual_seed(1)
            module = Texts(2, frozen)
            state = {key: value for key, value in self.pre.state_dict().items() if not key.startswith("head")}
            module.load_state_dict(state, strict=False)
            fit(root, module, FINE, StageLinker(root / name, pretrain=root / "pre"), CurvatureSnapshot(root / name))
            self.fine[name] = module

    def influence(self, kind: str, inner: Any, batch_size: int = 4, **options: Any) -> InfluenceModule:
        method = MultiStage(inner, Proximity(0.1), **options)
        data = DataLoader(FINE, batch_size)
        return InfluenceModule(self.fine[kind], self.root / kind, method, train_loader=data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("batch_size", [4, 5])  # 4: as many as there are queries
@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_words_sum_to_the_score_and_texts_are_those_of_the_query_alone(runs, kind, batch_size, monkeypatch):
    """Through a frozen look-up, words of finetuning texts carry a part of the score: the head that answers has read
    them. What a text is for the query, the walk over them does not change."""
    read: list[Any] = []

    def watched(words: Any, tokens: Any, decode: Any) -> Any:
        read.append(tokens)
        return readable(words, tokens, decode)

    monkeypatch.setattr(questions, "readable", watched)
    influence = runs.influence(kind, TracInWE(), batch_size)
    scores = influence.scores(ASKED.tensors)
    ids = scores.topk(3, dim=1).indices
    found = influence.words(ASKED.tensors, ids, decode=str)
    assert read == [{"words.weight": ASKED.tensors[0][q].tolist()} for q in range(4) for _ in range(3)]
    taught = set() if kind == "tuned" else set(FINE.tensors[0].flatten().tolist())
    for q in range(4):
        query = set(ASKED.tensors[0][q].tolist())
        for place, sample in enumerate(ids[q].tolist()):
            there = set(PRE.tensors[0][sample].tolist())
            assert {word.word for word in found[q][place]} == {str(token) for token in (query | taught) & there}
            total = sum(word.score for word in found[q][place])
            assert total == pytest.approx(float(scores[q, sample]), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_a_look_up_alone_scores_as_its_part_of_everything(runs, kind):
    """TracInWE inside is TracIn of that parameter, whatever else the store holds."""
    one = runs.influence(kind, TracInWE()).scores(ASKED.tensors)
    other = runs.influence(kind, TracIn(parameters="words.weight")).scores(ASKED.tensors)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_tokens_of_pretraining_texts_sum_to_their_score(runs, kind):
    data = DataLoader(PRE, 4)
    solved = InfluenceFunction(MatrixFree("ggn"), damping=0.1)
    inner = TracIn(parameters="words.weight")
    influence = runs.influence(kind, inner, module=copy.deepcopy(runs.pre), train_loader=data, finetuned=solved)
    scores = influence.scores(ASKED.tensors)
    ids = scores.topk(2, dim=1).indices
    found = influence.token_scores(ASKED.tensors, ids)
    for q in range(4):
        for place, sample in enumerate(ids[q].tolist()):
            total = float(found[q][place].scores.sum()) + found[q][place].rest
            assert found[q][place].tokens == tuple(PRE.tensors[0][sample].tolist())
            assert total == pytest.approx(float(scores[q, sample]), rel=1e-3, abs=1e-6)
