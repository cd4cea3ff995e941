"""A fit that is interrupted and resumed leaves the curvatures of an undisturbed one, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import Subset

from lightning_influence import ArtifactStore, CurvatureSnapshot, GradientSnapshot, add_curvature
from lightning_influence.errors import StoreError
from tests.callbacks.curvature_fits import Still, batches, curvatures, everything, vectors
from tests.callbacks.fits import WARNINGS, fit, seeded, state_hash
from tests.callbacks.test_resume import Fails, assert_equal, checkpoints

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
SHARED = [None, "before", "after"]  # a GradientSnapshot into the same store stands there in the list
EPOCHS: dict[str, Any] = {"save": {"every_n_epochs": 1}, "max_epochs": 3}


def run(root: Path, shared: str | None, *others: Callback, save: dict[str, Any], **options: Any) -> Trainer:
    gradients = [] if shared is None else [GradientSnapshot(root / "store", "head.*")]
    settings = {"at_steps": [3, 4, 6, 7], "every_n_epochs": 2, **options.pop("settings", {})}
    curvature = [CurvatureSnapshot(root / "store", "kfac", **settings)]
    ours: list[Callback] = [*gradients, *curvature] if shared == "before" else [*curvature, *gradients]
    saving = checkpoints(root / "lightning", **save)
    data = options.pop("data", None) or batches(shuffle=False)
    return fit(root, seeded(Still), None, *ours, saving, *others, data=data, enable_checkpointing=True, **options)


def weights_and_optimizer(trained: Trainer) -> str:
    """A hash; random states are no part of it: Lightning does not resume them."""
    seed_everything(0, verbose=False)
    return state_hash(trained)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What undisturbed runs leave, each run once: a hash of the training's state, and what the store says."""
    known: dict[str, tuple[str, dict[str, Any]]] = {}

    def of(shared: str | None, **options: Any) -> tuple[str, dict[str, Any]]:
        key = f"{shared} {sorted(options)} {options.get('accumulate_grad_batches')}"
        if key not in known:
            root = tmp_path_factory.mktemp("whole")
            trained = run(root, shared, **options)
            known[key] = weights_and_optimizer(trained), everything(root / "store")
        return known[key]

    return of


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize(("accumulate", "epoch", "fails"), [(1, 0, 5), (1, 1, 11), (2, 1, 9)])
def test_from_the_end_of_an_epoch(
    tmp_path: Path, whole: Any, shared: str | None, accumulate: int, epoch: int, fails: int
) -> None:
    options = {**EPOCHS, "accumulate_grad_batches": accumulate}
    step = (epoch + 1) * 4 // accumulate
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, shared, Fails(fails // accumulate, RuntimeError("on purpose")), **options)
    saved = tmp_path / "lightning" / f"epoch={epoch}-step={step}.ckpt"
    resumed = run(tmp_path, shared, ckpt_path=saved, **options)
    state, store = whole(shared, **options)
    assert weights_and_optimizer(resumed) == state
    assert_equal(everything(tmp_path / "store"), store)


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated")
@pytest.mark.parametrize("step", [3, 6])  # the first: saved as a snapshot is due, and before it is taken
def test_from_the_middle_of_an_epoch(tmp_path: Path, whole: Any, shared: str | None, step: int) -> None:
    """A loader that resumes where it was gives the batches of the undisturbed run, so everything must be equal."""
    pytest.importorskip("torchdata")
    from torchdata.stateful_dataloader import StatefulDataLoader

    def options() -> dict[str, Any]:
        return {
            "save": {"every_n_train_steps": 1}, "max_epochs": 2, "data": StatefulDataLoader(vectors(), batch_size=4)
        }  # fmt: skip

    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, shared, Fails(step + 1, RuntimeError("on purpose")), **options())
    saved = tmp_path / "lightning" / f"epoch={(step - 1) // 4}-step={step}.ckpt"
    run(tmp_path, shared, ckpt_path=saved, **options())
    assert_equal(everything(tmp_path / "store"), whole(shared, **options())[1])


