"""The hunt for wrong labels: its data, its scores against slow ones, and the whole recipe on a few docstrings."""

from __future__ import annotations

import csv
import json
import shutil
import sysconfig
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor

from recipes import mislabel_hunt
from recipes.data import TextDataModule
from recipes.data.corpus import Corpus
from recipes.hunting import out_of_fold
from recipes.hunting.data import Hunted, images, texts
from recipes.hunting.fitting import Fit, Training, accuracy, accuracy_without, fitted
from recipes.hunting.suspicion import Suspicion, forgetting, gradient_norm, suspicions
from recipes.images.data import digits
from recipes.images.models import ImageClassifier, small_cnn
from recipes.models import TextCNN

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
pytest.importorskip("sklearn")
pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")  # it stops early here


class Sentences:
    """Texts whose class is in their words."""

    def load(self) -> Corpus:
        words = ("red blue green", "one two three")
        made = [f"{words[i % 2].split()[i % 3]} {words[i % 2].split()[(i // 2) % 3]} word{i % 7}" for i in range(90)]
        labels = tuple(i % 2 for i in range(90))
        return Corpus(("colour", "number"), tuple(made[:60]), labels[:60], tuple(made[60:]), labels[60:])


def of_texts(seed: int = 0, size: int | None = None) -> Hunted:
    model = partial(TextCNN, embedding_dim=8, channels=[6], kernel_size=3, learning_rate=0.01)
    return texts(TextDataModule(Sentences()), model, held_out=10, size=size, flipped=0.1, seed=seed)


def of_images(seed: int = 0) -> Hunted:
    model = partial(ImageClassifier, partial(small_cnn, widths=(4,), hidden=8), learning_rate=0.1)
    return images(digits(), model, held_out=20, size=200, flipped=0.1, seed=seed)


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    return fitted(of_texts(), Training(3, 16, dtype="float32"), 0, tmp_path_factory.mktemp("hunt") / "store")


@pytest.fixture(scope="module")
def scored(fit: Fit) -> dict[str, Suspicion]:
    return {suspicion.title: suspicion for suspicion in suspicions(fit, 0)}


@pytest.mark.parametrize("make", [of_texts, of_images])
def test_a_tenth_of_the_labels_is_flipped_and_nothing_else(make) -> None:
    hunted, same, other = make(0), make(0), make(1)
    assert int(hunted.wrong.sum()) == round(0.1 * len(hunted))
    assert torch.equal(hunted.labels, same.labels) and not torch.equal(hunted.wrong, other.wrong)
    right = Sentences().load().train_labels if make is of_texts else digits().train.labels[:200].tolist()
    assert torch.equal(hunted.labels != torch.tensor(right), hunted.wrong)
    given = torch.cat([b["label"] if isinstance(b, dict) else b[1] for b in hunted.loader(hunted.train, 16)])
    assert torch.equal(given, hunted.labels)


def test_held_out_and_test_texts_are_disjoint() -> None:
    hunted = of_texts()
    first, second = set(hunted.held_out.indices), set(hunted.test.indices)
    assert len(first) == 10 and not first & second and first | second == set(range(30))


def test_fewer_texts() -> None:
    hunted = of_texts(size=20)
    assert len(hunted) == len(hunted.texts) == 20 and int(hunted.wrong.sum()) == 2
    rest = iter(Sentences().load().train_texts)
    assert all(text in rest for text in hunted.texts)  # in the order of the whole set


def test_dropping_leaves_the_others() -> None:
    hunted = of_texts()
    left = hunted.without(torch.tensor([0, 3, 59]))
    assert left.indices == [i for i in range(60) if i not in (0, 3, 59)]


def test_every_score_has_one_finite_number_a_sample(scored: dict[str, Suspicion]) -> None:
    for suspicion in scored.values():
        assert suspicion.scores.shape == (60,) and suspicion.scores.dtype == torch.float64
        assert suspicion.scores.isfinite().all(), suspicion.title
    assert {suspicion.kind for suspicion in scored.values()} == {
        "self-influence", "opponents", "harm", "dynamics", "baseline",
    }  # fmt: skip


