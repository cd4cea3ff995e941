"""The whole journey in one command: train, ask three predictions for their reasons, and hunt for flipped labels.

python recipes/demo.py
python recipes/demo.py data=ag_news data.source.data_root=/path/to/data
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_influence import ArtifactStore, InfluenceModule, TracInLast, TracInWE
from lightning_influence.estimators.tracin import Preconditioner
from lightning_influence.metrics import MislabelDetection, mislabel_detection
from lightning_influence.report import explain, picture, save_page, text_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.data import TextDataModule
from recipes.fit import Fit, fit
from recipes.query import described, queries_of


def typical_queries(finished: Fit, count: int, least_words: int = 8) -> list[int]:
    """The first held-out texts of at least some words that the model classifies rightly, each of another class."""
    data, module = finished.data, finished.module.eval()
    chosen: dict[int, int] = {}
    position = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            predicted = module(batch["tokens"]).argmax(1)
            words = (batch["tokens"] > 1).sum(1)
            for guess, label, length in zip(predicted.tolist(), batch["label"].tolist(), words.tolist(), strict=True):
                if guess == label and length >= least_words:
                    chosen.setdefault(label, position)
                position += 1
            if len(chosen) >= count:
                break
    return sorted(chosen.values())[:count]


def hunt(influences: dict[str, InfluenceModule], data: TextDataModule, folder: Path, share: float = 0.1) -> None:
    """Say how many flipped labels come first by self-influence, and draw the curve."""
    flipped = torch.tensor(data.flipped)
    found = {name: mislabel_detection(i.self_influence(), flipped, at=[share]) for name, i in influences.items()}
    store = next(iter(influences.values())).store
    margin = torch.stack([store.dynamics(c)["margin"] for c in store.checkpoints()]).mean(0)
    found["mean margin"] = mislabel_detection(-margin, flipped, at=[share])
    print(f"\n{int(flipped.sum())} of {len(flipped)} training labels were flipped. Among the first {share:.0%}:")
    print(f"  at random                     {share:.0%} of them")
    for name in influences:
        print(f"  by self-influence, {name:10s} {found[name].at[0].recall:.0%}")
    print(f"  by mean margin over training  {found['mean margin'].at[0].recall:.0%}")
    figure, _ = MislabelDetection().plot(found)
    figure.savefig(folder / "flipped.png", dpi=130)


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo")
def main(config: DictConfig) -> None:
    """Fit, explain, hunt, and say what it cost."""
    start, folder = time.perf_counter(), Path(config.folder)
    finished = fit(config)
    data, store = finished.data, ArtifactStore.open(config.store)
    influence = InfluenceModule(finished.module, store, instantiate(config.estimator), measurement="predicted_class")

    batch, texts = queries_of(data, typical_queries(finished, config.num_queries))
    explanations = explain(
        influence,
        batch,
        queries=texts,
        describe=lambda i: described(data, i),
        decode=data.vocabulary.decode,
        k=config.k,
    )
    print("\nWhy does the model say this? Its training sentences answer:\n")
    print(text_table(explanations))
    save_page(explanations, folder / "answers.html")
    for index, explanation in enumerate(explanations):
        figure, _ = picture(explanation)
        figure.savefig(folder / f"answer-{index}.png")

    preconditioner: Preconditioner = "optimizer" if config.model.optimizer != "sgd" else None
    estimators = {
        "TracInWE": TracInWE(preconditioner=preconditioner),
        "TracInLast": TracInLast(preconditioner=preconditioner),
    }
    hunt({n: InfluenceModule(finished.module, store, e) for n, e in estimators.items()}, data, folder)

    overhead = store.manifest.facts["overhead"]
    assert isinstance(overhead, dict)
    size = sum(a.bytes for a in store.artifacts())
    print(
        f"\nThe callback took {overhead['seconds']:.0f} s beside {overhead['fit_seconds'] - overhead['seconds']:.0f} s"
    )
    print(f"of training, and wrote {size / 1e6:.0f} MB for {len(store.checkpoints())} checkpoints.")
    print(f"All of this took {time.perf_counter() - start:.0f} s. Pictures and the page are in {folder}")


if __name__ == "__main__":
    main()
