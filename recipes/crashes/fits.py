"""Small fits that write a diary of what they really did, can be killed from inside, and go on from their last state."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_influence import GradientSnapshot
from lightning_influence.callbacks import in_flight_recorder, replay_recorder
from lightning_influence.errors import StoreError

SAMPLES, WORDS, LENGTH, WIDTH, CLASSES, BATCH = 61, 40, 6, 4, 3, 4
REFUSED, FAILED = 3, 4  # exit codes: the library refused the folder; anything else went wrong
CHILD = "CRASH_SAFETY_ATTEMPT"  # tells a process that Lightning starts for a rank what it is part of
_fsync = os.fsync


@dataclass(frozen=True)
class Case:
    """One kind of fit.

    Attributes:
        mode: of the callback.
        ranks: processes.
        saving: when Lightning saves: at the end of every `epoch`, every four `steps` (with a stateful loader
            seven), or at the end of `validation`, which comes before the end of the epoch.
        stateful: the loader resumes in the middle of an epoch (torchdata's StatefulDataLoader).
        launcher: strategy of two ranks.
        epochs: of the whole fit.
    """

    mode: str
    ranks: int = 1
    saving: str = "epoch"
    stateful: bool = False
    launcher: str = "ddp"
    epochs: int = 6

    def __str__(self) -> str:
        how = f"{self.ranks} ranks ({self.launcher})" if self.ranks > 1 else "1 process"
        return f"{self.mode}, {how}, {self.saving}{', stateful loader' if self.stateful else ''}"

    @property
    def same_order(self) -> bool:
        """Whether Lightning resumes with the very batches of an uninterrupted fit."""
        return self.saving != "steps" or self.stateful

    @property
    def batches(self) -> int:
        """Of an epoch, on each rank."""
        return math.ceil(math.ceil(SAMPLES / self.ranks) / BATCH)


CASES = (
    *(Case(mode, saving=saving) for mode in ("replay", "in_flight") for saving in ("epoch", "validation")),
    *(Case(mode, saving="steps", stateful=stateful) for mode in ("replay", "in_flight") for stateful in (True, False)),
    *(Case(mode, ranks=2, saving=saving) for mode in ("replay", "in_flight") for saving in ("epoch", "steps")),
)
SHORT = (
    Case("replay", saving="validation", epochs=3),
    Case("in_flight", ranks=2, launcher="ddp_fork", epochs=4),
)


class Sentences(Dataset[dict[str, Tensor]]):
    """Random words; sample i says that it is sample i."""

    def __init__(self) -> None:
        self.words = torch.randint(1, WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"words": self.words[i], "label": self.words[i].sum() % CLASSES, "index": torch.tensor(i)}


class ByEpoch(Sampler[int]):
    """Another order in every epoch, the same in every run."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        return Order(torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Order(Iterator[int]):
    """An order that knows where it is: Lightning starts a resumed loader before it says which epoch it is in."""

    def __init__(self, order: list[int]) -> None:
        self.order, self.at = order, 0

    def __next__(self) -> int:
        self.at += 1
        if self.at > len(self.order):
            raise StopIteration
        return self.order[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        """For StatefulDataLoader."""
        return {"order": self.order, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the order was left."""
        self.order, self.at = state["order"], state["at"]


class Diarist(LightningModule):
    """A bag-of-words classifier that writes down every step it really made.

    Args:
        diary: where to; `None` writes nothing.
        fail_at: raise an exception in the batch after this one.
    """

    def __init__(self, diary: str | None = None, fail_at: int | None = None) -> None:
        super().__init__()
        self.diary, self.fail_at, self.used = diary, fail_at, 0
        self.embedding, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Logits, (N, C)."""
        logits: Tensor = self.head(self.embedding(words).mean(1).tanh())
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy."""
        if self.training and self.used == self.fail_at:
            raise RuntimeError("an exception of the user's own")
        return F.cross_entropy(self(batch["words"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing is measured; Lightning saves when it is over."""

    def configure_optimizers(self) -> Any:
        """Adam, with another rate at every step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Open the diary."""
        if self.diary is not None:
            path = f"{self.diary}-rank{self.global_rank}"
            Path(f"{path}.pid").write_text(str(os.getpid()))
            self._page = os.open(f"{path}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Remember the samples."""
        self._ids: list[int] = batch["index"].tolist()

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and write it down before any callback may save."""
        rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.used += 1
        entry: dict[str, Any] = {"batch": self.used, "ids": self._ids, "last": self.trainer.is_last_batch}
        entry |= {"rate": rate, "weights": digest(self.state_dict())}
        if self.diary is not None:
            os.write(self._page, json.dumps(entry).encode() + b"\n")
            _fsync(self._page)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The count of batches belongs to the checkpoint."""
        checkpoint["used"] = self.used

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.used = checkpoint["used"]


def digest(state: dict[str, Tensor]) -> str:
    """sha256 of a state_dict."""
    whole = hashlib.sha256()
    for name in sorted(state):
        whole.update(name.encode() + state[name].detach().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def loader(case: Case) -> Any:
    """The training loader of a case."""
    if case.stateful:
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(Sentences(), batch_size=BATCH, sampler=ByEpoch())
    if case.ranks > 1:
        return DataLoader(Sentences(), batch_size=BATCH, shuffle=True)  # Lightning makes it distributed
    return DataLoader(Sentences(), batch_size=BATCH, sampler=ByEpoch())


@dataclass(frozen=True)
class Attempt:
    """One start of a fit.

    Attributes:
        strike: (rank, n, after): SIGKILL to all processes at the n-th call of that rank that makes a file durable.
        fail_at: the user's exception comes after this batch.
    """

    case: Case
    folder: str
    number: int
    strike: tuple[int, int, bool] | None = None
    fail_at: int | None = None

    @property
    def diary(self) -> Path:
        """Path of the diaries and process ids, without the rank."""
        return Path(self.folder) / f"diary-{self.number:03d}"

    def fit(self) -> None:
        """Train, or go on from the last Lightning checkpoint; runs in processes of its own."""
        warnings.filterwarnings("ignore")
        torch.set_num_threads(1)
        seed_everything(7, verbose=False)
        replay_recorder._SHARD_BYTES = 1 << 11  # so few samples fill several shards
        in_flight_recorder._CHUNK_BYTES = 1 << 12  # and several chunks
        if self.strike is not None:
            _strike(*self.strike)
        last = ModelCheckpoint(
            f"{self.folder}/lightning",
            save_last=True,
            every_n_train_steps=(7 if self.case.stateful else 4) if self.case.saving == "steps" else None,
            save_on_train_epoch_end=self.case.saving == "epoch",
        )
        trainer = Trainer(
            accelerator="cpu",
            devices=self.case.ranks,
            strategy=self.case.launcher if self.case.ranks > 1 else "auto",
            max_epochs=self.case.epochs,
            callbacks=[GradientSnapshot(f"{self.folder}/store", "*", mode=self.case.mode), last],  # type: ignore[arg-type]
            logger=False,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        validation = DataLoader(Sentences(), batch_size=32) if self.case.saving == "validation" else None
        trainer.fit(Diarist(str(self.diary), self.fail_at), loader(self.case), validation, ckpt_path="last")


def _strike(rank: int, n: int, after: bool) -> None:
    """Make the n-th call of this rank that changes the disk for good the last one of all processes."""
    if int(os.environ.get("LOCAL_RANK", 0)) != rank:
        return
    count = 0

    def deadly(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == n and not after:
                os.killpg(0, signal.SIGKILL)
            result = call(*args, **kwargs)
            if count == n:
                os.killpg(0, signal.SIGKILL)
            return result

        return wrapped

    for name in ("fsync", "replace", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


def _child(attempt: Attempt) -> None:
    """The first process of an attempt: a group of its own, its output in a file, an exit code that says how it went."""
    os.setsid()
    output = os.open(f"{attempt.diary}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    os.environ[CHILD] = json.dumps(asdict(attempt))
    try:
        attempt.fit()
    except StoreError as error:
        print(error, flush=True)
        os._exit(REFUSED if "is not empty" in str(error) else FAILED)
    except RuntimeError as error:
        print(repr(error), flush=True)
        os._exit(FAILED)


def run(attempt: Attempt) -> Any:
    """Start an attempt."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(attempt,))
    process.start()
    return process
