"""Training with the callback is bit for bit the training without it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_influence import GradientSnapshot
from tests.callbacks.fits import WARNINGS, Classifier, fit, loader, seeded, state_hash

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:GradientSnapshot.mode='in_flight'. sees"),
]


class Meter:
    """State that hides in an attribute of an attribute."""

    def __init__(self) -> None:
        self.count, self.seen = 0, {"labels": [0]}


class Dirty(LightningModule):
    """Everything that a training step should perhaps not do."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.4)
        self.head = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.accuracy = MulticlassAccuracy(3)
        self.mean = MeanMetric()
        self.losses: list[Tensor] = []
        self.totals = [torch.zeros(1) for _ in range(2)]
        self.counter, self.meter = 0, Meter()
        self.noise = torch.Generator().manual_seed(2)
        self.rng = np.random.default_rng(4)

    def on_train_epoch_start(self) -> None:
        self.epoch_losses: list[float] = []  # exists from here on only

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, label = batch
        self.calls += 1
        self.counter += 1
        self.meter.count += 1
        self.meter.seen["labels"].append(int(label[0]))
        logits = self.head(self.drop(self.norm(self.words(tokens).mean(1))))
        loss = F.cross_entropy(logits, label) * (1 + 0.1 * torch.rand(()) + 0.01 * self.counter)
        self.trainer.steps_seen = getattr(self.trainer, "steps_seen", 0) + 1
        loss = loss * (1 + 0.01 * self.trainer.steps_seen)
        if len(label) == 1:
            self.trainer.should_stop = True
        loss = loss * (1 + 0.1 * torch.rand((), generator=self.noise) + 0.1 * self.rng.random())
        loss = loss * (1 + 0.1 * float(np.random.rand()) + 0.1 * random.random() + 0.001 * float(self.totals[0]))
        self.totals[0] += 1
        self.losses.append(loss.detach())
        self.epoch_losses.append(float(loss.detach()))
        self.accuracy(logits, label)
        self.mean.update(loss.detach())
        rate = self.optimizers().param_groups[0]["lr"]
        self.log("rate", rate + self.lr_schedulers().get_last_lr()[0], on_step=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"counter": float(self.counter), "meter": float(self.meter.count)}, on_step=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_mean", self.mean.compute())
        self.log("epoch_losses", sum(self.epoch_losses))
        self.mean.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every global generator, and from one of its own."""

    def __init__(self, own: bool = False) -> None:
        self.own = torch.Generator().manual_seed(7) if own else None

    def __len__(self) -> int:
        return 18

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        shift = int(torch.randint(0, 3, ())) + int(np.random.randint(0, 3)) + random.randrange(3)
        if self.own is not None:
            shift += int(torch.randint(0, 5, (), generator=self.own))
        return (torch.arange(5) * (position + 1) + shift) % 30, position % 3


class Counts(Augmented):
    """What it gives depends on how often it was read: by a counter, and by an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.turns = 0, itertools.cycle(range(7))

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.reads += 1
        draw = torch.Generator().manual_seed(self.reads)
        return (torch.randint(0, 30, (5,), generator=draw) + next(self.turns)) % 30, position % 3


