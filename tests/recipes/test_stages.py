"""Two runs trained again at once are two runs trained one after the other, and the recipes of several stages run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from recipes import pretraining_cleansing, task_similarity, two_stages
from recipes.images.data import digits
from recipes.stages import removals, retraining
from recipes.stages.data import Tasks, tasks
from recipes.stages.fitting import fitted
from recipes.stages.methods import gradient_dot, multi_stage
from recipes.stages.network import Finetuning, Network, TwoRuns, finetuning_seed, is_shared
from recipes.stages.retraining import retrain_both
from recipes.truths.retraining import Samples
from recipes.truths.training import Recipe, initial

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAINING = Recipe(epochs=3, batch_size=4, learning_rate=0.1, weight_decay=0.01)
FINETUNING = Recipe(epochs=2, batch_size=3, learning_rate=0.2, momentum=0.5, weight_decay=0.02)
SMALL = ("seeds=[7]", "tasks.pretraining_size=60", "tasks.finetuning_size=40", "widths=[6]", "pretraining.epochs=4")
pytestmark = pytest.mark.filterwarnings("ignore")  # networks that are far from rest


def samples(count: int, seed: int, classes: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return Samples(inputs, torch.randint(classes, (count,), generator=generator))


TASKS = Tasks(samples(20, 0, 4), samples(10, 1, 2), samples(5, 2, 2), samples(6, 3, 2), (4, 2))


class Double(Network):
    """The network in float64."""

    def __init__(self, classes: int) -> None:
        super().__init__(3, classes, (5, 4))
        self.double()


def runs(embedding: float) -> TwoRuns:
    return TwoRuns(lambda: Double(4), lambda: Double(2), PRETRAINING, Finetuning(FINETUNING, embedding))


def one_after_the_other(how: TwoRuns, subset: Tensor, weight: Tensor, seed: int) -> Tensor:
    """The queries' losses (Q,)."""
    first, second = initial(how.first, seed), initial(how.second, finetuning_seed(seed))
    slow = how.finetuning.embedding
    part = Samples(TASKS.pretraining.inputs[subset], TASKS.pretraining.labels[subset])
    for model, recipe, data, weights, order_seed in (
        (first, PRETRAINING, part, weight, seed),
        (second, FINETUNING, TASKS.finetuning, torch.ones(10), finetuning_seed(seed)),
    ):
        if model is second:
            second.embedding.load_state_dict(first.embedding.state_dict())
        groups = [
            {"params": [p], "lr": recipe.learning_rate * (slow if model is second and is_shared(name) else 1)}
            for name, p in model.named_parameters()
            if not (model is second and is_shared(name) and slow == 0)
        ]
        optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for order in recipe.orders(len(data), order_seed):
            for batch in order.split(recipe.batch_size):
                losses = F.cross_entropy(model(data.inputs[batch]), data.labels[batch], reduction="none")
                optimizer.zero_grad()
                ((losses * weights[batch]).sum() / len(batch)).backward()
                optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(second(TASKS.test.inputs), TASKS.test.labels, reduction="none")


@pytest.mark.parametrize("embedding", [0.0, 0.1, 1.0])
def test_two_runs_at_once_are_two_runs_one_after_the_other(embedding: float, tmp_path: Path) -> None:
    how, subsets = runs(embedding), [torch.arange(20), torch.tensor([2, 4, 6]), torch.arange(9, 0, -1)]
    weights = [torch.ones(len(subset)) for subset in subsets]
    weights[0][3] = 0
    found = retrain_both(how, TASKS, TASKS.test, subsets, weights=weights, seeds=(7, 8), cache=tmp_path, at_once=4)
    assert found.losses.shape == found.right.shape == (3, 2, 6)
    for s, (subset, weight) in enumerate(zip(subsets, weights, strict=True)):
        for r, seed in enumerate((7, 8)):
            expected = one_after_the_other(how, subset, weight, seed)
            torch.testing.assert_close(found.losses[s, r], expected, rtol=1e-10, atol=1e-12)


