"""The truths: retraining at once is retraining one by one, and nothing is trained that is known already."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models import TextCNN, TextTransformer
from recipes.truths import retraining, store
from recipes.truths.digits import DigitsClassifier, Kind, digits, half_subsets
from recipes.truths.retraining import Samples, Truth, random_subsets, retrain
from recipes.truths.training import Build, Recipe, initial, train

RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01)
SEEDS = (7, 8)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def samples(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Samples(inputs, torch.randint(4, (count,), generator=generator))


def texts(count: int, seed: int) -> Samples:
    """Texts of 1 to 12 words, filled up with 0."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 13, (count, 1), generator=generator)
    tokens = torch.randint(1, 30, (count, 20), generator=generator)
    tokens = torch.where(torch.arange(20) < lengths, tokens, 0)
    return Samples(tokens, torch.randint(3, (count,), generator=generator), padding=0)


def text_cnn() -> nn.Module:
    return TextCNN(30, 3, embedding_dim=6, channels=[5, 4], kernel_size=3, dropout=0.0).double()


def text_transformer() -> nn.Module:
    return TextTransformer(
        30, 3, embedding_dim=8, num_layers=1, num_heads=2, feedforward_dim=8, dropout=0.0, max_tokens=20
    ).double()


TRAIN, QUERIES = samples(20, 0), samples(6, 1)
EVEN = [torch.tensor([0, 3, 5, 8, 9, 11, 12, 15, 17, 19]), torch.arange(10), torch.arange(19, 9, -1)]
UNEVEN = [torch.arange(20), torch.tensor([2, 4, 6]), torch.arange(9)]  # 5, 1 and 3 batches


def run(subsets: Sequence[Tensor], cache: Path, **options: Any) -> Truth:
    settings: dict[str, Any] = {"seeds": SEEDS, "cache": cache}
    return retrain(build, RECIPE, TRAIN, QUERIES, subsets, **(settings | options))


