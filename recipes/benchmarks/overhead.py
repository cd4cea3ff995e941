"""What the callback costs a training run: CPU time of an epoch or a snapshot, as a ratio to the plain epoch.

    python recipes/benchmarks/overhead.py --rounds 7 --out recipes/results/overhead.md

A word transformer (embedding 5,000 x 128, 64 words, batch 64, two pre-norm blocks, AdamW, 24 batches an epoch), one
thread. In flight the epoch counts as a whole, with hooks, ids, writing and the flush at its end; of replay the snapshot
alone counts, from the end of the epoch to the committed checkpoint, its worker process included. The bare pass is what
no replay can do without: forward, and backward to the embedding's output; nothing is kept and nothing written.
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
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import GradientSnapshot
from recipes.benchmarks.measuring import cpu_seconds, interleaved, report, timed

VOCABULARY, LENGTH, BATCH, BATCHES, WIDTH = 5000, 64, 64, 24, 128


class Block(nn.Module):
    """A pre-norm transformer block with explicit linear layers."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.before(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        down: Tensor = self.down(F.gelu(self.up(self.between(x))))
        return x + down


class Classifier(LightningModule):
    """Words in, one of four classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.blocks = nn.Sequential(Block(WIDTH), Block(WIDTH))
        self.head = nn.Linear(WIDTH, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        words, labels = batch
        return F.cross_entropy(self.head(self.blocks(self.embedding(words)).mean(1)), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Reads the CPU clock in the second epoch; the first holds the self-check and whatever torch does only once.

    Attributes:
        started, ended: before the first batch, and after the last with everything before it among the callbacks.
        closed: when the fit is over.
    """

    started = ended = closed = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = cpu_seconds()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ended = cpu_seconds()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.closed = cpu_seconds()


def texts() -> TensorDataset:
    """Random texts, whose class follows from their first word."""
    seed_everything(0, verbose=False)
    words = torch.randint(1, VOCABULARY, (BATCH * BATCHES, LENGTH))
    return TensorDataset(words, words[:, 0] % 4)


def epoch(*callbacks: Callback) -> tuple[Clock, Clock]:
    """Two epochs; the clocks before and behind the callbacks."""
    data, first, last = texts(), Clock(), Clock()
    trainer = Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[first, *callbacks, last],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=BATCH, shuffle=True))
    return first, last


def plain() -> float:
    """CPU seconds of an epoch without any of it."""
    _, last = epoch()
    return last.closed - last.started


def in_flight(parameters: str) -> float:
    """CPU seconds of an epoch that is recorded as it trains."""
    with tempfile.TemporaryDirectory() as folder:
        _, last = epoch(GradientSnapshot(folder + "/store", parameters, mode="in_flight"))
    return last.closed - last.started


def replay() -> float:
    """CPU seconds of one snapshot."""
    with tempfile.TemporaryDirectory() as folder:
        first, last = epoch(GradientSnapshot(folder + "/store", "word_embeddings", mode="replay"))
    return last.ended - first.ended


def bare_pass() -> float:
    """CPU seconds of the gradients at the embedding's output alone."""
    module, loader = Classifier().eval(), DataLoader(texts(), batch_size=BATCH)
    looked_up: list[Tensor] = []
    module.embedding.register_forward_hook(lambda layer, args, output: looked_up.append(output))

    def walk() -> None:
        for index, batch in enumerate(loader):
            loss = module.training_step(batch, index)
            torch.autograd.grad(loss, looked_up.pop())

    walk()
    return timed(walk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    variants: dict[str, Callable[[], float]] = {
        "plain epoch": plain,
        "epoch, word embeddings in flight": lambda: in_flight("word_embeddings"),
        "epoch, last layer in flight": lambda: in_flight("last_layer"),
        "replay snapshot of word embeddings": replay,
        "bare pass over the training set": bare_pass,
    }
    found = interleaved(variants, options.rounds)
    rows = [found.row(name, "plain epoch") for name in variants]
    report("What the callback costs a training run", rows, options.out, rounds=options.rounds)


if __name__ == "__main__":
    main()
