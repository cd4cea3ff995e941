"""What a query through two stages costs: EK-FAC at both, beside a plain influence function of the pretraining run.

    python recipes/benchmarks/multi_stage_cost.py --rounds 5 --out recipes/results/multi_stage_cost.md

A network of some 150 thousand parameters is pretrained and finetuned on random vectors by real fits with the callbacks;
the encoder is tuned in one finetuning run and frozen in another. The plain query asks the pretraining run with its
gradients stored; those through a link ask the finetuning run, and score the same stored gradients. The frozen link
multiplies with the Hessian of the finetuning loss, a walk of its own. Memory is the peak of a fresh process, torch and
the model included, which asks once.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import (
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MultiStage,
    StageLinker,
)
from recipes.benchmarks.measuring import interleaved, report, timed

PRETRAINING, FINETUNING, QUERIES, INPUTS, WIDTH = 4000, 1000, 50, 128, 256
PLAIN, TUNED, FROZEN, IGNORED = "plain, one run", "tuned link", "frozen link", "frozen link, cross terms ignored"


class Classifier(LightningModule):
    """Two tanh layers, and a head."""

    def __init__(self, classes: int, frozen: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, classes)
        self.encoder.requires_grad_(not frozen)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.encoder(x)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def samples(count: int, classes: int, seed: int) -> DataLoader[Any]:
    """Gaussian vectors whose first entries say the class."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=draw)
    return DataLoader(TensorDataset(x, x[:, :classes].argmax(1)), batch_size=100)


def fitted(root: Path, module: Classifier, data: DataLoader[Any], *callbacks: Any) -> None:
    Trainer(
        default_root_dir=root, max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
    ).fit(module, data)  # fmt: skip


def prepared(root: Path) -> None:
    """All three fits, and their modules' weights."""
    torch.manual_seed(0)
    pretrained = Classifier(10)
    both = GradientSnapshot(root / "pre", "all"), CurvatureSnapshot(root / "pre")
    fitted(root, pretrained, samples(PRETRAINING, 10, 0), *both)
    torch.save(pretrained.state_dict(), root / "pre.pt")
    for name, frozen in (("tuned", False), ("frozen", True)):
        module = Classifier(5, frozen)
        module.encoder.load_state_dict(pretrained.encoder.state_dict())
        linker = StageLinker(root / name, pretrain=root / "pre")
        fitted(root, module, samples(FINETUNING, 5, 1), linker, CurvatureSnapshot(root / name))
        torch.save(module.state_dict(), root / f"{name}.pt")


def question(root: Path, what: str) -> Callable[[], Tensor]:
    """What asks for all scores of the queries."""
    name = {PLAIN: "pre", TUNED: "tuned"}.get(what, "frozen")
    module = Classifier(10 if what == PLAIN else 5)
    module.load_state_dict(torch.load(root / f"{name}.pt", weights_only=True))
    plain = InfluenceFunction("ekfac")
    estimator = plain if what == PLAIN else MultiStage(plain, ignore_cross_terms=what == IGNORED)
    data = samples(PRETRAINING, 10, 0) if what == PLAIN else samples(FINETUNING, 5, 1)
    influence = InfluenceModule(module, root / name, estimator, train_loader=data)
    batch = samples(QUERIES, 10 if what == PLAIN else 5, 2).dataset[:]
    return lambda: influence.scores(batch)


def peak(root: Path, what: str) -> float:
    """Megabytes that a fresh process has needed when it has asked."""
    command = [sys.executable, __file__, "--root", str(root), "--ask", what]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def high_water() -> float:
    """Megabytes that this program has held at most; what its parent held does not count, as it does in getrusage."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.ask:
        question(options.root, options.ask)()
        print(high_water())
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared(root)
        kinds = (PLAIN, TUNED, FROZEN, IGNORED)
        measured = interleaved(
            {what: (lambda what=what: timed(question(root, what))) for what in kinds},  # type: ignore[misc]
            options.rounds,
        )
        rows = [measured.row(what, PLAIN, **{"peak memory, MB": round(peak(root, what))}) for what in kinds]
    report(
        "The cost of a query through two stages", rows, options.out, pretraining=PRETRAINING, finetuning=FINETUNING,
        queries=QUERIES, rounds=options.rounds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
