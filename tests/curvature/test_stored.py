"""Stored gradients as evidence: every sample once, in parts of any size, and nothing that needs the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_influence import EKFAC, Diagonal, FactorProjection
from lightning_influence.curvature import Dense, StoredEvidence, stored_projection
from lightning_influence.errors import CurvatureError, StoreError
from lightning_influence.gradients import Gradients, Rows, blocks
from tests.curvature.stored_fit import TRAIN, Fit, flat


@pytest.fixture(scope="module")
def fit() -> Fit:
    return Fit()


def walked(evidence: StoredEvidence) -> tuple[dict[str, Tensor], int]:
    """All gradients, and in how many parts they came."""
    parts: list[dict[str, Tensor]] = []

    def add(columns: Any) -> None:
        (gradients,) = columns
        parts.append({name: block.dense() for name, block in gradients.items()})

    evidence.visit(0, add)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, len(parts)


@pytest.mark.parametrize("projection", [None, FactorProjection(2)], ids=str)
def test_every_sample_once_in_order(tmp_path: Path, fit: Fit, projection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fit.store(tmp_path, projection)
    names = ("hidden.weight", "hidden.bias", "embedding.weight")
    evidence = StoredEvidence(store, store.checkpoints()[-1], names)
    assert evidence.num_samples == len(TRAIN) and evidence.projection == projection == stored_projection(store)
    assert evidence.shapes["hidden.weight"] == (4, 4)
    for chunk, parts in ((1 << 24, 3), (16, 14 if projection is None else 5)):
        monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", chunk)
        found, count = walked(evidence)
        assert count == parts and tuple(found) == names
        for name in names:
            torch.testing.assert_close(found[name].flatten(1), flat(fit.train, [name], projection))
    some = torch.ones(3)
    assert evidence.reduce(some) is some and evidence.broadcast(some) is some


def test_words_stay_words(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path, None)
    seen: list[Gradients] = []
    StoredEvidence(store, store.checkpoints()[0], ("embedding.weight",)).visit(0, lambda columns: seen.extend(columns))
    assert all(isinstance(gradients["embedding.weight"], Rows) for gradients in seen)


def test_what_needs_the_model_is_refused(tmp_path: Path, fit: Fit) -> None:
    store = fit.store(tmp_path, None)
    evidence = StoredEvidence(store, store.checkpoints()[-1], tuple(fit.names))
    for statistics in (EKFAC(), Diagonal(), Dense("fisher")):
        with pytest.raises(CurvatureError, match=r"(?s)layers cannot be had from stored gradients.*HINT"):
            statistics.collect(evidence)
    with pytest.raises(CurvatureError, match="hessian matrix cannot be had"):
        evidence.operator("hessian")


def test_a_projection_that_this_version_does_not_know(tmp_path: Path, fit: Fit) -> None:
    class Newer(FactorProjection):
        kind = "newer"

        def record(self) -> dict[str, Any]:
            return {"kind": "newest", "rank": 2}

    store = fit.store(tmp_path, Newer(2))
    with pytest.raises(StoreError, match=r"(?s)unknown way.*newest"):
        stored_projection(store)
