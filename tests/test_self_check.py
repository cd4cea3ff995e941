"""The self-check passes what is right and refuses, before training, what has no per-sample gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_influence import GradientSnapshot
from lightning_influence.errors import CaptureError, InfluenceError, LossError
from lightning_influence.gradients import select
from lightning_influence.replay import TrainingData
from lightning_influence.self_check import self_check
from tests.callbacks.fits import (
    BOTH,
    CLASSES,
    WARNINGS,
    WORDS,
    Classifier,
    LanguageModel,
    Texts,
    fit,
    loader,
    padded,
    seeded,
)

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


class Contrastive(Classifier):
    def loss(self, batch: Any) -> Tensor:
        z = self(batch["tokens"])
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class TimeFirst(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(tokens.T))[0].mean(0))


class Penalty(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 0.1 * self.head.weight.square().sum()


class OutOfReach(Classifier):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + (self.words(tokens).sum(1) @ self.words.weight.T)[:, :3]


class LengthWeighted(Classifier):
    def loss(self, batch: Any) -> Tensor:
        each = F.cross_entropy(self(batch["tokens"]), batch["label"], reduction="none")
        length = (batch["tokens"] != 0).sum(1)
        return (each * length).sum() / length.sum()


class Hardest(Classifier):
    """Focuses on the sample with the largest loss."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]), batch["label"], reduction="none").max()


REFUSED: dict[str, tuple[type[InfluenceError], str, Any, Any]] = {
    "contrastive": (LossError, "couples the samples", Contrastive, BOTH),
    "time first": (CaptureError, "(?s)dimension.*batch_first", TimeFirst, BOTH),
    "penalty": (CaptureError, r"(?s)'head.weight'.*penalty", Penalty, BOTH),
    "out of reach": (CaptureError, r"(?s)'words.weight'.*outside its layer's own call", OutOfReach, "words.weight"),
    "weighting": (LossError, "cannot be read off", LengthWeighted, BOTH),
    "hardest": (LossError, "couples|cannot be read off", Hardest, BOTH),
}


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_first_training_step(tmp_path: Path, case: str, mode: Any) -> None:
    kind, match, make, parameters = REFUSED[case]
    module = seeded(make)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(kind, match=match) as raised:
        fit(tmp_path, module, GradientSnapshot(tmp_path / "store", parameters, mode=mode))
    assert "HINT" in str(raised.value)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert not (tmp_path / "store").exists()


def check(module: Classifier, parameters: Any = BOTH, **options: Any) -> Any:
    texts = options.pop("texts", None) or Texts()
    batching = {"batch_size": options.pop("batch_size", 4), "collate_fn": options.pop("collate_fn", padded)}
    data = TrainingData.of(loader(texts, **batching))
    return self_check(module, select(module, parameters), data, **options)


def test_reductions_are_recognised() -> None:
    for loss, reduction in (("mean", "mean"), ("sum", "sum"), ("own", "mean"), ("weights", "mean"), ("bce", "mean")):
        found = check(seeded(lambda loss=loss: Classifier(loss=loss)))
        assert (found.reduction, found.weighted) == (reduction, loss == "weights")
        assert check(seeded(lambda loss=loss: Classifier(loss=loss)), batch_size=1).reduction == reduction
        assert found.worst_sum < 1e-5 and found.worst_single < 1e-3
    assert check(seeded(LanguageModel), ["words.weight"]).weighted


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_one_sample_or_no_gradient_at_all(loss: str) -> None:
    """Gradients cannot tell a sum from a mean there; the loss call does."""
    assert check(seeded(lambda: Classifier(loss=loss)), texts=Texts(1)).reduction == loss
    module = seeded(lambda: Classifier(loss=loss))
    with torch.no_grad():
        module.head.weight.zero_()  # a head that begins at zero: nothing reaches the words
    assert check(module, "word_embeddings").reduction == loss


def test_penalties_that_reach_no_captured_weight_do_not_matter() -> None:
    assert check(seeded(Penalty), "word_embeddings").reduction == "mean"


