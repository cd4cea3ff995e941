"""Train a text classifier and log what influence queries need.

python recipes/fit.py
python recipes/fit.py data=ag_news data.source.data_root=/path/to/data model=text_transformer
python recipes/fit.py -m callbacks=tracin_we,in_flight seed=1,2        # a sweep: every job has a store of its own
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.data import TextDataModule


@dataclass(frozen=True)
class Fit:
    """What a finished fit leaves behind."""

    data: TextDataModule
    module: LightningModule
    trainer: Trainer
    accuracy: float


def fit(config: DictConfig) -> Fit:
    """Build data, model, callbacks and Trainer from the configuration, train, and measure the accuracy."""
    seed_everything(config.seed, workers=True, verbose=False)
    data: TextDataModule = instantiate(config.data)
    data.setup()
    module: LightningModule = instantiate(
        config.model, vocabulary_size=len(data.vocabulary), num_classes=len(data.label_names)
    )
    callbacks = list(instantiate(config.callbacks).values())
    trainer: Trainer = instantiate(config.trainer, callbacks=callbacks)
    print(f"{len(data.train_texts)} training texts, {len(data.test_texts)} held out, {len(data.vocabulary)} words")
    trainer.fit(module, data)
    accuracy = float(trainer.test(module, data, verbose=False)[0]["test_accuracy"])
    print(f"accuracy on the held-out texts: {accuracy:.3f}")
    return Fit(data, module, trainer, accuracy)


@hydra.main(version_base="1.3", config_path="../configs", config_name="fit")
def main(config: DictConfig) -> float:
    """Fit and return the accuracy, which a sweep can optimise."""
    finished = fit(config)
    print(f"the store is at {config.store}")
    return finished.accuracy


if __name__ == "__main__":
    main()
