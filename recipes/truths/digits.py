"""The digits set-up: scikit-learn's digits, two small classifiers, their recipes, and the truths of half-subsets.

python recipes/truths/digits.py mlp --cache /tmp/truths
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningModule
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from recipes.truths.retraining import Samples, Truth, random_subsets, retrain
from recipes.truths.training import Build, Recipe, initial, train

Kind = Literal["logistic_regression", "mlp"]
Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
SEEDS = tuple(range(100, 105))  # of the retrained models
REFERENCE_SEEDS = (0, 1, 2)  # of the models that are explained


def logistic_regression() -> nn.Sequential:
    """One linear layer."""
    return nn.Sequential(nn.Linear(64, 10))


def mlp() -> nn.Sequential:
    """Three linear layers, 64-128-64-10, with ReLU between them."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


MODELS: dict[Kind, Build] = {"logistic_regression": logistic_regression, "mlp": mlp}
RECIPES: dict[Kind, Recipe] = {
    "logistic_regression": Recipe(epochs=30, batch_size=50, learning_rate=0.1, weight_decay=1e-4),
    "mlp": Recipe(epochs=30, batch_size=50, learning_rate=0.05, momentum=0.9, weight_decay=1e-4),
}


class DigitsClassifier(LightningModule):
    """One of the two models with its recipe's optimizer."""

    def __init__(self, model: Kind = "mlp") -> None:
        super().__init__()
        self.model = MODELS[model]()
        self.recipe = RECIPES[model]

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)  # (B, 10)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        inputs, labels = batch
        return F.cross_entropy(self(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.recipe.optimizer(self)


@dataclass(frozen=True)
class Digits:
    """1,000 training images and 200 queries, of 64 pixels between 0 and 1."""

    train: Samples
    queries: Samples


def digits() -> Digits:
    """The digits, split as in every table of ours."""
    images, train, queries, _ = _parts()
    return Digits(_chosen(images, train), _chosen(images, queries))


def held_out(count: int = 200) -> Samples:
    """Some of the 597 images that are neither trained on nor asked about."""
    images, _, _, rest = _parts()
    return _chosen(images, np.random.default_rng(0).permutation(rest)[:count])


def _parts() -> tuple[Samples, Indices, Indices, Indices]:
    """All 1,797 images, and which of them are for training, queries, and neither."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    inputs, labels = load_digits(return_X_y=True)
    every = np.arange(len(labels))
    train, queries = train_test_split(every, train_size=1000, test_size=200, random_state=0, stratify=labels)
    images = Samples(torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels, dtype=torch.long))
    return images, train, queries, np.setdiff1d(every, [*train, *queries])


def _chosen(images: Samples, indices: Indices) -> Samples:
    return Samples(images.inputs[indices].contiguous(), images.labels[indices].contiguous())


def half_subsets(count: int = 100, size: int = 1000) -> list[Tensor]:
    """Random halves of the training set."""
    return random_subsets(size, count, 0.5, seed=1)


def half_subset_truth(kind: Kind, cache: str | os.PathLike[str]) -> Truth:
    """The queries' losses (100, 5, 200) of the models retrained on the halves; minutes, once for each cache folder."""
    data = digits()
    return retrain(MODELS[kind], RECIPES[kind], data.train, data.queries, half_subsets(), seeds=SEEDS, cache=cache)


def reference_model(kind: Kind, seed: int, cache: str | os.PathLike[str]) -> nn.Module:
    """A model trained on all 1,000 samples, in eval mode; it is what the estimators explain."""
    path = Path(cache) / f"reference-{kind}-{seed}.safetensors"
    if path.exists():
        model = initial(MODELS[kind], seed).eval()
        load_model(model, path)
        return model
    samples = digits().train
    model = train(MODELS[kind], RECIPES[kind], samples.inputs, samples.labels, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_model(model, str(temporary))
    os.replace(temporary, path)
    return model


def main() -> None:
    from lightning_influence.metrics import noise_ceiling

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=get_args(Kind))
    parser.add_argument("--cache", type=Path, required=True, help="folder of the results, kept between runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth = half_subset_truth(options.kind, options.cache)
    data = digits()
    for seed in REFERENCE_SEEDS:
        model = reference_model(options.kind, seed, options.cache)
        right = (model(data.queries.inputs).argmax(1) == data.queries.labels).float().mean()
        print(f"reference model, seed {seed}: {float(right):.1%} of the queries right")
    for name, measured in {"loss": truth.losses, "log-odds": truth.log_odds}.items():
        ceiling = noise_ceiling(measured)
        print(f"{options.kind}, {name}: halves of the seeds agree to {ceiling.halves}, noise ceiling {ceiling}")


if __name__ == "__main__":
    main()