def test_what_is_known_is_read_and_settings_share_their_first_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = retrain_both(runs(0.0), TASKS, TASKS.test, [torch.arange(9)], seeds=(7,), cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_trained", lambda *_, **__: pytest.fail("trained again"))
        again = retrain_both(runs(0.0), TASKS, TASKS.test, [torch.arange(9)], seeds=(7,), cache=tmp_path)
    assert torch.equal(first.losses, again.losses)
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "_pretrained", lambda *_: pytest.fail("pretrained again"))
        tuned = retrain_both(runs(1.0), TASKS, TASKS.test, [torch.arange(9)], seeds=(7,), cache=tmp_path)
    assert not torch.equal(first.losses, tuned.losses)


def test_a_trainer_fits_the_retrained_models(tmp_path: Path) -> None:
    cut = tasks(
        digits(), pretraining=[0, 1], finetuning=[2, 3, 4], pretraining_size=40, finetuning_size=30
    )  # fmt: skip
    assert cut.classes == (2, 3) and cut.inputs == 64 and int(cut.finetuning.labels.max()) == 2
    for embedding in (0.0, 0.5):
        how = TwoRuns.of(cut, [5], PRETRAINING, Finetuning(Recipe(2, 10, 0.1), embedding))
        fits = fitted(how, cut, 7, tmp_path / str(embedding))
        truth = retrain_both(how, cut, cut.test, [torch.arange(40)], seeds=(7,), cache=tmp_path)
        with torch.no_grad():
            losses = F.cross_entropy(fits.second.module(cut.test.inputs), cut.test.labels, reduction="none")
        torch.testing.assert_close(losses.double(), truth.losses[0, 0], rtol=1e-3, atol=1e-4)
        assert multi_stage()(fits, cut.test, cut.pretraining).shape == (len(cut.test), 40)
        assert gradient_dot(fits, cut.test, cut.pretraining).shape == (len(cut.test), 40)


def test_predicted_changes_are_judged() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, groups = torch.randn(5, 30, generator=generator), [torch.tensor([i, i + 1]) for i in range(12)]
    foretold = removals.predicted(scores, groups)
    assert float(foretold[3, 2]) == pytest.approx(float(scores[2, 3] + scores[2, 4]) / 30)
    perfect = removals.agreement(foretold, 2 * foretold, resamples=50)
    assert perfect.pearson.low == pytest.approx(1) and perfect.spearman.value == pytest.approx(1)
    noise = removals.agreement(torch.randn(12, 5, generator=generator).double(), foretold, resamples=50)
    assert removals.ahead(perfect, noise).low > 0
    weights = removals.without(groups[:1], 30)
    assert [int(w.sum()) for w in weights] == [30, 28]


def run(program: Any, name: str, folder: Path, *overrides: str) -> tuple[float, str]:
    """What a recipe returns and writes; its cells must be there, and finite."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, [*SMALL, f"results={folder}/{name}", f"cache={folder}/truths", *overrides])
    value = program.main.__wrapped__(config)
    text = (folder / f"{name}.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 3 and "nan" not in text and "inf " not in text
    assert (folder / f"{name}.png").stat().st_size > 10_000
    assert f"`python recipes/{name}.py`" in text
    return value, text


def test_two_stages(tmp_path: Path) -> None:
    value, text = run(
        two_stages, "two_stages", tmp_path, "retrained=[7,8]", "queries=8", "finetuning.fixed.recipe.epochs=3",
        "~finetuning.updated_slowly", "finetuning.updated.recipe.epochs=3",
        "truth.subsets=6", "truth.groups=6", "truth.group_size=5", "truth.singles=5", "tracin_checkpoints=2",
    )  # fmt: skip
    assert -1 <= value <= 1
    for name in ("multi-stage, EK-FAC", "multi-stage, SOURCE, exact", "gradient dot product", "random"):
        assert f"| {name} |" in text


def test_pretraining_cleansing(tmp_path: Path) -> None:
    value, text = run(pretraining_cleansing, "pretraining_cleansing", tmp_path, "finetuning.recipe.epochs=3")
    assert 0 <= value <= 1
    assert "| self-influence" in text and "| random |" in text


def test_task_similarity(tmp_path: Path) -> None:
    value, text = run(
        task_similarity, "task_similarity", tmp_path, "finetuning.recipe.epochs=3", "queries=8", "angles=[0,90]",
        "sizes=[20,40]",
        "truth.groups=4", "truth.group_size=5",
    )  # fmt: skip
    assert value > 0
    assert "rotated by 90°" in text and "shuffled" in text