def gradients(fit: Fit, batches: list[dict[str, Tensor]]) -> Tensor:
    """Of each sample alone, all parameters in a row, in eval mode at the last checkpoint: (N, P)."""
    rows = []
    for batch in batches:
        loss = F.cross_entropy(fit.module(batch["tokens"]), batch["label"])
        found = torch.autograd.grad(loss, list(fit.module.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return torch.stack(rows).double()


def test_gradient_norm_and_dynamics_are_those_of_single_samples(fit: Fit, scored: dict[str, Suspicion]) -> None:
    alone = list(fit.hunted.loader(fit.hunted.train, 1))
    assert torch.allclose(gradient_norm(fit), gradients(fit, alone).norm(dim=1), rtol=1e-4)
    with torch.no_grad():
        losses = torch.cat([F.cross_entropy(fit.module(b["tokens"]), b["label"])[None] for b in alone]).double()
    assert torch.allclose(scored["final loss"].scores, losses, rtol=1e-4, atol=1e-6)
    margins = [fit.store.dynamics(checkpoint)["margin"] for checkpoint in fit.store.checkpoints()]
    assert len(margins) == 3
    assert torch.allclose(scored["mean margin"].scores, -sum(margins).double() / 3, atol=1e-6)


def test_opponents_are_minus_the_group_score_and_harm_has_its_negative_part(
    fit: Fit, scored: dict[str, Suspicion]
) -> None:
    from lightning_influence import InfluenceFunction

    influence = fit.ask(InfluenceFunction())
    summed = influence.group_scores(fit.held_out).double()
    assert torch.allclose(scored["opponents, IF, all layers"].scores, -summed, rtol=1e-3, atol=1e-3 * summed.std())
    pairs = torch.cat([influence.scores(batch) for batch in fit.held_out]).double()
    slowly = [sum(max(0.0, -pairs[q, n].item()) for q in range(len(pairs))) for n in range(60)]
    assert torch.allclose(scored["harm, IF, all layers"].scores, torch.tensor(slowly).double(), rtol=1e-6)


def test_forgetting_is_counted() -> None:
    drawn = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for n, found in enumerate(forgetting(drawn).tolist()):
        right = [value > 0 for value in drawn[:, n].tolist()]
        assert found == (sum(a and not b for a, b in pairwise(right)) if any(right) else 6)


def test_the_baseline_doubts_flipped_labels() -> None:
    hunted = of_texts()
    doubt = hunted.doubt()
    assert doubt.shape == (60,) and bool(((doubt >= 0) & (doubt <= 1)).all())
    assert doubt[hunted.wrong].mean() > doubt[~hunted.wrong].mean() + 0.2
    assert torch.equal(doubt, out_of_fold.of_texts(hunted.texts, hunted.labels, 0))
    pixels = of_images()
    assert pixels.doubt()[pixels.wrong].mean() > pixels.doubt()[~pixels.wrong].mean() + 0.2


def test_images_are_hunted_too(tmp_path: Path) -> None:
    hunted = of_images()
    training = Training(2, 50)
    fit = fitted(hunted, training, 0, tmp_path / "store")
    titles = [suspicion.title for suspicion in suspicions(fit, 0) if suspicion.scores.isfinite().all()]
    assert {"self-influence, IF, last layer", "harm, TracIn-Last", "mean margin", "out of fold"} <= set(titles)
    assert not any("WE" in title for title in titles)
    nothing = torch.tensor([], dtype=torch.int64)
    assert accuracy_without(hunted, nothing, training, 0) == accuracy(
        hunted, fit.module
    )  # the callbacks change nothing


def test_the_recipe_on_a_few_docstrings(tmp_path: Path) -> None:
    library, some = Path(sysconfig.get_path("stdlib")), tmp_path / "stdlib"
    for name in ("email", "asyncio", "json", "unittest", "logging", "importlib", "collections"):
        shutil.copytree(library / name, some / name)
    for name in (
        "tarfile.py",
        "difflib.py",
        "shutil.py",
        "os.py",
        "random.py",
        "statistics.py",
        "fractions.py",
        "hashlib.py",
    ):
        shutil.copy(library / name, some)  # some of every area are read faster than all
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(
            "mislabel_hunt",
            [
                "quick=true",
                "when_quick.hunted.size=300",
                "hunted.held_out=50",
                "when_quick.training.epochs=2",
                "when_quick.training.every_n_epochs=1",
                f"results={tmp_path}/hunt",
                f"+data.source.root={tmp_path}/stdlib",
                "+data.source.min_sentences=300",
                f"folder={tmp_path}",
            ],
        )
    best = mislabel_hunt.main.__wrapped__(config)  # type: ignore[attr-defined]
    assert 0 < best <= 1
    text = (tmp_path / "hunt.md").read_text()
    assert "`python recipes/mislabel_hunt.py`" in text and "| mean margin |" in text
    assert "| mean margin | 20% |" in text and "| exactly the flipped ones |" in text
    assert (tmp_path / "hunt.png").stat().st_size > 5_000
    with open(tmp_path / "issues.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["is_label_issue"] == "True" for row in rows) == 30 and len(rows) == 300
    lines = (tmp_path / "issues.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [row["text"] for row in rows]
