"""state_dicts in the store: tied tensors once, a frozen base once, and what is no tensor left out with a warning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.artifacts import ArtifactStore, weights
from lightning_influence.errors import StoreError


@pytest.fixture
def store(tmp_path: Path, make_manifest: Any) -> ArtifactStore:
    return ArtifactStore.create(tmp_path / "store", make_manifest())


def commit(store: ArtifactStore, kit: Any, step: int, state: dict[str, Any], frozen: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    store.commit_checkpoint(kit.checkpoint_at(step), store.write_weights(step, step, state, frozen))
    return ArtifactStore.open(store.root).weights(kit.checkpoint_at(step))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_round_trip_and_load(store: ArtifactStore, kit: Any, module: Any) -> None:
    state = commit(store, kit, 1, module.state_dict(), module.frozen_names())
    assert_same(state, module.state_dict())
    other = copy.deepcopy(module)
    nn.init.zeros_(other.embedding.weight)
    nn.init.zeros_(other.base.weight)
    other.load_state_dict(state)
    assert_same(other.state_dict(), module.state_dict())


def test_tied_tensors_are_stored_once_and_come_back_tied(store: ArtifactStore, kit: Any, module: Any) -> None:
    state = commit(store, kit, 1, module.state_dict())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()
    (artifact,) = store.artifacts("weights")
    assert artifact.meta["aliases"] == {"head.weight": "embedding.weight"}
    size = sum(p.numel() * p.element_size() for p in [*module.parameters(), *module.buffers()])
    assert size < artifact.bytes < size + 2048


def test_a_tied_frozen_tensor(store: ArtifactStore, kit: Any, module: Any) -> None:
    module.embedding.weight.requires_grad_(False)
    state = commit(store, kit, 1, module.state_dict(), module.frozen_names())
    assert_same(state, module.state_dict())
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()


def test_views_of_one_storage_that_are_not_the_same_tensor(store: ArtifactStore, kit: Any) -> None:
    fused = torch.randn(6, 3)
    state = {"q": fused[:3], "k": fused[3:], "all": fused, "t": fused.t(), "e": fused[:0], "f": fused[:0]}
    assert_same(commit(store, kit, 1, state), state)
    (artifact,) = store.artifacts("weights")
    assert artifact.meta["aliases"] == {}


def test_a_frozen_base_is_stored_once(replayed: ArtifactStore, module: Any) -> None:
    assert len(replayed.artifacts("frozen")) == 1
    first, second = (replayed.weights(checkpoint) for checkpoint in replayed.checkpoints())
    assert_same(second, module.state_dict())
    assert torch.equal(first["base.weight"], second["base.weight"])
    assert not torch.equal(first["embedding.weight"], second["embedding.weight"])
    assert not torch.equal(first["norm.running_mean"], second["norm.running_mean"])


def test_a_frozen_base_that_did_not_change_is_not_hashed_again(
    store: ArtifactStore, kit: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, kit, 1, module.state_dict(), module.frozen_names())
    read: list[str] = []
    real = weights.content_digest
    monkeypatch.setattr(weights, "content_digest", lambda name, tensor: (read.append(name), real(name, tensor))[1])
    commit(store, kit, 2, module.state_dict(), module.frozen_names())
    assert read == []
    with torch.no_grad():
        module.base.bias.add_(1)
    state = commit(store, kit, 3, module.state_dict(), module.frozen_names())
    assert read == ["base.bias"]
    assert_same(state, module.state_dict())
    assert len(store.artifacts("frozen")) == 2


@pytest.mark.parametrize("change", ["add through .data", "new .data", "bytes beyond the last word"])
def test_changes_that_no_version_counter_shows(store: ArtifactStore, kit: Any, module: Any, change: str) -> None:
    commit(store, kit, 1, module.state_dict(), module.frozen_names())
    version = module.base.weight._version
    if change == "add through .data":
        module.base.weight.data.add_(1)
    elif change == "new .data":
        module.base.weight.data = module.base.weight.data * 0.5
    else:
        module.base.weight.data.view(-1)[-1] += 1  # 9 floats: the last is outside the 64-bit words
    assert module.base.weight._version == version
    state = commit(store, kit, 2, module.state_dict(), module.frozen_names())
    assert_same(state, module.state_dict())


def test_gradual_unfreezing_stores_nothing_frozen_again(store: ArtifactStore, kit: Any, module: Any) -> None:
    commit(store, kit, 1, module.state_dict(), module.frozen_names())
    module.base.bias.requires_grad_(True)
    assert_same(commit(store, kit, 2, module.state_dict(), module.frozen_names()), module.state_dict())
    module.base.requires_grad_(False)
    assert_same(commit(store, kit, 3, module.state_dict(), module.frozen_names()), module.state_dict())
    assert len(store.artifacts("frozen")) == 1


def test_equal_frozen_tensors_share_one_place(store: ArtifactStore, kit: Any) -> None:
    state = {"a": torch.ones(1000), "b": torch.ones(1000), "c": torch.ones(1000, dtype=torch.float64)}
    assert_same(commit(store, kit, 1, state, {"a", "b", "c"}), state)
    (artifact,) = store.artifacts("frozen")
    assert artifact.bytes < 4000 + 8000 + 1024


def test_everything_frozen_and_nothing_at_all(store: ArtifactStore, kit: Any) -> None:
    state = {"a": torch.randn(3)}
    assert_same(commit(store, kit, 1, state, {"a"}), state)
    assert_same(commit(store, kit, 2, {}), {})


def test_half_precision_and_odd_tensors(store: ArtifactStore, kit: Any) -> None:
    state = {
        "bf16": torch.randn(3).bfloat16(),
        "fp16": torch.randn(3).half(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3),
        "mask": torch.tensor([True, False]),
        "turned": torch.randn(3, 5).t(),
    }
    assert_same(commit(store, kit, 1, state), state)
    assert_same(commit(store, kit, 2, state, set(state)), state)


def test_one_element_with_a_stride_of_its_own(store: ArtifactStore, kit: Any) -> None:
    state = {"a": torch.arange(6.0).view(2, 3)[:1, ::3], "b": torch.arange(5.0, dtype=torch.float32)[1:2]}
    assert_same(commit(store, kit, 1, state), state)
    assert_same(commit(store, kit, 2, state, set(state)), state)


def test_inference_tensors(store: ArtifactStore, kit: Any) -> None:
    with torch.inference_mode():
        state = {"a": torch.ones(3)}
    assert_same(commit(store, kit, 1, state, {"a"}), {"a": torch.ones(3)})
    assert_same(commit(store, kit, 2, state, {"a"}), {"a": torch.ones(3)})


def test_entries_that_are_no_tensors_are_left_out_and_named(store: ArtifactStore, kit: Any) -> None:
    state = {"a": torch.ones(2), "b._extra_state": {"scale": 3}, "c": None}
    with pytest.warns(UserWarning, match=r"\['b._extra_state', 'c'\] are no tensors"):
        found = commit(store, kit, 1, state)
    assert_same(found, {"a": torch.ones(2)})
    assert store.artifacts("weights")[0].meta["left_out"] == ["b._extra_state", "c"]


@pytest.mark.parametrize("frozen", [set(), {"a"}], ids=["trained", "frozen"])
def test_tensors_that_cannot_be_stored_are_refused(store: ArtifactStore, frozen: set[str]) -> None:
    for tensor in (torch.eye(2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(StoreError, match="'a' cannot be stored"):
            store.write_weights(1, 1, {"a": tensor}, frozen)


def test_frozen_tensors_of_a_checkpoint_that_failed_are_committed_with_the_next(
    store: ArtifactStore, kit: Any, module: Any
) -> None:
    store.write_weights(1, 1, module.state_dict(), module.frozen_names())  # never committed
    second = store.write_weights(2, 2, module.state_dict(), module.frozen_names())
    assert [artifact.kind for artifact in second] == ["frozen", "weights"]
    with pytest.raises(StoreError, match="is not complete"):
        store.commit_checkpoint(kit.checkpoint_at(2), second[1:])
    store.commit_checkpoint(kit.checkpoint_at(2), second)
    assert_same(ArtifactStore.open(store.root).weights(kit.checkpoint_at(2)), module.state_dict())


def test_a_resumed_run_finds_the_frozen_base_again(replayed: ArtifactStore, kit: Any, module: Any) -> None:
    store = ArtifactStore.resume(replayed.root, replayed.manifest, mark=20)
    written = store.write_weights(30, 30, module.state_dict(), module.frozen_names())
    assert [artifact.kind for artifact in written] == ["weights"]
    store.commit_checkpoint(kit.checkpoint_at(30), written)
    assert_same(store.weights(kit.checkpoint_at(30)), module.state_dict())
