"""Training with CurvatureSnapshot is bit for bit the training without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_influence import ArtifactStore, CurvatureSnapshot, GradientSnapshot
from lightning_influence.curvature import Diagonal
from lightning_influence.errors import UnsupportedError
from tests.callbacks.curvature_fits import curvatures
from tests.callbacks.fits import WARNINGS, fit, seeded, state_hash
from tests.callbacks.test_bit_identity import CASES, Adversarial, Augmented, Dirty, points

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:(Gradient|Curvature)Snapshot.mode='in_flight'. sees"),
]
IN_FLIGHT = ["words.weight", "head.*"]  # BatchNorm's own parameters have no gradient of single samples in train mode


def outcome(root: Path, case: str, *callbacks: Any) -> tuple[str, str]:
    """Everything that a run leaves, and its log."""
    make, data, options, _ = CASES[case]
    logger = CSVLogger(root, flush_logs_every_n_steps=1)
    run = fit(
        root, seeded(make), None, *callbacks, data=data(), **{**options, "logger": logger, "log_every_n_steps": 1}
    )
    return state_hash(run), (Path(logger.log_dir) / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The outcomes without any callback, each run once."""
    known: dict[str, tuple[str, str]] = {}

    def of(case: str) -> tuple[str, str]:
        if case not in known:
            known[case] = outcome(tmp_path_factory.mktemp("plain"), case)
        return known[case]

    return of


def snapshot(root: Path, mode: str, **settings: Any) -> CurvatureSnapshot:
    if mode == "in_flight":
        return CurvatureSnapshot(root, "kfac", parameters=IN_FLIGHT, mode="in_flight", **settings)
    return CurvatureSnapshot(root, **settings)


REPLAYED = ["dirty, own generator", "dirty, accumulation and clipping", "dirty, two workers"]


@pytest.mark.parametrize(
    ("mode", "case", "settings"),
    [
        ("replay", "dirty", {}),
        ("replay", "dirty", {"at_steps": [2, 5, 7], "labels": "observed"}),
        *(("replay", case, {"every_n_epochs": 1, "at_steps": [2]}) for case in REPLAYED),
        ("replay", "dirty, bf16-mixed", {"every_n_epochs": 1, "at_steps": [2], "labels": "observed"}),
        ("replay", "dirty, counting dataset", {"every_n_epochs": 1, "at_most": 5, "batch_size": 2}),
        ("replay", "manual, two optimizers", {"every_n_epochs": 1}),
        ("in_flight", "dirty", {"every_n_epochs": 1, "at_steps": [2]}),
        ("in_flight", "dirty, two workers", {"every_n_batches": 2}),
        ("in_flight", "dirty, accumulation and clipping", {}),
        ("in_flight", "dirty, bf16-mixed", {}),
    ],
)
def test_training_is_bit_identical(tmp_path: Path, plain: Any, mode: str, case: str, settings: Any) -> None:
    ours = snapshot(tmp_path / "store", mode, **settings)
    assert outcome(tmp_path / "run", case, ours) == plain(case)
    steps = [step for step, _ in curvatures(ours.artifacts)]
    named = {step for step in settings.get("at_steps", ()) if step < steps[-1]}
    assert ours.artifacts.verify() == [] and named < set(steps)


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
def test_training_is_bit_identical_beside_gradients_and_other_curvatures(tmp_path: Path, plain: Any, mode: Any) -> None:
    root = tmp_path / "store"
    callbacks = [
        GradientSnapshot(root, IN_FLIGHT, mode=mode),
        snapshot(root, "replay", at_steps=[3]),
        CurvatureSnapshot(root, Diagonal(), parameters=IN_FLIGHT, mode="in_flight", every_n_batches=2),
    ]
    assert outcome(tmp_path / "run", "dirty", *callbacks) == plain("dirty")
    store = ArtifactStore.open(root)
    assert store.verify() == [] and sorted(curvatures(store)) == [(3, "ekfac"), (10, "diagonal"), (10, "ekfac")]


def test_manual_optimization_is_refused_in_flight(tmp_path: Path) -> None:
    module = seeded(Adversarial)
    ours = CurvatureSnapshot(tmp_path / "store", "kfac", mode="in_flight")
    with pytest.raises(UnsupportedError, match=r"(?s)automatic optimization.*per_sample_loss"):
        fit(tmp_path, module, None, ours, data=points())
    assert not (tmp_path / "store").exists() and not any(part._forward_hooks for part in module.modules())


def test_a_careless_snapshot_would_show(tmp_path: Path, plain: Any) -> None:
    """The comparison has teeth: one forward in train mode, unisolated, and the outcome differs."""

    class Careless(CurvatureSnapshot):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            pl_module.norm(pl_module.words.weight[:4])

    data = DataLoader(Augmented(), batch_size=4, shuffle=True)
    assert outcome(tmp_path, "dirty", Careless(tmp_path / "store"))[0] != plain("dirty")[0]
    assert data.batch_size == 4 and CASES["dirty"][0] is Dirty
