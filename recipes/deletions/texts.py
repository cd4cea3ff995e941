"""A data set of texts twice: as a user's DataModule has it, and as padded tensors for training many models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Subset

from recipes.data import TextDataModule
from recipes.data.text_data_module import EncodedTexts, Sample, collate
from recipes.data.vocabulary import PADDING
from recipes.truths.retraining import Samples
from recipes.truths.training import Recipe, RecipesOrder


@dataclass(frozen=True)
class Texts:
    """Training and held-out texts.

    Args:
        data: after its setup().
        train: tokens (N, T), padded with 0, and labels (N,).
        test: the same of the held-out texts.
    """

    data: TextDataModule
    train: Samples
    test: Samples

    @classmethod
    def of(cls, data: TextDataModule) -> Texts:
        """Both forms of a data set."""
        data.setup()
        return cls(data, _padded(data.train_dataloader()), _padded(data.test_dataloader()))

    def loader(self, recipe: Recipe, seed: int) -> DataLoader[Sample]:
        """The training texts in the batches of the recipe and the seed."""
        dataset = self.data.train_dataloader().dataset
        order = RecipesOrder(recipe, len(self.train), seed)
        return DataLoader(dataset, recipe.batch_size, sampler=order, collate_fn=collate)

    def batch(self, positions: Sequence[int]) -> Sample:
        """Some held-out texts as one batch."""
        dataset = Subset(self.data.test_dataloader().dataset, list(positions))
        batch: Sample = next(iter(DataLoader(dataset, len(positions), collate_fn=collate)))
        return batch

    def drawn(self, count: int, seed: int) -> Tensor:
        """Positions (count,) of held-out texts, at random."""
        return torch.randperm(len(self.test), generator=torch.Generator().manual_seed(seed))[:count]


def _padded(loader: DataLoader[Sample]) -> Samples:
    dataset = loader.dataset
    assert isinstance(dataset, EncodedTexts)
    samples = [dataset[i] for i in range(len(dataset))]
    tokens = pad_sequence([sample["tokens"] for sample in samples], batch_first=True, padding_value=PADDING)
    return Samples(tokens, torch.stack([sample["label"] for sample in samples]), padding=PADDING)
