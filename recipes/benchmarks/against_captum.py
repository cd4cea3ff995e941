"""TracIn-WE against Captum's `TracInCP` restricted to the embedding layer: the same scores, and how many times sooner.

    python recipes/benchmarks/against_captum.py --rounds 5 --out recipes/results/against_captum.md

It needs an environment with captum (README.md here says how). A small text classifier (vocabulary 2,000, 32 words a
text, an embedding, a convolution, a linear layer, SGD) is fitted for three epochs on 1,000 texts, and 50 queries are
scored. Captum gets the weights and learning rates of the store's three checkpoints, and runs in its sample-by-sample
mode, the only one in which it does not drop the embedding. Ours counts twice: the query alone (gradients of the queries
at every checkpoint, reading the store, scoring), and the query with every callback hook of the fit: self-check, replay,
its worker processes, writing. A fresh store is made for that each time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import ArtifactStore, GradientSnapshot, InfluenceModule, TracInWE
from recipes.benchmarks.measuring import ClockedGradients, interleaved, report, timed

VOCABULARY, LENGTH, WIDTH, BATCH, EPOCHS, RATE = 2000, 32, 64, 50, 3, 0.1
SAMPLES, QUERIES = 1000, 50


class Classifier(LightningModule):
    """Words in, one of four classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, words: Tensor) -> Tensor:
        hidden: Tensor = self.convolution(self.embedding(words).transpose(1, 2)).relu()
        logits: Tensor = self.head(hidden.amax(2))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, labels = batch
        return F.cross_entropy(self(words), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def texts(count: int, seed: int) -> TensorDataset:
    """Random texts with a Zipf-like vocabulary; the class follows from the words."""
    draw = torch.Generator().manual_seed(seed)
    share = 1 / (torch.arange(VOCABULARY) + 2.7)
    words = torch.multinomial(share, count * LENGTH, replacement=True, generator=draw).view(count, LENGTH)
    return TensorDataset(words, words.sum(1) % 4)


def fit(data: TensorDataset, callback: GradientSnapshot) -> Classifier:
    """The trained classifier."""
    seed_everything(0, verbose=False)
    module = Classifier()
    trainer = Trainer(
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[callback],
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH, shuffle=True))
    return module


def captum_scores(module: Classifier, store: ArtifactStore, data: TensorDataset, queries: TensorDataset) -> Tensor:
    """Captum's influence scores (Q, N) of the embedding layer at the checkpoints and rates of the store."""
    from captum.influence import TracInCP

    steps = {str(checkpoint.step): checkpoint for checkpoint in store.checkpoints()}

    def load(model: nn.Module, step: str) -> float:
        model.load_state_dict(store.weights(steps[step]))
        return steps[step].learning_rate("embedding.weight")

    tracin = TracInCP(
        module,
        data,
        list(steps),
        checkpoints_load_func=load,
        layers=["embedding"],
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=BATCH,
        sample_wise_grads_per_batch=False,
    )
    words, labels = queries.tensors
    scores: Tensor = tracin.influence((words, labels))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    try:
        import captum
    except ImportError:
        sys.exit("captum is not installed. HINT: recipes/benchmarks/README.md says how to give it its own environment")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    data, queries = texts(SAMPLES, 0), texts(QUERIES, 1)
    with tempfile.TemporaryDirectory() as folder:
        module = fit(data, GradientSnapshot(folder + "/store"))
        store = ArtifactStore.open(folder + "/store")
        influence = InfluenceModule(module, store, TracInWE())
        theirs, ours = captum_scores(module, store, data, queries), influence.scores(queries.tensors)
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if error > 1e-5:
            sys.exit(f"Expected equal scores, found a difference of {error:.2g} of the largest.")

        def everything() -> float:
            with tempfile.TemporaryDirectory() as fresh:
                clock = ClockedGradients(fresh + "/store")
                fitted = fit(data, clock)
                asked = InfluenceModule(fitted, fresh + "/store", TracInWE())
                return clock.seconds + timed(lambda: asked.scores(queries.tensors))

        name = f"Captum {captum.__version__}, TracInCP.influence"
        variants: dict[str, Callable[[], float]] = {
            name: lambda: timed(lambda: captum_scores(module, store, data, queries)),
            "replay, writing and query": everything,
            "query alone": lambda: timed(lambda: influence.scores(queries.tensors)),
        }
        found = interleaved(variants, options.rounds)
    rows = []
    for variant in variants:
        times = found.row(name, variant)  # Captum's seconds over this variant's
        own = found.row(variant, variant)["CPU s"]
        shown = {"Captum takes": times["ratio"], "least": times["least"], "most": times["most"]}
        rows.append({"what": variant, "CPU s": own, **shown})
    settings = {"rounds": options.rounds, "difference of the scores, of the largest": f"{error:.1e}"}
    report("TracIn-WE and Captum's TracInCP on the embedding layer", rows, options.out, **settings)


if __name__ == "__main__":
    main()
