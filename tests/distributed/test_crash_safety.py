"""Fits killed at random moments and resumed: the short version of recipes/crash_safety.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything

from lightning_influence import ArtifactStore, GradientSnapshot
from recipes.crashes.examination import content, unequal
from recipes.crashes.fits import BATCH, SAMPLES, Case, Diarist, loader

ROOT = Path(__file__).parents[2]


def test_killed_and_resumed_fits_leave_the_store_of_an_undisturbed_one(tmp_path: Path) -> None:
    table = tmp_path / "table.md"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "recipes/crash_safety.py"), "--short", "--kills", "2", "--table", str(table)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    rows = [line.split(" | ") for line in table.read_text().splitlines() if re.match(r"\| (replay|in_flight)", line)]
    assert len(rows) == 2
    for row in rows:
        assert sum(int(count) for count in re.findall(r"(\d+) (?:clock|commit|rank)", row[1])) >= 1, (
            "nothing was killed"
        )
        assert row[4] == "yes" and row[6] == "none |", "as undisturbed, no problems"


BATCHES = -(-SAMPLES // BATCH)


class Stop(Exception):
    """What ends a fit here."""


class SaveThenStop(Callback):
    """Saves in the last batch of an epoch, before GradientSnapshot sees the end of that epoch, which it never does."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            raise Stop


def fit(store: Path, mode: str, every: int, *others: Callback, resume: Path | None = None) -> None:
    seed_everything(7, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[GradientSnapshot(store, "*", mode=mode, every_n_epochs=every), *others],  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Diarist(), loader(Case(mode)), ckpt_path=resume, weights_only=False)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.parametrize(
    ("mode", "every", "epoch"), [("replay", 1, 1), ("in_flight", 1, 3), ("in_flight", 2, 1), ("replay", 2, 0)]
)
def test_checkpoint_of_an_epoch_that_lightning_does_not_end_again(
    mode: str, every: int, epoch: int, tmp_path: Path
) -> None:
    """A state saved in an epoch's last batch: Lightning goes on with the next epoch, and never ends this one."""
    fit(tmp_path / "whole", mode, every)
    with pytest.raises(Stop):
        fit(tmp_path / "resumed", mode, every, SaveThenStop(tmp_path / "last.ckpt", epoch))
    fit(tmp_path / "resumed", mode, every, resume=tmp_path / "last.ckpt")
    whole, resumed = (ArtifactStore.open(tmp_path / name) for name in ("whole", "resumed"))
    steps = [BATCHES * (e + 1) for e in range(4) if (e + 1) % every == 0]
    assert [c.step for c in resumed.checkpoints() if c.step] == steps
    assert [c.epoch for c in resumed.checkpoints() if c.step] == [step // BATCHES - 1 for step in steps]
    assert list(unequal(content(Case(mode), resumed), content(Case(mode), whole))) == []
    assert resumed.verify() == []
