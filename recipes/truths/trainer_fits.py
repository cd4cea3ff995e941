"""Truths by ordinary Trainer fits, for what cannot be trained side by side: dropout, BatchNorm, any optimizer.

    found = trainer_truth(["data=sst2", "model=text_cnn", "cache=truths"], count=10, seeds=[1, 2])
    found.subsets, found.truth.losses  # (S, seeds, Q), once recipes/retrain.py has made them

A job of `recipes/retrain.py` is one model: subset number i, drawn by a seed of its own, and a seed of the initial
weights, the batches and the dropout. Initial weights depend on that seed alone, and are the same for every subset.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset

from lightning_influence.artifacts.json_values import canonical, parse, plain
from lightning_influence.errors import StoreError
from recipes.data import TextDataModule
from recipes.data.text_data_module import EncodedTexts, Sample, collate
from recipes.data.vocabulary import PADDING
from recipes.truths.fitting import quiet_lightning
from recipes.truths.measuring import Truth, measure
from recipes.truths.samples import Samples, random_subsets
from recipes.truths.store import Origin, TruthStore, data_hash, model_hash, part_key
from recipes.truths.training import initial

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_WITHOUT_EFFECT = ("enable_progress_bar", "enable_model_summary", "logger")  # of a Trainer, on what is trained


@dataclass(frozen=True)
class TrainerTruth:
    """What ordinary fits on random parts of the training set say.

    Args:
        subsets: the parts, S of them.
        truth: losses and log-odds (S, seeds, Q).
    """

    subsets: list[Tensor]
    truth: Truth


@dataclass(frozen=True)
class _Texts:
    """A data module after its setup, and both sets as padded tensors with their hashes."""

    data: TextDataModule
    train: Samples
    test: Samples
    train_hash: str


@dataclass(frozen=True)
class TrainerFit:
    """One configuration with a seed: everything but the subset.

    Args:
        config: of `configs/retrain.yaml`.
        texts: its data.
        queries: the first held-out texts.
        module: with its initial weights.
        store: of its results.
    """

    config: DictConfig
    texts: _Texts
    queries: Samples
    module: LightningModule
    store: TruthStore

    @classmethod
    def of(cls, config: DictConfig) -> TrainerFit:
        """Load the data, build the model and open the store."""
        texts = _texts(canonical(plain(OmegaConf.to_container(config.data, resolve=True), "the data's configuration")))
        test, count = texts.test, config.queries
        queries = Samples(test.inputs[:count], test.labels[:count], padding=test.padding)
        build = instantiate(
            config.model,
            vocabulary_size=len(texts.data.vocabulary),
            num_classes=len(texts.data.label_names),
            _partial_=True,
        )
        module = initial(build, config.seed)
        assert isinstance(module, LightningModule)
        origin = Origin(
            model=model_hash(module),
            recipe=_recipe(config),
            train=texts.train_hash,
            train_size=len(texts.train),
            queries=data_hash(queries),
            query_count=len(queries),
            seed=int(config.seed),
            model_repr=repr(module),
        )
        return cls(config, texts, queries, module, TruthStore.at(config.cache, origin))

    def subsets(self, count: int) -> list[Tensor]:
        """The first parts of the training set."""
        return random_subsets(len(self.texts.train), count, self.config.fraction, self.config.drawn_by)

    def trained(self, subset: Tensor) -> Truth:
        """Fit the model on a part of the training set and measure the queries, (Q,) each; the module is used up."""
        seed_everything(self.config.seed, workers=True, verbose=False)
        dataset: Subset[Sample] = Subset(self.texts.data.train_dataloader().dataset, subset.tolist())
        loader = DataLoader(
            dataset, self.config.data.batch_size, shuffle=True, collate_fn=collate,
            num_workers=self.config.data.num_workers,
        )  # fmt: skip
        with quiet_lightning():
            trainer: Trainer = instantiate(self.config.trainer)
            trainer.fit(self.module, loader)
        return measure(self.module.cpu(), self.queries)


def retrain_one(config: DictConfig) -> bool:
    """Make the truth of one job; False where it is known already."""
    if config.subset < 0:
        raise ValueError(f"Expected a subset's number from 0 on, found {config.subset}.")
    fit = TrainerFit.of(config)
    subset = fit.subsets(config.subset + 1)[-1]
    key = _key(subset)
    if key in fit.store.known():
        return False
    fit.store.add({key: fit.trained(subset)})
    fit.store.tidy()
    return True


def trainer_truth(overrides: Sequence[str], *, count: int, seeds: Sequence[int]) -> TrainerTruth:
    """Read what the jobs of `recipes/retrain.py` have found.

    Args:
        overrides: as on its command line, without `subset` and `seed`.
        count: the first subsets, S of them.
        seeds: of the models.

    Raises:
        StoreError: some were not made yet; it names the command that makes them.
    """
    if not seeds:
        raise ValueError("Expected one seed or more, found none.")
    subsets: list[Tensor] = []
    found: list[Truth] = []
    missing: list[str] = []
    for seed in seeds:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            fit = TrainerFit.of(compose("retrain", [*overrides, f"seed={seed}"]))
        subsets = fit.subsets(count)
        keys = [_key(subset) for subset in subsets]
        known = fit.store.known()
        lacking = [str(number) for number, key in enumerate(keys) if key not in known]
        if lacking:
            jobs = [*overrides, f"subset={','.join(lacking)}", f"seed={seed}"]
            missing.append(f"python recipes/retrain.py -m {shlex.join(jobs)}")
        else:
            found.append(fit.store.read(keys))
    if missing:
        raise StoreError(
            f"some of the {count * len(seeds)} models were not trained yet",
            expected=f"subsets 0 to {count - 1} with the seeds {', '.join(map(str, seeds))}",
            found=f"none or a part of them for {len(missing)} of the seeds",
            hint="make them with: " + " && ".join(missing),
        )
    return TrainerTruth(
        subsets, Truth(torch.stack([t.losses for t in found], 1), torch.stack([t.log_odds for t in found], 1))
    )


@lru_cache(maxsize=1)  # the jobs of a sweep share it
def _texts(config: str) -> _Texts:
    data: TextDataModule = instantiate(OmegaConf.create(parse(config.encode())))
    data.setup()
    train, test = _padded(data.train_dataloader()), _padded(data.test_dataloader())
    return _Texts(data, train, test, data_hash(train))


def _padded(loader: DataLoader[Sample]) -> Samples:
    texts = loader.dataset
    assert isinstance(texts, EncodedTexts)
    return Samples(pad_sequence(texts.tokens, True, PADDING), texts.labels, padding=PADDING)


def _recipe(config: DictConfig) -> dict[str, Any]:
    """How a model is trained, as plain values."""
    trainer = dict(OmegaConf.to_container(config.trainer, resolve=True))  # type: ignore[arg-type]
    for name in _WITHOUT_EFFECT:
        trainer.pop(name, None)
    model = OmegaConf.to_container(config.model, resolve=True)
    recipe = {"trainer": trainer, "model": model, "batch_size": config.data.batch_size}
    return dict(plain(recipe, "the configuration of a fit"))


def _key(subset: Tensor) -> str:
    return part_key(subset, torch.ones(len(subset)))
