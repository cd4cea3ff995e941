"""A resumed fit leaves the store of an uninterrupted one; what was finished before a failure is on disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_influence import ArtifactStore, GradientSnapshot
from lightning_influence.artifacts import StepRange
from lightning_influence.errors import StoreError
from tests.callbacks.fits import BOTH, WARNINGS, Classifier, dense, fit, loader, seeded, state_hash

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
MODES = ["replay", "in_flight"]


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Fails(Callback):
    """Something goes wrong in the middle of a training batch."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        self.at, self.error = at, error

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.at:
            if self.error is None:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise self.error


def contents(root: Path) -> dict[str, Any]:
    """Everything that a store says, apart from file boundaries and facts."""
    store = ArtifactStore.open(root)
    assert store.verify() == []
    found: dict[str, Any] = {"checkpoints": store.checkpoints()}
    moments = {file.step for file in store.artifacts("optimizer")}
    for checkpoint in store.checkpoints():
        for name, value in store.weights(checkpoint).items():
            found[f"{checkpoint.step} {name}"] = value
        if checkpoint.step in moments:
            for name, value in store.preconditioner(checkpoint).items():
                found[f"{checkpoint.step} moment {name}"] = value
        if store.manifest.mode == "replay":
            for name in store.manifest.selected:
                parts = [dense(shard, name) for shard in store.shards(checkpoint)]
                found[f"{checkpoint.step} gradient {name}"] = torch.cat(parts)
    if store.manifest.mode == "in_flight":
        shards = store.shards(StepRange(-1, 1 << 40))
        found["ids"] = torch.cat([shard.sample_ids for shard in shards])
        for name in store.manifest.selected:
            found[f"gradient {name}"] = torch.cat([dense(shard, name) for shard in shards])
        for name in ("step", "rates", "batch_size"):
            found[name] = torch.cat([shard.records[name] for shard in shards])
    return found


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def checkpoints(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **options)


def run(
    root: Path, mode: str, *others: Callback, every_n_steps: int | None = None, save: dict[str, Any], **options: Any
) -> tuple[GradientSnapshot, Trainer]:
    snapshot = GradientSnapshot(root / "store", BOTH, mode=mode, every_n_steps=every_n_steps)  # type: ignore[arg-type]
    fitted = fit(
        root,
        seeded(Scheduled),
        snapshot,
        checkpoints(root / "lightning", **save),
        *others,
        data=loader(shuffle=False),
        enable_checkpointing=True,
        **options,
    )
    return snapshot, fitted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_checkpoint_resumes_to_the_same_store(tmp_path: Path, mode: str, accumulate: int) -> None:
    options: dict[str, Any] = {"save": {"every_n_epochs": 1}, "max_epochs": 3, "accumulate_grad_batches": accumulate}
    _, whole = run(tmp_path / "whole", mode, **options)
    steps_an_epoch = -(-4 // accumulate)
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path / "torn", mode, Fails(2 * steps_an_epoch, RuntimeError("on purpose")), **options)
    saved = tmp_path / "torn" / "lightning" / f"epoch=1-step={2 * steps_an_epoch}.ckpt"
    _, resumed = run(tmp_path / "torn", mode, ckpt_path=saved, **options)
    assert state_hash(resumed) == state_hash(whole)
    assert_equal(contents(tmp_path / "torn" / "store"), contents(tmp_path / "whole" / "store"))


@pytest.mark.parametrize("mode", MODES)
def test_an_older_checkpoint_drops_what_will_be_trained_again(tmp_path: Path, mode: str) -> None:
    options: dict[str, Any] = {"save": {"every_n_epochs": 1}, "max_epochs": 3}
    run(tmp_path / "run", mode, **options)
    before = contents(tmp_path / "run" / "store")
    run(tmp_path / "run", mode, ckpt_path=tmp_path / "run" / "lightning" / "epoch=0-step=4.ckpt", **options)
    assert_equal(contents(tmp_path / "run" / "store"), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_saved_after_validation_at_the_end_of_an_epoch(tmp_path: Path, mode: str) -> None:
    """It is written before this callback's own: the resumed run makes up for it, or finds it there."""

    class Validated(Scheduled):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("validation", self.loss(batch))

        def val_dataloader(self) -> Any:
            return loader(shuffle=False)

    def go(root: Path, **options: Any) -> None:
        snapshot = GradientSnapshot(root / "store", BOTH, mode=mode)  # type: ignore[arg-type]
        save = checkpoints(root / "lightning", monitor="validation", save_on_train_epoch_end=False)
        others = [Fails(4, RuntimeError("on purpose"))] if options.pop("fails", False) else []
        settings = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0, **options}
        fit(root, seeded(Validated), snapshot, save, *others, data=loader(shuffle=False), **settings)

    go(tmp_path / "whole")
    saved = tmp_path / "whole" / "lightning" / "epoch=0-step=4.ckpt"
    before = contents(tmp_path / "whole" / "store")
    go(tmp_path / "whole", ckpt_path=saved)  # its own checkpoint of step 4 is there
    assert_equal(contents(tmp_path / "whole" / "store"), before)

    class Crash(GradientSnapshot):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("before the snapshot")

    root = tmp_path / "crashed"
    save = checkpoints(root / "lightning", monitor="validation", save_on_train_epoch_end=False)
    crash = Crash(root / "store", BOTH, mode=mode)  # type: ignore[arg-type]
    crash.__class__.__qualname__ = GradientSnapshot.__qualname__  # the state is found under the class's name
    with pytest.raises(RuntimeError, match="before the snapshot"):
        settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        fit(root, seeded(Validated), crash, save, data=loader(shuffle=False), **settings)
    go(root, ckpt_path=root / "lightning" / "epoch=0-step=4.ckpt")
    assert_equal(contents(root / "store"), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_mid_epoch_checkpoint_counts_no_batch_twice(tmp_path: Path, mode: str) -> None:
    """A plain DataLoader starts over, so the store equals the batches that were really used."""
    options: dict[str, Any] = {"save": {"every_n_train_steps": 3}, "max_epochs": 2, "every_n_steps": 2}
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, mode, Fails(5, RuntimeError("on purpose")), **options)
    saved = tmp_path / "lightning" / "epoch=0-step=3.ckpt"
    snapshot, resumed = run(tmp_path, mode, ckpt_path=saved, **options)
    found = contents(tmp_path / "store")
    first = [0] if mode == "in_flight" else []
    assert [c.step for c in found["checkpoints"]] == [*first, *range(2, resumed.global_step + 1, 2)]
    if mode == "in_flight":
        assert found["step"].unique().tolist() == list(range(1, resumed.global_step + 1))
        assert found["ids"][found["step"] == 3].tolist() == [8, 9, 10, 11]
    sums = [c.groups[0].learning_rate_sum for c in found["checkpoints"]]
    assert sum(sums) == pytest.approx(sum(_rates(resumed.global_step)[: found["checkpoints"][-1].step]), rel=1e-9)
    assert snapshot.artifacts.verify() == []


