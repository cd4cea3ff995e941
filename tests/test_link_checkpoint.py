"""link_checkpoint: a store for a run that was trained elsewhere, by its weights and its data alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_influence import EKFAC, ArtifactStore, StoreError, UnsupportedError, link_checkpoint
from lightning_influence.curvature import recorded_curvature
from lightning_influence.errors import InfluenceError
from tests.two_stages import Network, data, loader, network

pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")
ELSEWHERE = data(12, 3, 3)


class Failing(EKFAC):
    """Stops in the middle, when the store is there already."""

    def collect(self, evidence: Any) -> Any:
        raise RuntimeError("power cut")


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


@pytest.mark.parametrize("decay", ["0.1", -0.1, float("nan"), float("inf"), True, None])
def test_a_weight_decay_that_is_none_is_refused_before_anything_is_written(tmp_path, decay):
    with pytest.raises(UnsupportedError, match="no weight decay"):
        link_checkpoint(network(3, 0), tmp_path / "made", loader(ELSEWHERE), weight_decay=decay)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("folder", ["new", "empty"])
@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"statistics": "nonsense"}, InfluenceError),
        ({"labels": "nonsense"}, InfluenceError),
        ({"at_most": 0}, InfluenceError),
        ({"batch_size": 0}, InfluenceError),
        ({"parameters": "tail.*"}, InfluenceError),
        ({"per_sample_loss": lambda module, batch: module(batch[0])}, InfluenceError),
        ({"statistics": Failing()}, RuntimeError),
    ],
    ids=["statistics", "labels", "at_most", "batch_size", "parameters", "loss", "later"],
)
def test_nothing_is_left_of_what_failed_and_the_same_call_can_be_made_again(tmp_path, options, kind, folder):
    module, made = network(3, 0), tmp_path / "made"
    if folder == "empty":
        made.mkdir()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(kind):
        link_checkpoint(module, made, loader(ELSEWHERE), network(3, 1).state_dict(), **options)
    assert not made.exists() or not any(made.iterdir())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert len(link_checkpoint(module, made, loader(ELSEWHERE)).checkpoints()) == 1


def test_a_full_folder_stays_as_it_was(tmp_path):
    _, store = outside(tmp_path)
    files = {path: path.read_bytes() for path in sorted(store.root.rglob("*")) if path.is_file()}
    for options in ({}, {"statistics": Failing()}):
        with pytest.raises(StoreError, match="is not empty"):
            outside(tmp_path, **options)
    assert files == {path: path.read_bytes() for path in sorted(store.root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (3, "cannot be read as a checkpoint"),
        ("folder", "cannot be read as a checkpoint"),
        ("\0", "cannot be read as a checkpoint"),
        ({"model." + name: value for name, value in network(3, 1).state_dict().items()}, "do not fit Network"),
        ({"state_dict": {}}, "holds no weights"),
        ([1], "cannot be read as a checkpoint"),
    ],
    ids=["number", "folder", "no path", "other names", "empty", "list"],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, checkpoint, message):
    (tmp_path / "folder").mkdir()
    given = tmp_path / "folder" if checkpoint == "folder" else checkpoint
    with pytest.raises(StoreError, match=message) as refused:
        link_checkpoint(network(3, 0), tmp_path / "made", loader(ELSEWHERE), given)
    assert "HINT" in str(refused.value) and not (tmp_path / "made").exists()


def test_frozen_parameters_of_the_module_are_no_part_of_the_curvature(tmp_path):
    module = network(3, 0)
    module.encoder.requires_grad_(False)
    store = link_checkpoint(module, tmp_path / "made", loader(ELSEWHERE), parameters="last_layer")
    assert set(recorded_curvature(store).curvature.parameters) == {"head.weight", "head.bias"}
    assert store.checkpoints()[-1].groups[0].parameters == ("head.weight", "head.bias")
    assert set(store.weights(store.checkpoints()[-1])) == set(module.state_dict())


@pytest.mark.parametrize("folder", [3, None, b"made"])
def test_what_is_no_folder_is_refused(folder):
    with pytest.raises(UnsupportedError, match="a new folder"):
        link_checkpoint(network(3, 0), folder, loader(ELSEWHERE))
