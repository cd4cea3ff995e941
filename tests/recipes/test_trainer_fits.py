"""Truths by ordinary Trainer fits: a sweep makes them, once, and they are read together."""

from __future__ import annotations

import csv
import gzip
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Trainer
from omegaconf.errors import MissingMandatoryValue

from lightning_influence.errors import StoreError
from recipes.truths.samples import random_subsets
from recipes.truths.trainer_fits import CONFIGS, TrainerTruth, retrain_one, trainer_truth

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program of its own may seed everything; a test gives it all back."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    with torch.random.fork_rng(devices=()):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Twelve texts and a tiny network with dropout."""
    folder = tmp_path / "data" / "ag_news"
    folder.mkdir(parents=True)
    (folder / "labels.txt").write_text("sea\nland\n")
    words = ["fish swims deep", "ship sails", "wave", "cow eats grass here", "tree grows", "hill"]
    for name, count in (("train", 12), ("test", 5)):
        with gzip.open(folder / f"{name}.csv.gz", "wt", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows([f"{words[i % 6]} {words[(i + i // 6) % 6]}", i % 6 // 3] for i in range(count))
    return [
        "data=ag_news", f"data.source.data_root={tmp_path}/data", "data.batch_size=4", "data.min_count=1",
        "model.embedding_dim=4", "model.channels=[3]", "model.kernel_size=3", "trainer.max_epochs=2",
        "queries=4", f"cache={tmp_path}/truths",
    ]  # fmt: skip


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts every fit had."""
    found: list[int] = []
    real = Trainer.fit

    def counted(self: Trainer, module: object, loader: object, *others: object) -> None:
        found.append(len(loader.dataset))  # type: ignore[attr-defined]
        real(self, module, loader, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "fit", counted)
    return found


def sweep(monkeypatch: pytest.MonkeyPatch, folder: Path, *overrides: str) -> None:
    """python recipes/retrain.py -m ..., in this process."""
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", f"hydra.sweep.dir={folder}/sweep"]
    monkeypatch.setattr(sys, "argv", ["retrain.py", "-m", *overrides, *quiet])
    runpy.run_path(str(ROOT / "recipes" / "retrain.py"), run_name="__main__")  # an imported main finds no configs


def test_a_sweep_makes_truths_once(
    overrides: list[str], fits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match=r"HINT: make them with: python recipes/retrain.py -m .* subset=0,1 seed=1"):
        trainer_truth(overrides, count=2, seeds=[1])
    sweep(monkeypatch, tmp_path, *overrides, "subset=0,1", "seed=1")
    assert fits == [6, 6]
    first = trainer_truth(overrides, count=2, seeds=[1])
    assert isinstance(first, TrainerTruth) and first.truth.losses.shape == first.truth.log_odds.shape == (2, 1, 4)
    assert [s.tolist() for s in first.subsets] == [s.tolist() for s in random_subsets(12, 2, 0.5, seed=0)]
    assert not torch.equal(first.truth.losses[0], first.truth.losses[1])

    with pytest.raises(StoreError) as refused:
        trainer_truth(overrides, count=3, seeds=[1, 2])
    assert "subset=2 seed=1 && python" in str(refused.value) and "subset=0,1,2 seed=2" in str(refused.value)
    sweep(monkeypatch, tmp_path, *overrides, "subset=range(0,3)", "seed=1,2")
    assert fits == [6, 6] + [6] * 4  # what was known is not trained again
    both = trainer_truth(overrides, count=3, seeds=[2, 1])
    assert torch.equal(both.truth.losses[:2, 1:], first.truth.losses)
    assert len(list((tmp_path / "truths").iterdir())) == 2  # a store for each seed


def test_a_job_is_a_function_of_its_configuration(
    overrides: list[str], fits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("here", "there"):
        own = [*overrides[:-1], f"cache={tmp_path}/{name}"]
        torch.rand(len(found) + 1)  # the random state at the start does not matter
        sweep(monkeypatch, tmp_path, *own, "subset=0", "seed=3")
        found.append(trainer_truth(own, count=1, seeds=[3]).truth.losses)
    assert torch.equal(*found) and len(fits) == 2
    for other in ("fraction=0.25", "drawn_by=1", "model.dropout=0.2", "trainer.max_epochs=1", "data.batch_size=3"):
        with pytest.raises(StoreError, match="not trained yet"):
            trainer_truth([*own, other], count=1, seeds=[3])
    trainer_truth([*own, "trainer.enable_progress_bar=true"], count=1, seeds=[3])  # is the same model


def test_what_cannot_be_made_or_read_is_refused(overrides: list[str]) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("retrain", [*overrides, "subset=-1"])
    with pytest.raises(ValueError, match="found -1"):
        retrain_one(config)
    with pytest.raises(ValueError, match="one seed or more"):
        trainer_truth(overrides, count=1, seeds=[])
    with pytest.raises(ValueError, match="one subset or more"):
        trainer_truth(overrides, count=0, seeds=[1])
    with pytest.raises(MissingMandatoryValue, match="cache"):
        trainer_truth(overrides[:-1], count=1, seeds=[1])
