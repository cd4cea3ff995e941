"""From which layer should influence be taken? A transformer's layers side by side, on texts with some labels flipped.

python recipes/compare_layers.py
python recipes/compare_layers.py data=ag_news data.source.data_root=/path/to/data train_size=1000
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lightning_influence import ArtifactStore, InfluenceModule, LayerComparison, compare_layers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.fit import Fit, fit
from recipes.query import queries_of


def with_fewer_texts(config: DictConfig) -> DictConfig:
    """The configuration with `train_size` texts, whatever the source."""
    source = {
        "_target_": "recipes.data.fewer_texts.FewerTexts",
        "source": config.data.source,
        "train_size": config.train_size,
    }
    fewer = OmegaConf.merge(config, {})
    assert isinstance(fewer, DictConfig)
    fewer.data.source = source
    return fewer


def compared(config: DictConfig, finished: Fit) -> LayerComparison:
    """All layers of a finished fit, asked about the first held-out texts."""
    influence = InfluenceModule(
        finished.module, config.store, instantiate(config.estimator), train_loader=finished.data.train_dataloader()
    )
    count = min(config.num_queries, len(finished.data.test_texts))
    queries, _ = queries_of(finished.data, list(range(count)))
    removals = instantiate(config.removals)
    return compare_layers(influence, [queries], flags=finished.data.flipped, removals=removals, k=config.k)


def command() -> str:
    """What was typed, without where results go and where the data lie."""
    typed = [word for word in HydraConfig.get().overrides.task if not word.startswith("results=")]
    typed = [
        "data.source.data_root=/path/to/data" if word.startswith("data.source.data_root=") else word for word in typed
    ]
    return " ".join(["python recipes/compare_layers.py", *typed])


def remarks(config: DictConfig, finished: Fit, seconds: float) -> str:
    """What was done."""
    data, store = finished.data, ArtifactStore.open(config.store)
    size = sum(artifact.bytes for artifact in store.artifacts())
    return (
        f"{type(finished.module).__name__} ({config.model.num_layers} blocks, width {config.model.embedding_dim}, "
        f"{config.model.optimizer}) on {len(data.train_texts)} texts, {sum(data.flipped)} of them with a flipped "
        f"label; {finished.accuracy:.1%} of {len(data.test_texts)} held-out texts right, seed {config.seed}. Queries: "
        f"the loss of held-out texts. The store has {size / 1e6:.0f} MB; comparing took {seconds:.0f} s."
    )


@hydra.main(version_base="1.3", config_path="../configs", config_name="compare_layers")
def main(config: DictConfig) -> float:
    """Fit, compare, write the table and the picture, and return the best area by self-influence of a layer."""
    torch.set_num_threads(1)
    finished = fit(with_fewer_texts(config))
    began = time.perf_counter()
    comparison = compared(config, finished)
    text = "\n\n".join(
        [
            f"# Layers compared, {HydraConfig.get().runtime.choices['data']}",
            f"`{command()}`",
            remarks(config, finished, time.perf_counter() - began),
            str(comparison),
        ]
    )
    print(text)
    results = Path(config.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.with_suffix(".md").write_text(text + "\n")
    figure, _ = comparison.plot()
    figure.savefig(results.with_suffix(".png"), dpi=130)
    return max(layer.found_by_self.auroc for layer in comparison.layers if layer.found_by_self is not None)


if __name__ == "__main__":
    main()