class Lines(Dataset[tuple[Tensor, int]]):
    """Reads texts from one open file, by seek and readline, through a buffer."""

    def __init__(self, path: Path) -> None:
        self.starts = [0]
        self.file = path.open("rb")
        for line in self.file:
            self.starts.append(self.starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        self.file.seek(self.starts[position])
        return text(self.file.readline().decode())

    def __del__(self) -> None:
        self.file.close()


class Stream(IterableDataset[tuple[Tensor, int, int]]):
    """Goes on reading one open file where it is."""

    def __init__(self, path: Path) -> None:
        self.file = path.open()

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        self.file.seek(0)
        for position, line in enumerate(self.file):
            yield *text(line), position

    def __del__(self) -> None:
        self.file.close()


def text(line: str) -> tuple[Tensor, int]:
    numbers = [int(word) for word in line.split()]
    return torch.tensor(numbers[:5]) % 30, numbers[-1] % 3


class Heard(Classifier):
    """A classifier that writes down every sample it trains on."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 4)
        self.heard: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.heard += batch[0].tolist()
        return F.cross_entropy(self(batch[0]), batch[1])


class Adversarial(LightningModule):
    """Two networks, two optimizers, manual optimization."""

    def __init__(self, toggle: bool = True, generator_first: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.judge = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.toggle, self.generator_first = toggle, generator_first

    def turns(self) -> list[str]:
        return ["generator", "judge"] if self.generator_first else ["judge", "generator"]

    def turn(self, which: str, x: Tensor) -> Tensor:
        fake = self.generator(x)
        if which == "generator":
            return F.softplus(-self.judge(fake)).mean()
        return F.softplus(-self.judge(x[:, :2])).mean() + F.softplus(self.judge(fake.detach())).mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = dict(zip(("generator", "judge"), self.optimizers(), strict=True))
        for which in self.turns():
            optimizer = optimizers[which]
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = self.turn(which, batch)
            self.log(which, loss)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def per_sample_loss(self, batch: Tensor) -> Tensor:
        fake = self.generator(batch)
        return (F.softplus(-self.judge(batch[:, :2])) + F.softplus(self.judge(fake))).squeeze(1)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.02),
            torch.optim.SGD(self.judge.parameters(), lr=0.1),
        ]


def points(**options: Any) -> DataLoader[Any]:
    x = torch.randn(18, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(x, batch_size=4, shuffle=True, **options)  # type: ignore[arg-type]


def outcome(root: Path, make: Any, data: Any, snapshot: GradientSnapshot | None, **options: Any) -> tuple[str, str]:
    logger = CSVLogger(root, flush_logs_every_n_steps=1)
    run = fit(root, seeded(make), snapshot, data=data(), logger=logger, log_every_n_steps=1, **options)
    return state_hash(run), (Path(logger.log_dir) / "metrics.csv").read_text()


CASES: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "plain": (Classifier, loader, {"logger": None}, {}),
    "dirty": (Dirty, lambda: DataLoader(Augmented(), batch_size=4, shuffle=True), {}, {}),
    "dirty, two workers": (Dirty, lambda: DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2), {}, {}),
    "dirty, own generator": (Dirty, lambda: DataLoader(Augmented(own=True), batch_size=4, shuffle=True), {}, {}),
    "dirty, counting dataset": (Dirty, lambda: DataLoader(Counts(), batch_size=4, shuffle=True), {}, {}),
    "dirty, accumulation and clipping": (
        Dirty,
        lambda: DataLoader(Augmented(), batch_size=3, shuffle=True),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        {},
    ),
    "dirty, bf16-mixed": (
        Dirty,
        lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
        {"precision": "bf16-mixed"},
        {},
    ),
    "dirty, every two steps": (
        Dirty,
        lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
        {},
        {"every_n_steps": 2},
    ),
    "manual, two optimizers": (Adversarial, points, {}, {"parameters": "judge.*"}),
    "manual, two workers": (Adversarial, lambda: points(num_workers=2), {}, {"parameters": "generator.*"}),
}


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "plain"])
def test_training_is_bit_identical(tmp_path: Path, case: str, mode: Any) -> None:
    make, data, options, settings = CASES[case]
    if "dirty" in case and mode == "in_flight":
        settings = {**settings, "parameters": ["words.weight", "head.*"]}
    snapshot = GradientSnapshot(tmp_path / "store", **{"parameters": "word_embeddings", **settings}, mode=mode)
    without = outcome(tmp_path / "a", make, data, None, **options)
    assert outcome(tmp_path / "b", make, data, snapshot, **options) == without
    assert snapshot.artifacts.verify() == []
    assert len(snapshot.artifacts.checkpoints()) >= 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of numbers, of many buffers in all and each longer than some."""
    path = tmp_path_factory.mktemp("corpus") / "lines.txt"
    numbers = torch.randint(0, 999, (60, 300), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in numbers))
    return path


@pytest.mark.parametrize("case", ["replay", "replay, mid-epoch", "in_flight", "stream", "one persistent worker"])
def test_a_dataset_that_reads_an_open_file_is_read_rightly(tmp_path: Path, corpus: Path, case: str) -> None:
    settings: dict[str, Any] = {"mode": "in_flight" if case in ("in_flight", "stream") else "replay"}
    options: dict[str, Any] = {}
    if case == "stream":
        settings["sample_id"] = lambda batch: batch[2]
    elif "epoch" in case or "worker" in case:
        settings["every_n_steps"] = 3
    if "worker" in case:
        options = {"num_workers": 1, "persistent_workers": True}

    def run(name: str, snapshot: GradientSnapshot | None) -> tuple[str, list[list[int]]]:
        data: Any = Stream(corpus) if case == "stream" else Lines(corpus)
        trained = fit(tmp_path / name, seeded(Heard), snapshot, data=DataLoader(data, batch_size=4, **options))
        return state_hash(trained), trained.lightning_module.heard  # type: ignore[return-value]

    without = run("a", None)
    lines = [(text(line)[0]).tolist() for line in corpus.read_text().splitlines()]
    assert without[1] == lines * 2
    assert run("b", GradientSnapshot(tmp_path / "store", **settings)) == without


def test_a_dirty_module_would_show_a_careless_replay(tmp_path: Path) -> None:
    """The comparison has teeth: one training step more, unisolated, and everything differs."""

    class Careless(GradientSnapshot):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log, log = (lambda *a, **k: None), pl_module.log
            pl_module.log_dict, log_dict = (lambda *a, **k: None), pl_module.log_dict
            pl_module.training_step(next(iter(trainer.train_dataloader)), 0)
            pl_module.log, pl_module.log_dict = log, log_dict

    def data() -> DataLoader[Any]:
        return DataLoader(Augmented(), batch_size=4, shuffle=True)

    without = outcome(tmp_path / "a", Dirty, data, None)
    assert outcome(tmp_path / "b", Dirty, data, Careless(tmp_path / "store"))[0] != without[0]
