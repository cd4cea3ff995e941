"""The truths: retraining at once is retraining one by one, it resumes, and the LDS says what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.truths import retraining
from recipes.truths.digits import DigitsClassifier, Kind, digits, half_subsets
from recipes.truths.lds import linear_datamodelling_score, noise_ceiling, spearman
from recipes.truths.retraining import Samples, Truth, retrain
from recipes.truths.training import Recipe, initial, train

RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=0.1, momentum=0.9, weight_decay=0.01)
SEEDS = (7, 8)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def samples(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Samples(inputs, torch.randint(4, (count,), generator=generator))


TRAIN, QUERIES = samples(20, 0), samples(6, 1)
EVEN = [torch.tensor([0, 3, 5, 8, 9, 11, 12, 15, 17, 19]), torch.arange(10), torch.arange(19, 9, -1)]
UNEVEN = [torch.arange(20), torch.tensor([2, 4, 6]), torch.arange(9)]  # 5, 1 and 3 batches


def run(subsets: Sequence[Tensor], cache: Path, **options: Any) -> Truth:
    settings: dict[str, Any] = {"seeds": SEEDS, "cache": cache}
    return retrain(build, RECIPE, TRAIN, QUERIES, subsets, **(settings | options))


def one_by_one(subset: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    model = train(build, RECIPE, TRAIN.inputs[subset], TRAIN.labels[subset], seed)
    with torch.no_grad():
        losses = F.cross_entropy(model(QUERIES.inputs), QUERIES.labels, reduction="none")
    p = (-losses).exp()
    return losses, -torch.log(p / (1 - p))


@pytest.mark.parametrize("subsets", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_retraining_at_once_is_retraining_one_by_one(subsets: list[Tensor], tmp_path: Path) -> None:
    truth = run(subsets, tmp_path, at_once=4)
    assert truth.losses.shape == truth.log_odds.shape == (3, 2, 6)
    for s, subset in enumerate(subsets):
        for r, seed in enumerate(SEEDS):
            losses, log_odds = one_by_one(subset, seed)
            torch.testing.assert_close(truth.losses[s, r], losses, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(truth.log_odds[s, r], log_odds, rtol=1e-9, atol=1e-10)


def test_weights_scale_the_samples_and_keep_the_batches(tmp_path: Path) -> None:
    subset, weight = torch.arange(20), torch.ones(20)
    weight[3], weight[7] = 0, 0.5
    truth = run([subset, UNEVEN[1]], tmp_path, weights=[weight, torch.ones(3)])
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


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    run(EVEN, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_second_run_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(EVEN, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_train", lambda *_: pytest.fail("trained again"))
        again = run(EVEN, tmp_path)
    assert torch.equal(first.losses, again.losses) and torch.equal(first.log_odds, again.log_odds)


def test_a_killed_run_goes_on_after_its_last_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(EVEN, tmp_path / "whole", at_once=2)
    real_train, real_replace = retraining._train, retraining.os.replace
    trained: list[int] = []

    def counted(models: Sequence[nn.Module], *others: Any) -> dict[str, Tensor]:
        trained.append(len(models))
        return real_train(models, *others)

    def killed(source: Any, target: Any) -> None:
        if len(trained) == 2:
            raise KeyboardInterrupt  # after the second chunk was written, before it had its name
        real_replace(source, target)

    monkeypatch.setattr(retraining, "_train", counted)
    with monkeypatch.context() as patch:
        patch.setattr(retraining.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(EVEN, tmp_path / "broken", at_once=2)
    assert trained == [2, 2]
    resumed = run(EVEN, tmp_path / "broken", at_once=2)
    assert trained == [2, 2, 2, 2]  # three chunks; the second one twice
    assert torch.equal(resumed.losses, whole.losses)


DIFFERENT: dict[str, Any] = {
    "build": lambda: nn.Sequential(nn.Linear(3, 4)).double(),
    "recipe": replace(RECIPE, momentum=0.8),
    "train": samples(20, 2),
    "queries": samples(6, 3),
    "subsets": [EVEN[0], EVEN[2], EVEN[1]],
    "weights": [torch.full((10,), 0.5) for _ in EVEN],
    "seeds": (8, 7),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_anything_that_differs_gets_its_own_results(what: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = dict(recipe=RECIPE, train=TRAIN, queries=QUERIES, subsets=EVEN, seeds=SEEDS, build=build)
    retrain(**settings, cache=tmp_path)
    retrain(**(settings | {what: DIFFERENT[what]}), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_retrained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="below 20"):
        run([torch.tensor([20])], tmp_path)
    with pytest.raises(ValueError, match="at least one index"):
        run([torch.tensor([], dtype=torch.long)], tmp_path)
    with pytest.raises(ValueError, match="one weight for every index"):
        run(EVEN, tmp_path, weights=[torch.ones(9) for _ in EVEN])
    with pytest.raises(ValueError, match="without buffers"):
        retrain(
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).double(),
            RECIPE,
            TRAIN,
            QUERIES,
            EVEN,
            seeds=SEEDS,
            cache=tmp_path,
        )


def made_up() -> tuple[Tensor, list[Tensor], Tensor]:
    """Scores (5, 40), and measurements (30, 2, 5) of models that follow them exactly."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 40, generator=generator)
    subsets = [torch.randperm(40, generator=generator)[:20] for _ in range(30)]
    falls = torch.stack([scores[:, subset].double().sum(1) for subset in subsets])
    return scores, subsets, torch.stack([3 - falls, 5 - falls], 1)