def test_random_numbers_and_counters_in_the_loss_do_not_confuse() -> None:
    class Noisy(Classifier):
        steps = 0

        def loss(self, batch: Any) -> Tensor:
            self.steps += 1
            return super().loss(batch) * (1 + torch.rand(())) * (1 + 0.1 * self.steps)

    module = seeded(Noisy)
    before = torch.get_rng_state()
    assert check(module).reduction == "mean"
    assert module.steps == 0 and torch.equal(torch.get_rng_state(), before)


def test_samples_are_taken_from_all_over_the_training_set() -> None:
    seen: list[int] = []

    class Watched(Texts):
        def __getitem__(self, position: int) -> Any:
            seen.append(position)
            return super().__getitem__(position)

    module = seeded(Classifier)
    self_check(module, select(module, BOTH), TrainingData.of(loader(Watched(101), batch_size=3)))
    assert seen == [round(i * 100 / 15) for i in range(16)]  # however small the loader's batches are


def test_functional_uses_are_captured_in_flight_only_where_there_are_some() -> None:
    class Tied(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.words(tokens).sum(1)), self.words.weight)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self(batch["tokens"]), batch["label"] % WORDS)

    assert check(seeded(Tied), "words.weight", in_flight=True).functional
    assert not check(seeded(Classifier), in_flight=True).functional
    assert check(seeded(Classifier)).functional


class ByHand(Classifier):
    """The mean with class weights, written out: no call tells the weights."""

    def loss(self, batch: Any) -> Tensor:
        weight = torch.tensor([1.0, 5.0, 1.0])[batch["label"]]
        each = F.cross_entropy(self(batch["tokens"]), batch["label"], reduction="none")
        return (weight * each).sum() / weight.sum()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_small_batches_hide_nothing(batch_size: int) -> None:
    texts = Texts(8)
    texts.labels = [0, 1, 1, 2, 1, 0, 1, 0]  # the first and the last weigh the same
    with pytest.raises(LossError, match="cannot be read off"):
        check(seeded(ByHand), batch_size=batch_size, texts=texts)
    with pytest.raises(LossError, match="couples"):
        check(seeded(Contrastive), batch_size=batch_size)


def test_a_rare_label_is_looked_at() -> None:
    texts = Texts(16)
    texts.labels = [0] * 16
    texts.labels[10] = 1  # away from the spread ones
    with pytest.raises(LossError, match="cannot be read off"):
        check(seeded(ByHand), texts=texts)


def first_only(samples: list[Any]) -> Any:
    return padded(samples[:1])


def one_only(samples: list[Any]) -> Any:
    (sample,) = samples
    return padded([sample])


@pytest.mark.parametrize("collate", [first_only, one_only])
@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_collate_functions_of_one_sample(collate: Any, loss: str) -> None:
    with pytest.warns(UserWarning, match="could look at 1 of 13 samples.*HINT"):
        found = check(seeded(lambda: Classifier(loss=loss)), batch_size=1, collate_fn=collate)
    assert found.reduction == loss


def test_weights_are_read_off_the_loss_call_and_not_off_one_batch() -> None:
    texts = Texts(8)
    texts.labels, texts.tokens = [0] * 8, [tokens[:2] for tokens in texts.tokens]  # all weigh the same
    assert check(seeded(lambda: Classifier(loss="weights")), texts=texts).weighted
    texts.tokens = [torch.tensor([1, 2, 3])] * 8
    assert check(seeded(LanguageModel), ["words.weight"], texts=texts).weighted
    assert not check(seeded(Classifier), texts=texts).weighted


def test_uses_that_are_left_out_are_told() -> None:
    class Tied(Classifier):
        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.words(tokens).sum(1)), self.words.weight)[:, :CLASSES]

    for in_flight in (False, True):
        found = check(seeded(Tied), "word_embeddings", in_flight=in_flight)
        assert found.left_out.keys() == {"words.weight"} and "linear" in str(found.left_out["words.weight"])
    assert not check(seeded(Classifier)).left_out
