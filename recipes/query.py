"""Ask a finished fit which training texts, and which of their words, made the model say what it says.

python recipes/query.py store=outputs/DATE/TIME/influence 'queries=[0,7]' measurement=predicted_class
"""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.utils import get_class, instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig
from torch.utils.data import DataLoader, Subset

from lightning_influence import ArtifactStore, InfluenceModule, TracInWE
from lightning_influence.report import Description, explain, save_page, text_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.data import TextDataModule
from recipes.data.text_data_module import Sample


def queries_of(data: TextDataModule, positions: list[int]) -> tuple[Sample, list[Description]]:
    """The held-out texts at these positions as one batch, and in words."""
    held_out = data.test_dataloader()
    batch = next(iter(DataLoader(Subset(held_out.dataset, positions), len(positions), collate_fn=held_out.collate_fn)))
    return batch, [Description(text_of(data.test_texts[i]), data.label_names[data.test_labels[i]]) for i in positions]


def described(data: TextDataModule, sample_id: int) -> Description:
    """A training text with its label, and a remark where the label was flipped on purpose."""
    note = data.label_names[data.train_labels[sample_id]]
    if data.flipped[sample_id]:
        note += f", flipped from {data.label_names[data.original_train_labels[sample_id]]}"
    return Description(text_of(data.train_texts[sample_id]), note)


def text_of(text: str | tuple[str, str]) -> str:
    """A text, or both texts of a pair, in one line."""
    return text if isinstance(text, str) else " || ".join(text)


@hydra.main(version_base="1.3", config_path="../configs", config_name="query")
def main(config: DictConfig) -> None:
    """Answer, print the table, and save the page."""
    data: TextDataModule = instantiate(config.data)
    data.setup()
    module = get_class(config.model._target_)
    assert issubclass(module, LightningModule)
    influence = InfluenceModule(
        module,
        ArtifactStore.open(config.store),
        instantiate(config.estimator),
        measurement=config.measurement,
        train_loader=data.train_dataloader(),
    )
    batch, texts = queries_of(data, list(config.queries))
    explanations = explain(
        influence,
        batch,
        queries=texts,
        describe=lambda i: described(data, i),
        decode=data.vocabulary.decode if isinstance(influence.estimator, TracInWE) else None,
        k=config.k,
    )
    print(text_table(explanations))
    print(f"the page with the words highlighted: {save_page(explanations, config.page)}")


if __name__ == "__main__":
    main()