def one_by_one(
    subset: Tensor, seed: int, build: Build = build, train_set: Samples = TRAIN, queries: Samples = QUERIES
) -> tuple[Tensor, Tensor]:
    model = train(build, RECIPE, train_set.inputs[subset], train_set.labels[subset], seed)
    with torch.no_grad():
        losses = F.cross_entropy(model(queries.inputs), queries.labels, reduction="none")
    p = (-losses).exp()
    return losses, -torch.log(p / (1 - p))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many models every chunk had that was trained."""
    counts: list[int] = []
    real = retraining.train_chunk

    def counted(models: Sequence[nn.Module], *others: Any) -> None:
        counts.append(len(models))
        real(models, *others)

    monkeypatch.setattr(retraining, "train_chunk", counted)
    return counts


@pytest.mark.parametrize("at_once", [1, 4, 50])
@pytest.mark.parametrize("subsets", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_retraining_at_once_is_retraining_one_by_one(subsets: list[Tensor], at_once: int, tmp_path: Path) -> None:
    truth = run(subsets, tmp_path, at_once=at_once)
    assert truth.losses.shape == truth.log_odds.shape == (3, 2, 6)
    for s, subset in enumerate(subsets):
        for r, seed in enumerate(SEEDS):
            losses, log_odds = one_by_one(subset, seed)
            torch.testing.assert_close(truth.losses[s, r], losses, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(truth.log_odds[s, r], log_odds, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("at_once", [1, 50])
def test_weights_scale_the_samples_and_keep_the_batches(at_once: int, tmp_path: Path) -> None:
    subset, weight = torch.arange(20), torch.ones(20)
    weight[3], weight[7] = 0, 0.5
    truth = run([subset, UNEVEN[1]], tmp_path, weights=[weight, torch.ones(3)], at_once=at_once)
    for r, seed in enumerate(SEEDS):
        model = initial(build, seed)
        optimizer = RECIPE.optimizer(model)
        for order in RECIPE.orders(20, seed):
            for batch in order.split(4):
                losses = F.cross_entropy(model(TRAIN.inputs[batch]), TRAIN.labels[batch], reduction="none")
                optimizer.zero_grad()
                ((losses * weight[batch]).sum() / len(batch)).backward()
                optimizer.step()
        with torch.no_grad():
            expected = F.cross_entropy(model(QUERIES.inputs), QUERIES.labels, reduction="none")
        torch.testing.assert_close(truth.losses[0, r], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 50])
@pytest.mark.parametrize("model", [text_cnn, text_transformer])
def test_texts_cut_to_the_longest_of_a_batch_train_the_same_model(model: Build, at_once: int, tmp_path: Path) -> None:
    data, asked = texts(16, 0), texts(5, 1)
    subsets = [torch.arange(16), torch.arange(3, 12)]
    assert data.inputs_of(torch.arange(16)).shape[1] <= 12 < data.inputs.shape[1]
    truth = retrain(model, RECIPE, data, asked, subsets, seeds=[3], cache=tmp_path, at_once=at_once)
    for s, subset in enumerate(subsets):
        losses, _ = one_by_one(subset, 3, model, data, asked)  # with every text as long as the tensor
        torch.testing.assert_close(truth.losses[s, 0], losses, rtol=1e-10, atol=1e-12)


def test_lengths_of_texts() -> None:
    data = Samples(torch.tensor([[3, 0, 4, 0], [0, 0, 0, 0], [1, 2, 0, 0]]), torch.zeros(3), padding=0)
    assert data.lengths.tolist() == [3, 1, 2]
    assert data.inputs_of(torch.tensor([[2], [1]])).tolist() == [[[1, 2]], [[0, 0]]]
    with pytest.raises(ValueError, match="token ids"):
        Samples(torch.zeros(3, 2, 2), torch.zeros(3), padding=0)


@pytest.mark.parametrize("at_once", [1, 50])
def test_parameters_without_gradient_stay(at_once: int, tmp_path: Path) -> None:
    def half_frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        model[0].requires_grad_(False)
        return model

    truth = retrain(half_frozen, RECIPE, TRAIN, QUERIES, EVEN, seeds=SEEDS, cache=tmp_path, at_once=at_once)
    losses, _ = one_by_one(EVEN[1], SEEDS[1], half_frozen)
    torch.testing.assert_close(truth.losses[1, 1], losses, rtol=1e-10, atol=1e-12)


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run(EVEN, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_second_run_reads_what_the_first_one_wrote(tmp_path: Path, trained: list[int]) -> None:
    first = run(EVEN, tmp_path)
    assert trained == [6]
    again = run(EVEN, tmp_path)
    assert trained == [6]
    assert torch.equal(first.losses, again.losses) and torch.equal(first.log_odds, again.log_odds)


def test_a_longer_list_trains_what_is_new(tmp_path: Path, trained: list[int]) -> None:
    first = run(EVEN, tmp_path)
    more = run([UNEVEN[0], *reversed(EVEN)], tmp_path, seeds=[*SEEDS, 9])
    assert trained == [6, 2 + 4]  # one new subset for two seeds, four subsets for a new one
    assert torch.equal(more.losses[1:, :2], first.losses.flip(0))
    assert torch.equal(run(EVEN[:1], tmp_path, seeds=SEEDS[::-1]).losses, first.losses[:1].flip(1))


def test_equal_subsets_are_trained_once(tmp_path: Path, trained: list[int]) -> None:
    truth = run([EVEN[0], EVEN[1], EVEN[0]], tmp_path, seeds=[7, 7])
    assert trained == [2]
    assert torch.equal(truth.losses[0], truth.losses[2]) and torch.equal(truth.losses[:, 0], truth.losses[:, 1])


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_killed_run_goes_on_after_its_last_chunk(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    whole = run(EVEN, tmp_path / "whole", at_once=at_once)
    trained.clear()
    real = store.os.replace

    def killed(source: Any, target: Any) -> None:
        if len(trained) == 2:
            raise KeyboardInterrupt  # after the second chunk was written, before it had its name
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(EVEN, tmp_path / "broken", at_once=at_once)
    resumed = run(EVEN, tmp_path / "broken", at_once=at_once)
    assert sum(trained) == len(EVEN) * len(SEEDS) + at_once  # one chunk twice
    assert torch.equal(resumed.losses, whole.losses)


DIFFERENT: dict[str, Any] = {
    "build": lambda: nn.Sequential(nn.Linear(3, 4)).double(),
    "recipe": replace(RECIPE, momentum=0.8),
    "train": samples(20, 2),
    "queries": samples(6, 3),
    "subsets": [torch.flip(subset, (0,)) for subset in EVEN[:2]],
    "weights": [torch.full((10,), 0.5) for _ in EVEN[:2]],
    "seeds": (9, 10),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_anything_that_differs_gets_its_own_results(what: str, tmp_path: Path, trained: list[int]) -> None:
    settings: dict[str, Any] = dict(
        recipe=RECIPE, train=TRAIN, queries=QUERIES, subsets=EVEN[:2], seeds=SEEDS, build=build
    )
    first = retrain(**settings, cache=tmp_path)
    other = retrain(**(settings | {what: DIFFERENT[what]}), cache=tmp_path)
    assert trained == [4, 4] and not torch.equal(first.losses, other.losses)
    assert len(list(tmp_path.iterdir())) == (2 if what in ("subsets", "weights") else 4)  # a store for each seed


def test_a_copied_folder_is_as_good(tmp_path: Path, trained: list[int]) -> None:
    first = run(EVEN, tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "yours")
    assert torch.equal(run(EVEN, tmp_path / "yours").losses, first.losses)
    assert trained == [6]


class Counting(nn.Linear):
    """Writes into a buffer."""

    def __init__(self) -> None:
        super().__init__(3, 4, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(inputs)


class RandomBuffer(nn.Linear):
    """Its buffer is another one in every model of another seed."""

    def __init__(self) -> None:
        super().__init__(3, 4, dtype=torch.float64)
        self.register_buffer("noise", torch.randn(3, dtype=torch.float64))


class Noisy(nn.Linear):
    """Draws random numbers without a dropout layer."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(F.dropout(inputs, 0.5))


