"""What CurvatureSnapshot refuses: by our own errors, before the first step if it can be known, harming nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

from lightning_influence import ArtifactStore, CurvatureSnapshot, GradientSnapshot
from lightning_influence.artifacts import tensor_files
from lightning_influence.artifacts.store import ArtifactStore as Store
from lightning_influence.curvature import EKFAC, Dense, Diagonal, MatrixFree
from lightning_influence.errors import (
    CaptureError,
    CurvatureError,
    InfluenceError,
    LossError,
    StoreError,
    UnsupportedError,
)
from tests.callbacks.curvature_fits import Net, batches, curvatures, vectors
from tests.callbacks.fits import WARNINGS, fit, seeded, trainer
from tests.callbacks.test_bad_input import Steps, _no_space

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


def refused(root: Path, kind: type[InfluenceError], match: str, make: Any = Net, *others: Any, **options: Any) -> None:
    """The fit stops with our error before the first step, and the module is as it was."""
    steps, module = Steps(), seeded(make)
    snapshot = CurvatureSnapshot(root / "store", **options.pop("settings", {}))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(kind, match=f"(?s){match}") as raised:
        fit(root, module, None, snapshot, *others, steps, **{"data": batches(), **options})
    error = raised.value
    assert error.expected and error.found and error.hint and "HINT" in str(error)
    assert steps.count == 0 and "log" not in vars(module) and not any(p._forward_hooks for p in module.modules())
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name].to(value), rtol=0, atol=0, equal_nan=True)


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(4, 12, batch_first=True)
        self.first = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.memory(x.unsqueeze(1))[0][:, -1])


def test_a_layer_without_a_form(tmp_path: Path) -> None:
    match, double = r"EKFAC has no form for memory.weight_ih_l0.*HINT.*parameters=.*Diagonal", "64-true"
    refused(tmp_path, CurvatureError, match, Recurrent, precision=double)
    for statistics, parameters in (("diagonal", "all"), ("ekfac", ["first.*", "head.*"])):
        snapshot = CurvatureSnapshot(tmp_path / statistics, statistics, parameters=parameters)
        fit(tmp_path, seeded(Recurrent), None, snapshot, data=batches(), max_epochs=1, precision=double)
        assert list(curvatures(snapshot.artifacts)) == [(4, statistics)]


def test_a_loss_that_couples_samples(tmp_path: Path) -> None:
    class Contrastive(Net):
        def loss(self, batch: Any) -> Tensor:
            z = F.normalize(self(batch[0]))
            return F.cross_entropy(z @ z.T * 5, torch.arange(len(z)).roll(1))

    refused(tmp_path, LossError, "couples the samples", Contrastive)


@pytest.mark.parametrize("labels", ["exact", "sampled"])
def test_labels_that_the_loss_does_not_tell(tmp_path: Path, labels: str) -> None:
    match = f'labels="{labels}" needs.*predictive_distribution.*observed'
    refused(tmp_path, LossError, match, lambda: Net(loss="own"), settings={"labels": labels})


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from vectors()


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
def test_loaders_that_cannot_be_walked(tmp_path: Path, mode: str) -> None:
    settings = {"mode": mode, "statistics": "kfac"}
    stream = batches(Stream(), shuffle=False)
    refused(
        tmp_path, UnsupportedError, "position.*HINT: pass CurvatureSnapshot.dataloader=", data=stream, settings=settings
    )

    class Both(Net):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch["a"])

    several = CombinedLoader({"a": batches(), "b": batches()}, "max_size_cycle")
    refused(tmp_path, UnsupportedError, "one training set", Both, data=several, settings=settings)


def test_a_loader_of_its_own(tmp_path: Path) -> None:
    """A stream trains; the curvature walks a list of the same samples."""
    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", dataloader=batches())
    fit(tmp_path, seeded(Net), None, snapshot, data=batches(Stream(), shuffle=False), max_epochs=1)
    assert list(curvatures(snapshot.artifacts)) == [(4, "diagonal")]


@pytest.mark.parametrize("order", [0, 1])
def test_another_training_set_than_that_of_the_shared_store(tmp_path: Path, order: int) -> None:
    other = batches(torch.utils.data.TensorDataset(vectors().tensors[0] + 1, vectors().tensors[1]))
    for name, loader, match in (
        ("content", other, "fingerprint"),
        ("length", batches(Subset(vectors(), range(9))), "fingerprint"),
    ):
        root = tmp_path / name
        pair: list[Any] = [GradientSnapshot(root, "head.*"), CurvatureSnapshot(root, dataloader=loader)]
        steps = Steps()
        with pytest.raises(StoreError, match=f"(?s)other samples.*{match}.*HINT"):
            fit(tmp_path, seeded(Net), None, *(pair if order else pair[::-1]), steps, data=batches())
        assert steps.count == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_training_set_that_changes_during_the_fit(tmp_path: Path, shared: bool) -> None:
    class Grows(Net):
        def train_dataloader(self) -> Any:
            return batches(vectors(13 + self.current_epoch))

    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", every_n_epochs=1)
    others = [GradientSnapshot(tmp_path / "store", "head.*", every_n_epochs=9)] if shared else []
    run = trainer(tmp_path, snapshot, *others, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(StoreError, match=r"other samples|has changed"):
        run.fit(seeded(Grows))
    store = ArtifactStore.open(tmp_path / "store")
    assert list(curvatures(store)) == [(4, "diagonal")]


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_sharding_strategies_are_refused_in_setup(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path)
    monkeypatch.setattr(Trainer, "strategy", object.__new__(kind))
    with pytest.raises(UnsupportedError, match=f"(?s)not served.*{kind.__name__}"):
        CurvatureSnapshot(tmp_path / "store").setup(run, Net(), "fit")


def test_a_folder_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("years of work")
    refused(tmp_path, StoreError, "not empty")
    assert (tmp_path / "store" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("shared", [False, True])
def test_too_little_disk_is_refused_before_the_first_step(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One curvature would fit, and what gradients need; the snapshots of the whole fit do not."""
    others = [GradientSnapshot(tmp_path / "store", "head.bias", every_n_epochs=20)] if shared else []
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10_000)
    settings = {"every_n_epochs": 1}
    match = "too little space for the curvature 'ekfac'.*fewer snapshots"
    refused(tmp_path, StoreError, match, Net, *others, settings=settings, max_epochs=20)
    fits = CurvatureSnapshot(tmp_path / "fits", every_n_epochs=10)
    fit(tmp_path, seeded(Net), None, fits, data=batches(), max_epochs=20)


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_disk_stops_the_run_and_harms_nothing(
    tmp_path: Path, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                monkeypatch.setattr(tensor_files, "write_all", _no_space)

    others = [GradientSnapshot(tmp_path / "store", "head.*")] if shared else []
    module, snapshot = seeded(Net), CurvatureSnapshot(tmp_path / "store", every_n_epochs=1)
    with pytest.raises(StoreError, match="no space left"):
        fit(tmp_path, module, None, snapshot, *others, Full(), data=batches())
    monkeypatch.undo()
    store = ArtifactStore.open(tmp_path / "store")
    assert [p for p in store.verify() if "no journal" not in p] == []
    assert list(curvatures(store)) == [(4, "ekfac")] and [c.step for c in store.checkpoints()] == [4]
    assert module.training and "log" not in vars(module)


class Bad(Net):
    """Its gradients of one batch of the walk are NaN once the first snapshot is made."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        bad = not self.training and self.global_step >= 8 and bool((batch[0][0] == vectors()[8][0]).all())
        return loss * float("nan") if bad else loss


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("statistics", ["ekfac", "diagonal", Dense("fisher")])
def test_nan_at_a_snapshot_names_the_samples_and_leaves_the_rest(tmp_path: Path, shared: bool, statistics: Any) -> None:
    others = [GradientSnapshot(tmp_path / "store", "head.*", every_n_epochs=9)] if shared else []
    module, snapshot = (
        seeded(Bad),
        CurvatureSnapshot(tmp_path / "store", statistics, every_n_epochs=1, labels="observed"),
    )
    with pytest.raises(CaptureError, match=r"(?s)NaN or infinite, in samples 8 to 11 of the training set.*HINT"):
        fit(tmp_path, module, None, snapshot, *others, data=batches(), max_epochs=3)
    store = ArtifactStore.open(tmp_path / "store")
    assert [p for p in store.verify() if "no journal" not in p] == []
    assert [step for step, _ in curvatures(store)] == [4]
    assert module.training and "log" not in vars(module) and not any(p._forward_hooks for p in module.modules())


def test_nan_from_the_start(tmp_path: Path) -> None:
    class Broken(Net):
        def __init__(self) -> None:
            super().__init__()
            self.first.bias.data[0] = float("nan")

    refused(tmp_path, CaptureError, "NaN or infinite", Broken)


def test_statistics_that_cannot_be_kept(tmp_path: Path) -> None:
    refused(tmp_path, CurvatureError, "", settings={"statistics": MatrixFree()})
    refused(tmp_path, CurvatureError, "does not fit", settings={"statistics": Dense("fisher", at_most=7)})


def test_parameters_that_are_not_there(tmp_path: Path) -> None:
    refused(tmp_path, InfluenceError, "nothing.*", settings={"parameters": "nothing.*"})


def test_an_empty_or_a_tiny_training_set(tmp_path: Path) -> None:
    snapshot = CurvatureSnapshot(tmp_path / "store")
    fit(tmp_path, seeded(Net), None, snapshot, data=batches(vectors(1)), max_epochs=1)
    assert list(curvatures(snapshot.artifacts)) == [(1, "ekfac")]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"statistics": "kfca"}, "statistics"),
        ({"statistics": EKFAC}, "statistics"),
        ({"statistics": 3}, "statistics"),
        ({"mode": "online"}, "mode"),
        ({"labels": "true"}, "labels"),
        ({"labels": 3}, "labels"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"every_n_epochs": 1.5}, "every_n_epochs"),
        ({"at_steps": 5}, "at_steps"),
        ({"at_steps": [0]}, "at_steps"),
        ({"at_steps": [None]}, "at_steps"),
        ({"at_steps": "12"}, "at_steps"),
        ({"at_most": 0}, "at_most"),
        ({"batch_size": "4"}, "batch_size"),
        ({"seed": "0"}, "seed"),
        ({"every_n_batches": True}, "every_n_batches"),
        ({"store": 3}, "store"),
        ({"parameters": []}, "parameters"),
        ({"per_sample_loss": 3}, "per_sample_loss"),
    ],
)
def test_arguments_are_checked(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(InfluenceError, match=match) as raised:
        CurvatureSnapshot(**wrong)
    error = raised.value
    assert error.expected and error.found and error.hint


def test_one_object_for_settings_serves_many_snapshots(tmp_path: Path) -> None:
    statistics = Diagonal()
    for name in ("a", "b"):
        snapshot = CurvatureSnapshot(tmp_path / name, statistics, every_n_epochs=1)
        fit(tmp_path, seeded(Net), None, snapshot, data=batches())
    files = [ArtifactStore.open(tmp_path / name).artifacts("curvature") for name in ("a", "b")]
    assert [file.sha256 for file in files[0]] == [file.sha256 for file in files[1]]


def test_a_fit_without_batches(tmp_path: Path) -> None:
    snapshot, module = CurvatureSnapshot(tmp_path / "store"), seeded(Net)
    fit(tmp_path, module, None, snapshot, data=batches(), limit_train_batches=0)
    assert not (tmp_path / "store").exists() and isinstance(module, LightningModule)