def _rates(count: int) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    rates = []
    for _ in range(count):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("mode", MODES)
def test_a_second_fit_with_the_same_trainer_goes_on(tmp_path: Path, mode: str) -> None:
    _, fitted = run(tmp_path, mode, save={"every_n_epochs": 1}, max_epochs=1)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(fitted.lightning_module, loader(shuffle=False))
    found = contents(tmp_path / "store")
    assert [c.step for c in found["checkpoints"]][-2:] == [4, 8]
    if mode == "in_flight":
        assert found["ids"].tolist() == [*range(13), *range(13)]


def test_a_callback_that_is_used_for_another_run_begins_anew(tmp_path: Path) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", BOTH)
    fit(tmp_path, seeded(Classifier), snapshot, max_epochs=1)
    module = seeded(Classifier)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(StoreError, match="not empty"):
        fit(tmp_path, module, snapshot, max_epochs=1)
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert module.training and "log" not in vars(module)
    assert ArtifactStore.open(tmp_path / "store").verify() == []


def test_the_default_folder_is_found_again(tmp_path: Path) -> None:
    def go(**options: Any) -> GradientSnapshot:
        snapshot = GradientSnapshot(parameters=BOTH)
        settings = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True, **options}
        fit(tmp_path, seeded(Scheduled), snapshot, checkpoints(tmp_path / "lightning"), **settings)
        return snapshot

    first = go(max_epochs=1)
    again = go(max_epochs=2, ckpt_path=tmp_path / "lightning" / "epoch=0-step=4.ckpt")
    assert first.artifacts.root == again.artifacts.root == tmp_path / "lightning_logs" / "version_0" / "influence"
    assert [c.step for c in again.artifacts.checkpoints()] == [4, 8]


def test_a_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, "replay", save={"every_n_epochs": 1}, max_epochs=1)
    snapshot = GradientSnapshot(tmp_path / "store", BOTH)
    with pytest.raises(StoreError, match="length of the dataset"):
        fit(
            tmp_path,
            seeded(Scheduled),
            snapshot,
            checkpoints(tmp_path / "lightning", every_n_epochs=1),
            enable_checkpointing=True,
            data=loader(torch.utils.data.Subset(loader().dataset, range(9))),
            ckpt_path=tmp_path / "lightning" / "epoch=0-step=4.ckpt",
        )
    assert len(contents(tmp_path / "store")["checkpoints"]) == 1


@pytest.mark.filterwarnings("ignore:Sending")
@pytest.mark.parametrize("kind", ["exception", "interrupt", "SIGTERM"])
def test_finished_records_survive_a_failure(tmp_path: Path, kind: str) -> None:
    error = {"exception": RuntimeError("on purpose"), "interrupt": KeyboardInterrupt(), "SIGTERM": None}[kind]
    snapshot = GradientSnapshot(tmp_path / "store", BOTH, mode="in_flight")
    module = seeded(Scheduled)
    try:
        fit(tmp_path, module, snapshot, Fails(5, error), data=loader(shuffle=False), max_epochs=3)
    except (RuntimeError, KeyboardInterrupt, SIGTERMException, SystemExit) as raised:
        assert kind != "exception" or str(raised) == "on purpose"
    else:
        pytest.fail("the fit went on")
    found = contents(tmp_path / "store")
    finished = 6 if kind == "SIGTERM" else 5  # after SIGTERM Lightning finishes the batch
    assert found["step"].unique().tolist() == list(range(1, finished + 1))
    assert not any(layer._forward_hooks for layer in module.modules())