class SaveThenStop(Callback):
    """Saves in the last batch of an epoch, after our hooks of the batch, and ends the run before those of the epoch."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and trainer.is_last_batch:
            trainer.save_checkpoint(self.path)
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_from_a_state_whose_epoch_lightning_does_not_end_again(
    tmp_path: Path, whole: Any, shared: str | None, epoch: int
) -> None:
    """Saved in an epoch's last batch: of the first (a named step), of the second (every second epoch), of the last."""
    with pytest.raises(RuntimeError, match="on purpose"):
        run(tmp_path, shared, SaveThenStop(tmp_path / "last.ckpt", epoch), **EPOCHS)
    run(tmp_path, shared, ckpt_path=tmp_path / "last.ckpt", **EPOCHS)
    assert_equal(everything(tmp_path / "store"), whole(shared, **EPOCHS)[1])


@pytest.mark.parametrize("shared", [None, "before"])
def test_an_older_state_drops_what_will_be_trained_again(tmp_path: Path, shared: str | None) -> None:
    run(tmp_path, shared, **EPOCHS)
    before = everything(tmp_path / "store")
    run(tmp_path, shared, ckpt_path=tmp_path / "lightning" / "epoch=0-step=4.ckpt", **EPOCHS)
    assert_equal(everything(tmp_path / "store"), before)


def test_nothing_left_to_train_and_the_last_curvature_missing(tmp_path: Path) -> None:
    """The last walk fails; a resumed fit trains nothing, takes no snapshot, and says what to do instead."""

    class Dies(CurvatureSnapshot):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("on purpose")

    Dies.__qualname__ = CurvatureSnapshot.__qualname__  # the state is found under the class's name

    def go(kind: type[CurvatureSnapshot], root: Path, **options: Any) -> Trainer:
        saving = checkpoints(root / "lightning", every_n_epochs=1)
        ours = [GradientSnapshot(root / "store", "head.*"), kind(root / "store", every_n_epochs=3)]
        return fit(root, seeded(Still), None, *ours, saving, data=batches(), enable_checkpointing=True, **options)

    go(CurvatureSnapshot, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="on purpose"):
        go(Dies, tmp_path / "torn")
    with pytest.warns(UserWarning, match=r"(?s)Nothing was left to train.*HINT: add_curvature"):
        trained = go(
            CurvatureSnapshot, tmp_path / "torn", ckpt_path=tmp_path / "torn" / "lightning" / "epoch=1-step=8.ckpt"
        )
    assert curvatures(ArtifactStore.open(tmp_path / "torn" / "store")) == {}
    add_curvature(trained.lightning_module, tmp_path / "torn" / "store", batches())
    assert_equal(everything(tmp_path / "torn" / "store"), everything(tmp_path / "whole" / "store"))


def test_the_default_folder_is_found_again(tmp_path: Path) -> None:
    def go(**options: Any) -> CurvatureSnapshot:
        snapshot = CurvatureSnapshot(statistics="diagonal")
        settings = {"logger": CSVLogger(tmp_path), "enable_checkpointing": True, **options}
        fit(tmp_path, seeded(Still), None, snapshot, checkpoints(tmp_path / "lightning"), data=batches(), **settings)
        return snapshot

    first = go(max_epochs=1)
    again = go(max_epochs=2, ckpt_path=tmp_path / "lightning" / "epoch=0-step=4.ckpt")
    assert first.artifacts.root == again.artifacts.root == tmp_path / "lightning_logs" / "version_0" / "influence"
    assert sorted(curvatures(again.artifacts)) == [(4, "diagonal"), (8, "diagonal")]


@pytest.mark.parametrize("shared", [None, "before"])
def test_the_store_of_another_run_is_refused(tmp_path: Path, shared: str | None) -> None:
    options: dict[str, Any] = {"save": {"every_n_epochs": 1}, "max_epochs": 1}
    run(tmp_path / "mine", shared, **options)
    run(tmp_path / "theirs", shared, data=batches(Subset(vectors(), range(9))), **options)
    before = everything(tmp_path / "theirs" / "store")
    (tmp_path / "mine" / "store").rename(tmp_path / "mine" / "moved")
    (tmp_path / "theirs" / "store").rename(tmp_path / "mine" / "store")
    with pytest.raises(StoreError, match=r"(?s)length of the dataset.*HINT"):
        saved = tmp_path / "mine" / "lightning" / "epoch=0-step=4.ckpt"
        run(tmp_path / "mine", shared, ckpt_path=saved, **{**options, "max_epochs": 2})
    assert_equal(everything(tmp_path / "mine" / "store"), before)
    with pytest.raises(StoreError, match="not empty"):
        run(tmp_path / "mine", shared, **options)
