"""What a fit is told about costs: estimate, overhead, staleness; and that nothing is logged unasked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_influence import GradientSnapshot
from tests.callbacks.fits import BOTH, WARNINGS, Classifier, Texts, fit, loader, seeded

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_estimate_is_close_to_what_is_written(tmp_path: Path, mode: Any, optimizer: str) -> None:
    module = seeded(lambda: Classifier(optimizer=optimizer))
    with torch.no_grad():
        module.words = torch.nn.Embedding(3000, 64, padding_idx=0)
        module.hidden = torch.nn.Linear(64, 5)
    module.hidden.bias.requires_grad_(False)
    snapshot = GradientSnapshot(tmp_path / "store", BOTH, mode=mode)
    fit(tmp_path, module, snapshot, data=loader(Texts(150), batch_size=10), max_epochs=2)
    estimate = snapshot.artifacts.manifest.facts["estimate"]["bytes"]  # type: ignore[index,call-overload]
    written = sum(artifact.bytes for artifact in snapshot.artifacts.artifacts())
    assert written == snapshot.artifacts.manifest.facts["overhead"]["bytes"]  # type: ignore[index,call-overload]
    assert estimate == pytest.approx(written, rel=0.1)


def test_costs_are_printed_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer")
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, seeded(Classifier), snapshot)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GradientSnapshot")]
    assert len(told) == 2
    assert "a checkpoint" in told[0] and "in all" in told[0] and str(tmp_path) in told[0]
    assert "beside" in told[1] and "%" in told[1]
    overhead: Any = snapshot.artifacts.manifest.facts["overhead"]
    assert 0 < overhead["seconds"] < overhead["fit_seconds"]
    assert overhead["ratio"] == pytest.approx(overhead["seconds"] / (overhead["fit_seconds"] - overhead["seconds"]))


@pytest.mark.parametrize("log", [False, True])
def test_logging_only_on_request(tmp_path: Path, log: bool) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, seeded(Classifier), GradientSnapshot(tmp_path / "store", "last_layer", log=log), logger=logger)
    metrics = Path(logger.log_dir) / "metrics.csv"
    assert metrics.exists() == log
    if log:
        assert "influence/overhead_seconds" in metrics.read_text()


def test_staleness_of_records_made_in_flight(tmp_path: Path) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", mode="in_flight")
    fit(tmp_path, seeded(Classifier), snapshot, data=loader(Texts(12)), max_epochs=2)  # three steps an epoch
    assert snapshot.artifacts.manifest.facts["staleness"] == {"mean_steps": 1.0, "max_steps": 2.0}
    often = GradientSnapshot(tmp_path / "often", "last_layer", mode="in_flight", every_n_steps=1)
    fit(tmp_path, seeded(Classifier), often, data=loader(Texts(12)), max_epochs=2)
    assert often.artifacts.manifest.facts["staleness"] == {"mean_steps": 0.0, "max_steps": 0.0}


def test_estimate_without_an_end(tmp_path: Path) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", every_n_steps=2)
    fit(tmp_path, seeded(Classifier), snapshot, max_epochs=-1, max_steps=5)
    assert [c.step for c in snapshot.artifacts.checkpoints()] == [2, 4]
    assert "estimate" in snapshot.artifacts.manifest.facts
