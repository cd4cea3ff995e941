"""link_checkpoint: a store for a run that was trained elsewhere, by its weights and its data alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_influence import ArtifactStore, StoreError, link_checkpoint
from lightning_influence.curvature import recorded_curvature
from tests.two_stages import Network, data, loader, network

pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
ELSEWHERE = data(12, 3, 3)


def outside(root: Path, **options: Any) -> tuple[Network, ArtifactStore]:
    module = network(3, 0)
    return module, link_checkpoint(module, root / "made", loader(ELSEWHERE), weight_decay=0.01, **options)


@pytest.mark.parametrize("kind", ["module", "state_dict", "torch", "lightning", "safetensors"])
def test_a_store_of_a_checkpoint_has_its_weights_and_its_curvature(tmp_path, kind):
    trained, blank = network(3, 1), network(3, 0)
    source: Any = trained.state_dict()
    if kind == "torch":
        torch.save(source, tmp_path / "weights.pt")
        source = tmp_path / "weights.pt"
    elif kind == "lightning":
        torch.save({"state_dict": source, "epoch": 3}, tmp_path / "run.ckpt")
        source = tmp_path / "run.ckpt"
    elif kind == "safetensors":
        save_file(source, tmp_path / "weights.safetensors")
        source = tmp_path / "weights.safetensors"
    module = trained if kind == "module" else blank
    before = copy.deepcopy(module.state_dict())
    store = link_checkpoint(
        module, tmp_path / "made", loader(ELSEWHERE), None if kind == "module" else source, weight_decay=0.01
    )
    weights = store.weights(store.checkpoints()[-1])
    assert all(torch.equal(weights[name], value) for name, value in trained.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    found = recorded_curvature(store)
    assert found.name == "ekfac" and set(found.decay.values()) == {0.01}
    assert store.verify() == []


def test_a_checkpoint_that_does_not_fit_or_would_execute_is_refused(tmp_path):
    module = network(3, 0)
    with pytest.raises(StoreError, match="do not fit Network"):
        link_checkpoint(module, tmp_path / "a", loader(ELSEWHERE), network(2, 0).state_dict())
    torch.save({"state_dict": {"x": Path("a")}, "object": network}, tmp_path / "objects.ckpt")
    with pytest.raises(StoreError, match="cannot be read as a checkpoint"):
        link_checkpoint(module, tmp_path / "b", loader(ELSEWHERE), tmp_path / "objects.ckpt")
    with pytest.raises(StoreError, match="cannot be read as a checkpoint"):
        link_checkpoint(module, tmp_path / "c", loader(ELSEWHERE), tmp_path / "nothing.ckpt")
    with pytest.raises(StoreError, match="holds no weights"):
        link_checkpoint(module, tmp_path / "d", loader(ELSEWHERE), {"epoch": 3})
    assert not any((tmp_path / name).exists() for name in "abcd")
    outside(tmp_path)
    with pytest.raises(StoreError, match="is not empty"):
        outside(tmp_path)