def test_perfect_scores_have_lds_one() -> None:
    scores, subsets, measurements = made_up()
    lds = linear_datamodelling_score(scores, subsets, measurements)
    assert (lds.mean, lds.low, lds.high, lds.undefined) == pytest.approx((1, 1, 1, 0), abs=1e-6)
    assert linear_datamodelling_score(-scores, subsets, measurements).mean == pytest.approx(-1)
    assert noise_ceiling(measurements).mean == pytest.approx(1)


def test_constant_scores_have_no_lds() -> None:
    scores, subsets, measurements = made_up()
    lds = linear_datamodelling_score(torch.full_like(scores, 0.1), subsets, measurements)
    assert lds.per_query.isnan().all() and all(value != value for value in (lds.mean, lds.low, lds.high))
    scores[2] = 0.1
    lds = linear_datamodelling_score(scores, subsets, measurements)
    assert lds.undefined == 1 and lds.mean == pytest.approx(1)
    assert "1 of 5 queries undefined" in str(lds)


def test_random_scores_have_an_interval_around_nothing() -> None:
    scores, subsets, measurements = made_up()
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    lds = linear_datamodelling_score(noise, subsets, measurements)
    assert lds.low <= lds.mean <= lds.high and abs(lds.mean) < 0.3
    again = linear_datamodelling_score(noise, subsets, measurements)
    assert (again.low, again.high) == (lds.low, lds.high)


def test_ranks_with_ties_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (2, 30, 4), generator=generator).double()
    expected = [stats.spearmanr(a[:, q], b[:, q]).statistic for q in range(4)]
    assert spearman(a, b).tolist() == pytest.approx(expected, rel=1e-12)
    a[3, 1] = torch.nan
    assert spearman(a, b).isnan().tolist() == [False, True, False, False]


def test_the_set_up_of_the_digits() -> None:
    data = digits()
    assert data.train.inputs.shape == (1000, 64) and data.queries.inputs.shape == (200, 64)
    assert data.train.inputs.min() == 0 and data.train.inputs.max() == 1
    subsets = half_subsets()
    assert len(subsets) == 100 and all(len(set(subset.tolist())) == 500 for subset in subsets)


@pytest.mark.parametrize("kind", ["logistic_regression", "mlp"])
def test_the_lightning_module_trains_by_the_recipe(kind: Kind) -> None:
    module = DigitsClassifier(kind)
    loss = module.training_step((torch.rand(6, 64), torch.arange(6)), 0)
    assert loss.dim() == 0
    optimizer = module.configure_optimizers()
    assert optimizer.param_groups[0]["momentum"] == module.recipe.momentum