@pytest.mark.parametrize("at_once", [1, 50])
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Counting, "buffers that its forward pass changes.*calls"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double(), "buffers that its forward pass changes"),
        (lambda: nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 4)).double(), "without dropout, found 0 with p = 0.1"),
        (lambda: Noisy(3, 4).double(), "without random numbers"),
    ],
)
def test_a_model_that_is_no_fixed_function_is_refused(model: Build, words: str, at_once: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        retrain(model, RECIPE, TRAIN, QUERIES, EVEN, seeds=SEEDS, cache=tmp_path, at_once=at_once)


def test_buffers_that_differ_between_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the same in all models, found another noise"):
        retrain(RandomBuffer, RECIPE, TRAIN, QUERIES, EVEN, seeds=SEEDS, cache=tmp_path)


def test_what_cannot_be_retrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below 20"):
        run([torch.tensor([20])], tmp_path)
    with pytest.raises(ValueError, match="at least one index"):
        run([torch.tensor([], dtype=torch.long)], tmp_path)
    with pytest.raises(ValueError, match="at least one index"):
        run([], tmp_path)
    with pytest.raises(ValueError, match="one weight for every index"):
        run(EVEN, tmp_path, weights=[torch.ones(9) for _ in EVEN])
    with pytest.raises(ValueError, match="at_once=0"):
        run(EVEN, tmp_path, at_once=0)
    assert not list(tmp_path.iterdir())


def test_random_subsets() -> None:
    subsets = random_subsets(100, 3, 0.29, seed=4)
    assert [len(set(subset.tolist())) for subset in subsets] == [29] * 3
    longer = random_subsets(100, 5, 0.29, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(subsets, longer, strict=False))
    assert not torch.equal(subsets[0], random_subsets(100, 1, 0.29, seed=5)[0])
    for wrong in ({"fraction": 0.001}, {"fraction": 1.1}, {"count": 0}):
        with pytest.raises(ValueError, match="1 to 100 samples"):
            random_subsets(**({"size": 100, "count": 3, "fraction": 0.5, "seed": 0} | wrong))


def test_the_halves_of_the_digits() -> None:
    draw = np.random.default_rng(1)
    expected = [draw.choice(1000, 500, replace=False) for _ in range(100)]
    assert [subset.tolist() for subset in half_subsets()] == [subset.tolist() for subset in expected]


def test_the_set_up_of_the_digits() -> None:
    data = digits()
    assert data.train.inputs.shape == (1000, 64) and data.queries.inputs.shape == (200, 64)
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1


@pytest.mark.parametrize("kind", ["logistic_regression", "mlp"])
def test_the_lightning_module_trains_by_the_recipe(kind: Kind) -> None:
    module = DigitsClassifier(kind)
    loss = module.training_step((torch.rand(6, 64), torch.arange(6)), 0)
    assert loss.dim() == 0
    optimizer = module.configure_optimizers()
    assert optimizer.param_groups[0]["momentum"] == module.recipe.momentum
