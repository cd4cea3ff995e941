"""fp16 with a gradient scaler: gradients are unscaled, skipped steps leave nothing, replay does not underflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_influence import GradientSnapshot
from lightning_influence.artifacts import StepRange
from tests.callbacks.fits import WARNINGS, Classifier, Texts, WeightsBefore, dense, fit, seeded, singles, stored, truth

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


class Overflows(Classifier):
    """The loss of one batch is infinite."""

    bad = frozenset[int]()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        return loss * 1e38 * 1e38 if self.training and batch_idx in self.bad else loss


def scaled(initial: float = 1024.0) -> Any:
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=initial))]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_leaves_no_records(tmp_path: Path, accumulate: int) -> None:
    class Module(Overflows):
        bad = frozenset({1})

    module, before = seeded(Module), WeightsBefore()
    snapshot = GradientSnapshot(tmp_path / "store", ["head.*", "words.weight"], mode="in_flight")
    options: dict[str, Any] = {"plugins": scaled(), "max_epochs": 1, "accumulate_grad_batches": accumulate}
    fit(tmp_path, module, snapshot, before, **options)
    (shard,) = snapshot.artifacts.shards(StepRange(0, 99))
    lost = 4 * accumulate
    assert len(shard.sample_ids) == 13 - lost
    assert snapshot.artifacts.manifest.facts["dropped_by_gradient_scaler"] == lost
    steps = 4 // accumulate - 1
    assert snapshot.artifacts.checkpoints()[-1].groups[0].learning_rate_sum == pytest.approx(0.3 * steps, rel=1e-12)
    for row, (position, step) in enumerate(zip(shard.sample_ids.tolist(), shard.records["step"].tolist(), strict=True)):
        expected = truth(module, before.at[step - 1], singles(Texts(), [position]), ["head.weight", "words.weight"])
        for name, value in expected.items():
            torch.testing.assert_close(dense(shard, name)[row].double(), value[0], rtol=2e-2, atol=2e-3)


def test_replay_is_scaled_too(tmp_path: Path) -> None:
    """Gradients far below what float16 can hold come out right, and a scale that overflows is lowered."""

    class Tiny(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) * 1e-6

    module = seeded(Tiny)
    snapshot = GradientSnapshot(tmp_path / "store", ["head.*", "words.weight"])
    fit(tmp_path, module, snapshot, plugins=scaled(2.0**20), max_epochs=1)
    store = snapshot.artifacts
    names = ["head.weight", "words.weight"]
    expected = truth(module, store.weights(store.checkpoints()[0]), singles(Texts()), names)
    for name in names:
        torch.testing.assert_close(stored(store, name).double(), expected[name], rtol=5e-2, atol=5e-9)

    module = seeded(Classifier)
    high = GradientSnapshot(tmp_path / "high", names)
    fit(tmp_path, module, high, plugins=scaled(2.0**30), max_epochs=1)  # every step is skipped, every replay retried
    assert stored(high.artifacts, "head.weight").isfinite().all()


def test_an_overflow_without_a_scaler_is_an_error(tmp_path: Path) -> None:
    from lightning_influence.errors import CaptureError

    class Module(Overflows):
        bad = frozenset({2})

    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", mode="in_flight")
    with pytest.raises(CaptureError, match="training batch 3"):
        fit(tmp_path, seeded(Module), snapshot)
