"""Bytes of a store for each sample and checkpoint, and a query over a store five times the memory that it may have.

    python recipes/benchmarks/storage.py --out recipes/results/storage.md

Texts of 64 words from a Zipf-like vocabulary of 20,000, word vectors of 128, as GradientSnapshot writes them.

The query runs in a process of its own. Once that has imported everything, built the model and answered from a small
store, the kernel's RLIMIT_DATA is set to what it has then plus a fifth of the large store: whatever it allocates or
maps beyond that fails. The limit is stricter than the memory in use, for it counts the whole of every shard that is
memory-mapped at the moment, once for each opening, read or not. So beside it stands the most anonymous memory that
the query added, sampled every two milliseconds: that which no file stands behind, and which the system cannot take
back as it can the pages of a shard. As a control the same process then tries to read the whole store, which must fail.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import ArtifactStore, GradientSnapshot, InfluenceModule, TracInWE
from recipes.benchmarks.measuring import Row, report

WORDS, LENGTH, WIDTH, BATCH, QUERIES, TIMES = 20_000, 64, 128, 100, 100, 5


class Classifier(LightningModule):
    """Mean of word vectors and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def texts(count: int) -> TensorDataset:
    """Random texts with word frequencies that fall as 1 / rank."""
    draw = torch.Generator().manual_seed(0)
    share = 1 / torch.arange(1.0, WORDS)
    words = 1 + torch.multinomial(share, count * LENGTH, replacement=True, generator=draw).view(count, LENGTH)
    return TensorDataset(words, words[:, 0] % 4)


def store_of(folder: Path, data: TensorDataset, epochs: int = 1, **settings: Any) -> ArtifactStore:
    """The store of a fit, one checkpoint an epoch."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GradientSnapshot(folder, **settings)],
    )
    trainer.fit(Classifier(), DataLoader(data, BATCH, shuffle=True))
    return ArtifactStore.open(folder)


def gradient_bytes(store: ArtifactStore) -> int:
    """Bytes of a store's gradient files."""
    return sum(artifact.bytes for artifact in store.artifacts("gradients"))


def sizes(folder: Path) -> list[Row]:
    """A line for each dtype, with all words and with the top ten."""
    data = texts(2000)
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16"):
        for top in (None, 10):
            store = store_of(folder / f"{dtype}-{top}", data, dtype=dtype, top_words=top)
            words = "all words" if top is None else f"top {top} words"
            rows.append({"what": f"{dtype}, {words}", "bytes a sample": round(gradient_bytes(store) / len(data))})
    return rows


def kilobytes(file: str, field: str) -> int:
    """A field of one of this process's /proc files, in bytes."""
    for line in Path("/proc/self", file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"Expected a line {field!r} in /proc/self/{file}. HINT: this part needs Linux")


def ask(small: Path, large: Path, allowed: int) -> dict[str, int | str]:
    """In a process of its own: the query under the limit, the anonymous memory it added, and what the control said."""
    batch = texts(QUERIES).tensors
    InfluenceModule(Classifier(), small, TracInWE(), k=10).query(batch)  # code and libraries are loaded by now
    influence = InfluenceModule(Classifier(), large, TracInWE(), k=10)
    before, peak, done = kilobytes("smaps_rollup", "Anonymous"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, kilobytes("smaps_rollup", "Anonymous"))

    thread = threading.Thread(target=watch)
    thread.start()
    limit = kilobytes("status", "VmData") + allowed
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        influence.query(batch)
    finally:
        done.set()
        thread.join()
    control = "the whole store fits too: the limit has no effect here"
    try:
        held = [
            {name: tensor.clone() for name, tensor in shard.tensors.items()}
            for checkpoint in influence.store.checkpoints()
            for shard in influence.store.shards(checkpoint)
        ]
        del held
    except Exception as error:  # whichever allocation is the first to fail
        control = f"reading the whole store fails ({type(error).__name__})"
    return {"peak": max(0, peak - before), "control": control}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    parser.add_argument("--samples", type=int, default=26_000, help="texts of the large store")
    parser.add_argument("--ask", nargs=3, metavar=("SMALL", "LARGE", "BYTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if options.ask is not None:
        small, large, allowed = options.ask
        print(json.dumps(ask(Path(small), Path(large), int(allowed))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = sizes(folder)
        store = store_of(folder / "large", texts(options.samples), epochs=3)
        size = gradient_bytes(store)
        arguments = [str(folder / "float32-None"), str(store.root), str(size // TIMES)]
        command = [sys.executable, __file__, "--ask", *arguments]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(answer.splitlines()[-1])
    rows += [
        {"what": f"store of {options.samples:,} texts, 3 checkpoints", "MB": round(size / 1e6)},
        {"what": f"memory allowed to a query of {QUERIES} texts, obeyed", "MB": round(size / TIMES / 1e6)},
        {"what": "anonymous memory that the query added at its peak", "MB": round(found["peak"] / 1e6)},
        {"what": f"control: {found['control']}"},
    ]
    report(
        "Bytes for each sample and checkpoint, and the memory of a query", rows, options.out, samples=options.samples
    )


if __name__ == "__main__":
    main()
