"""add_curvature: what it adds to a finished store is what the callback writes, and the model is as it was before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from lightning_influence import (
    ArtifactStore,
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    add_curvature,
)
from lightning_influence.artifacts import Checkpoint
from lightning_influence.artifacts.store import ArtifactStore as Store
from lightning_influence.curvature import EKFAC, Dense
from lightning_influence.errors import (
    CaptureError,
    CurvatureError,
    InfluenceError,
    LossError,
    QueryError,
    StoreError,
    UnsupportedError,
)
from tests.callbacks.curvature_fits import Net, batches, curvatures, everything, vectors
from tests.callbacks.fits import WARNINGS, Classifier, fit, loader, seeded
from tests.callbacks.test_resume import assert_equal

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


def fitted(root: Path, *callbacks: Callback, make: Any = Net, data: Any = None, **options: Any) -> Any:
    """The module after a fit with gradients (or the callbacks that are given) into `root / "store"`."""
    ours = callbacks or (GradientSnapshot(root / "store", "head.*"),)
    return fit(root, seeded(make), None, *ours, data=batches() if data is None else data, **options).lightning_module


CASES: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [  # statistics, model, fit, settings
    ("ekfac", Net, {}, {}),
    ("kfac", lambda: Net("adamw", "sum"), {}, {"labels": "observed"}),
    ("ekfac", lambda: Net("decay", classes=40), {"precision": "64-true"}, {"at_most": 9, "seed": 4, "batch_size": 2}),
    ("diagonal", lambda: Net(loss="mse"), {"accumulate_grad_batches": 2}, {"labels": "sampled", "seed": 3}),
]


@pytest.mark.parametrize(("statistics", "make", "options", "settings"), CASES)
def test_it_is_what_the_callback_writes(
    tmp_path: Path, statistics: str, make: Any, options: Any, settings: Any
) -> None:
    def gradients(name: str) -> GradientSnapshot:
        return GradientSnapshot(tmp_path / name, "head.*")

    during = CurvatureSnapshot(tmp_path / "during", statistics, every_n_epochs=1, **settings)
    fitted(tmp_path, during, gradients("during"), make=make, **options)
    module = fitted(tmp_path, gradients("after"), make=make, **options)
    state, flags = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    attributes, random = sorted(vars(module)), torch.get_rng_state()
    store = ArtifactStore.open(tmp_path / "after")
    for at in store.checkpoints():
        add_curvature(module, store, batches(batch_size=4), statistics, at=at, **settings)
    assert_equal(everything(tmp_path / "after"), everything(tmp_path / "during"))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert [part.training for part in module.modules()] == flags and sorted(vars(module)) == attributes
    assert torch.equal(torch.get_rng_state(), random)
    assert store.manifest.facts.get("overhead") is not None and ArtifactStore.open(tmp_path / "after").verify() == []


def test_a_new_module_will_do_and_texts_too(tmp_path: Path) -> None:
    during = CurvatureSnapshot(tmp_path / "during", parameters=["words.*", "head.*"])
    fitted(tmp_path, during, make=Classifier, data=loader())
    trained = fitted(tmp_path, CurvatureSnapshot(tmp_path / "after", "diagonal"), make=Classifier, data=loader())
    add_curvature(Classifier(), str(tmp_path / "after"), loader(), parameters=["words.*", "head.*"])
    found, expected = everything(tmp_path / "after"), everything(tmp_path / "during")
    assert_equal({key: value for key, value in found.items() if key in expected}, expected)
    assert sorted(curvatures(ArtifactStore.open(tmp_path / "after"))) == [(8, "diagonal"), (8, "ekfac")]
    assert isinstance(trained, nn.Module)


@pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
def test_the_last_checkpoint_by_default_and_queries_find_it(tmp_path: Path) -> None:
    module = fitted(tmp_path)
    add_curvature(module, tmp_path / "store", batches(), EKFAC(exact_up_to=3), parameters="head.*")
    store = ArtifactStore.open(tmp_path / "store")
    assert sorted(curvatures(store)) == [(8, "ekfac")]
    queries = tuple(tensor[:3] for tensor in vectors().tensors)
    scores = InfluenceModule(module, store, InfluenceFunction("ekfac")).scores(queries)
    assert scores.shape == (3, 13) and bool(scores.isfinite().all())


def refused(kind: type[InfluenceError], match: str, root: Path, module: Any, *args: Any, **settings: Any) -> None:
    before, state = everything(root), copy.deepcopy(module.state_dict())
    with pytest.raises(kind, match=f"(?s){match}.*HINT"):
        add_curvature(module, root, *(args or (batches(),)), **settings)
    assert_equal(everything(root), before)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, root = fitted(tmp_path), tmp_path / "store"
    add_curvature(module, root, batches())
    refused(StoreError, "has the curvature 'ekfac' of step 8 already", root, module)
    first = ArtifactStore.open(root).checkpoints()[0]
    add_curvature(module, root, batches(), at=first)
    refused(StoreError, "has the curvature 'ekfac' of step 4 already", root, module, at=first)
    refused(StoreError, "no such checkpoint.*4, 8", root, module, at=Checkpoint(5, 0, 5), statistics="kfac")

    other = TensorDataset(vectors().tensors[0] + 1, vectors().tensors[1])
    refused(StoreError, "other content", root, module, batches(other), "kfac")
    refused(
        StoreError, "another training set.*13 samples.*9", root, module, batches(Subset(vectors(), range(9))), "kfac"
    )
    refused(StoreError, "another model.*first.weight", root, Net(width=6), batches(), "kfac")
    refused(UnsupportedError, "DataLoader", root, module, [1, 2], "kfac")

    refused(CurvatureError, "unknown curvature statistics", root, module, batches(), "kfca")
    refused(CurvatureError, "does not fit", root, module, batches(), Dense("fisher", at_most=5))
    for wrong in ({"labels": "all"}, {"at_most": 0}, {"batch_size": 2.0}, {"seed": None}):
        refused(UnsupportedError, next(iter(wrong)), root, module, batches(), "kfac", **wrong)
    refused(InfluenceError, "nothing", root, module, batches(), "kfac", parameters="nothing.*")
    monkeypatch.setattr(Store, "free_bytes", lambda self: 10)
    refused(StoreError, "too little space for the curvature 'kfac'", root, module, batches(), "kfac")


def test_losses_are_checked_and_failures_leave_nothing(tmp_path: Path) -> None:
    module, root = fitted(tmp_path, make=lambda: Net(loss="own")), tmp_path / "store"
    refused(LossError, "predictive distribution, which this loss does not tell", root, module, labels="exact")

    class Nan(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            bad = bool((batch[0] == vectors()[9][0]).all(1).any()) and len(batch[0]) == 4
            return super().training_step(batch, batch_idx) * (float("nan") if bad else 1.0)

    broken = Nan(loss="own")
    refused(CaptureError, "NaN or infinite, in samples 8 to 11", root, broken)
    assert broken.training

    class Coupled(Net):
        def loss(self, batch: Any) -> Tensor:
            z = self(batch[0])
            return (z - z.mean(0)).square().mean()

    refused(LossError, "couples", root, Coupled(loss="own"))


def test_a_store_without_checkpoints(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_before_optimizer_step(self, *args: Any) -> None:
            raise RuntimeError("on purpose")

    module = seeded(Net)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, module, GradientSnapshot(tmp_path / "store", "head.*"), Stops(), data=batches())
    refused(QueryError, "holds no checkpoint", tmp_path / "store", module)
    with pytest.raises(StoreError, match="no artifact store"):
        add_curvature(module, tmp_path / "nowhere", batches())
