"""ArtifactStore: what is written comes back, checkpoint by checkpoint, for readers that open it while it grows."""

from __future__ import annotations

import json
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.artifacts import ArtifactStore, BackgroundWriter, Checkpoint, Shard, StepRange
from lightning_influence.artifacts import disk as disk_module
from lightning_influence.artifacts.journal import Journal
from lightning_influence.artifacts.tensor_files import TensorFile
from lightning_influence.errors import StoreError


def test_layout(replayed: ArtifactStore) -> None:
    files = sorted(path.relative_to(replayed.root).as_posix() for path in replayed.root.rglob("*.*"))
    frozen = [path for path in files if path.startswith("frozen/")]
    assert len(frozen) == 1 and len(Path(frozen[0]).stem) == 16
    assert [path for path in files if not path.startswith("frozen/")] == [
        *(
            f"checkpoints/step={step:08d}/{name}.safetensors"
            for step in (10, 20)
            for name in ("gradients-00000", "gradients-00001", "gradients-00002", "optimizer", "weights")
        ),
        "manifest-rank00000.jsonl",
        "manifest.json",
    ]


def test_replayed_round_trip(replayed: ArtifactStore, kit: Any, module: nn.Module) -> None:
    store = ArtifactStore.open(replayed.root)
    assert store.manifest == replayed.manifest and store.rank == 0
    assert store.checkpoints() == (kit.checkpoint_at(10), kit.checkpoint_at(20))
    assert "2 checkpoints" in repr(store)
    for checkpoint in store.checkpoints():
        shards = store.shards(checkpoint)
        assert [shard.span for shard in shards] == kit.spans()
        for shard in shards:
            assert torch.equal(shard.sample_ids, torch.arange(*shard.span))
            assert shard.num_samples == shard.span[1] - shard.span[0]
            expected = kit.gradients_of(shard.span, checkpoint.step)
            assert set(shard.tensors) == set(expected) and set(shard.records) == {"loss", "margin"}
            for name, tensor in expected.items():
                assert torch.equal(shard.tensors[name], tensor)
            assert shard.meta["span"] == list(shard.span)
            with pytest.raises(KeyError):
                shard.tensors["loss"]
        preconditioner = store.preconditioner(checkpoint)
        assert torch.equal(preconditioner["embedding.weight"], torch.full((7, 3), 2.0))
    assert len(store.artifacts()) == 11 and len(store.artifacts("gradients")) == 6
    assert store.verify() == []


def test_only_headers_are_read_before_a_tensor_is_asked_for(
    replayed: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda file, names: (read.append(file.path), real(file, names))[1])
    shards = replayed.shards(replayed.checkpoints()[0])
    assert [shard.num_samples for shard in shards] == [4, 4, 2]
    assert "loss" in shards[0].records and "loss" not in shards[0].tensors and len(shards[0].tensors) == 1
    assert read == []
    _ = shards[1].records["loss"]
    assert [path.name for path in read] == ["gradients-00001.safetensors"]


def test_dynamics(replayed: ArtifactStore) -> None:
    dynamics = replayed.dynamics(replayed.checkpoints()[0])
    assert set(dynamics) == {"loss", "margin"}
    assert torch.equal(dynamics["loss"], torch.arange(10) + 0.5)
    assert dynamics["margin"].dtype == torch.float64


def test_dynamics_are_nan_where_nothing_was_recorded(tmp_path: Path, make_manifest: Any, kit: Any, module: Any) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    for span in kit.spans():
        records = {"loss": torch.ones(4, dtype=torch.bfloat16)} if span[0] == 0 else {}
        store.commit(store.write_gradients(1, 1, span, kit.gradients_of(span), records))
    store.commit_checkpoint(kit.checkpoint_at(1), store.write_weights(1, 1, module.state_dict()))
    loss = store.dynamics(kit.checkpoint_at(1))["loss"]
    assert loss.dtype == torch.float32 and loss.isnan().tolist() == [False] * 4 + [True] * 6


def test_shards_in_memory() -> None:
    contents = {"sample_ids": torch.tensor([3, 1]), "dense|w|values": torch.ones(2, 1), "loss": torch.ones(2)}
    shard = Shard(contents, (0, 4))
    assert (shard.num_samples, list(shard.tensors), list(shard.records)) == (2, ["dense|w|values"], ["loss"])
    with pytest.raises(StoreError, match="outside its span"):
        _ = Shard(contents, (0, 3)).sample_ids
    assert Shard({"sample_ids": torch.zeros(0, dtype=torch.int64)}, (0, 0)).sample_ids.shape == (0,)


def test_in_flight_round_trip(in_flight: ArtifactStore) -> None:
    store = ArtifactStore.open(in_flight.root)
    shards = store.shards(StepRange(0, 6))
    assert [shard.meta["batches"] for shard in shards] == [2, 2, 2]
    assert torch.cat([shard.sample_ids for shard in shards]).tolist() == [*range(10), 0, 1]
    assert torch.cat([shard.records["steps"] for shard in shards]).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert shards[0].span == (0, 10)
    assert len(store.shards(StepRange(2, 4))) == 1 and store.shards(StepRange(6, 9)) == ()
    with pytest.raises(StoreError, match="both sides") as error:
        store.shards(StepRange(0, 3))
    assert "steps 3 to 4" in str(error.value)
    assert store.verify() == []


def test_in_flight_chunks_of_several_ranks_are_ordered_by_mark_and_rank(
    tmp_path: Path, make_manifest: Any, kit: Any
) -> None:
    manifest = make_manifest(mode="in_flight")
    stores = [ArtifactStore.create(tmp_path / "s", manifest, rank) for rank in (0, 1)]
    for rank, mark in [(1, 2), (1, 4), (0, 2), (0, 4)]:
        kit.chunk(stores[rank], mark)
    shards = ArtifactStore.open(tmp_path / "s").shards(StepRange(0, 4))
    names = [shard.contents.path.parent.name for shard in shards]  # type: ignore[attr-defined]
    assert names == ["rank00000", "rank00001"] * 2
    assert [float(shard.tensors["dense|embedding.weight|values"][0, 0, 0]) for shard in shards] == [2, 2, 4, 4]
    assert stores[1].rank == 1


def test_shards_written_by_two_ranks_make_one_checkpoint(
    tmp_path: Path, make_manifest: Any, kit: Any, module: Any
) -> None:
    stores = [ArtifactStore.create(tmp_path / "s", make_manifest(), rank) for rank in (0, 1)]
    for number, span in enumerate(kit.spans()):
        store = stores[number % 2]
        store.commit(store.write_gradients(1, 1, span, kit.gradients_of(span)))
    with pytest.raises(StoreError, match="rank 1 commits checkpoints"):
        stores[1].commit_checkpoint(kit.checkpoint_at(1), [])
    stores[0].commit_checkpoint(kit.checkpoint_at(1), stores[0].write_weights(1, 1, module.state_dict()))
    for store in (*stores, ArtifactStore.open(tmp_path / "s")):
        assert [shard.span for shard in store.shards(kit.checkpoint_at(1))] == kit.spans()


def test_a_reader_sees_commits_as_they_come_and_nothing_else(
    tmp_path: Path, make_manifest: Any, kit: Any, module: Any
) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    reader = ArtifactStore.open(tmp_path / "s")
    written = store.write_gradients(1, 1, (0, 4), kit.gradients_of((0, 4)))
    assert reader.artifacts() == ()
    store.commit(written)
    assert [artifact.path for artifact in reader.artifacts()] == [written.path]
    assert reader.checkpoints() == ()
    store.commit(written)  # a second time changes nothing
    assert len(reader.artifacts()) == 1


@pytest.mark.parametrize("lack", [0, 1, 2])
def test_a_gap_in_the_shards_is_refused(tmp_path: Path, make_manifest: Any, kit: Any, module: Any, lack: int) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    for number, span in enumerate(kit.spans()):
        if number != lack:
            store.commit(store.write_gradients(1, 1, span, kit.gradients_of(span)))
    weights = store.write_weights(1, 1, module.state_dict())
    with pytest.raises(StoreError, match="do not cover the training set") as error:
        store.commit_checkpoint(kit.checkpoint_at(1), weights)
    first, last = kit.spans()[lack][0], kit.spans()[lack][1] - 1
    assert f"no shard for the positions {first} to {last}" in str(error.value)
    assert store.checkpoints() == ()


@pytest.mark.parametrize(
    ("span", "found"), [([0, 5], "two shards for the positions 4 to 4"), ([8, 11], "positions up to 10")]
)
def test_an_overlap_or_excess_of_the_shards_is_refused(
    tmp_path: Path, make_manifest: Any, kit: Any, module: Any, span: list[int], found: str
) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    spans = [list(each) if each[0] != span[0] else span for each in kit.spans()]
    for number, (start, stop) in enumerate(spans):
        path = f"checkpoints/step=00000001/gradients-{number:05d}.safetensors"
        tensors = {"sample_ids": torch.arange(start, stop)}
        store.commit(store.write("gradients", path, tensors, step=1, mark=1, meta={"span": [start, stop]}))
    store.commit(*store.write_weights(1, 1, module.state_dict()))
    with pytest.raises(StoreError, match=found):
        store.commit_checkpoint(kit.checkpoint_at(1), [])
    Journal(store.root, 0).append([{"record": "checkpoint", **kit.checkpoint_at(1).to_json()}])
    with pytest.raises(StoreError, match=found):
        ArtifactStore.open(store.root).shards(kit.checkpoint_at(1))


def test_what_a_store_does_not_hold(replayed: ArtifactStore, in_flight: ArtifactStore, module: Any, kit: Any) -> None:
    with pytest.raises(StoreError, match="no in-flight gradients"):
        replayed.shards(StepRange(0, 10))
    with pytest.raises(StoreError, match="no checkpoint at step 15") as error:
        replayed.shards(kit.checkpoint_at(15))
    assert "[10, 20]" in str(error.value)
    in_flight.commit_checkpoint(kit.checkpoint_at(6), in_flight.write_weights(6, 6, module.state_dict()))
    with pytest.raises(StoreError, match="no replayed gradients"):
        in_flight.shards(kit.checkpoint_at(6))
    with pytest.raises(StoreError, match="Adam-like"):
        in_flight.preconditioner(kit.checkpoint_at(6))
    assert in_flight.verify() == []


def test_misuse_while_writing(replayed: ArtifactStore, kit: Any, module: Any) -> None:
    reader = ArtifactStore.open(replayed.root)
    with pytest.raises(StoreError, match="open for reading only"):
        reader.write("x", "x.safetensors", {}, step=0, mark=0)
    with pytest.raises(StoreError, match="open for reading only"):
        reader.record("x", 1)
    with pytest.raises(StoreError, match="committed already"):
        replayed.commit_checkpoint(kit.checkpoint_at(10), [])
    with pytest.raises(StoreError, match="a committed file"):
        replayed.write_gradients(10, 10, (0, 4), kit.gradients_of((0, 4)))
    with pytest.raises(StoreError, match="another ending"):
        replayed.write("x", "x.pt", {}, step=0, mark=0)
    with pytest.raises(StoreError, match="is not complete"):
        replayed.commit_checkpoint(kit.checkpoint_at(30), [])
    for span in [(0, 3), (2, 6), (8, 12), (-4, 0)]:
        with pytest.raises(StoreError, match="no shard of this store"):
            replayed.write_gradients(30, 30, span, {})
    gradients = kit.gradients_of((0, 4))
    for tensors, records in [
        ({"plain": torch.ones(4)}, {}),
        (gradients, {"a|b": torch.ones(4)}),
        (gradients, {"loss": torch.ones(3)}),
        (gradients, {"loss": torch.tensor(1.0)}),
        (gradients, {"sample_ids": torch.arange(4)}),
    ]:
        with pytest.raises(StoreError, match="cannot be written"):
            replayed.write_gradients(30, 30, (0, 4), tensors, records)
    with pytest.raises(StoreError, match="cannot be written"):
        replayed.write_in_flight((1, 1), 1, 1, torch.ones(2), {})
    with pytest.raises(ValueError, match="a chunk of 3 batches"):
        replayed.write_in_flight((1, 1), 2, 3, torch.arange(2), {})
    with pytest.raises(StoreError, match="meta data"):
        replayed.write("x", "x.safetensors", {}, step=0, mark=0, meta={"a": torch.ones(1)})  # type: ignore[dict-item]
    assert replayed.verify() == []


def test_facts(replayed: ArtifactStore) -> None:
    replayed.record("overhead", {"seconds": 1.5})
    replayed.record("bytes", 10)
    assert ArtifactStore.open(replayed.root).manifest.facts == {"overhead": {"seconds": 1.5}, "bytes": 10}
    with pytest.raises(StoreError, match="the fact 'bad'"):
        replayed.record("bad", object())  # type: ignore[arg-type]
    assert json.loads((replayed.root / "manifest.json").read_text())["facts"]["bytes"] == 10


def test_space(replayed: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_module.shutil, "disk_usage", lambda _: usage(100, 0, 100))
    assert replayed.free_bytes() == 100
    replayed.require_free(100)
    with pytest.raises(StoreError, match="too little space") as error:
        replayed.require_free(101)
    assert (error.value.expected, error.value.found) == ("101 bytes free", "100 bytes free")


def test_writing_from_a_background_thread(tmp_path: Path, make_manifest: Any, kit: Any) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest(mode="in_flight"))
    names = set()

    def write(mark: int) -> None:
        names.add(threading.current_thread().name)
        kit.chunk(store, mark)

    with BackgroundWriter(max_pending=2) as writer:
        for mark in range(2, 42, 2):
            writer.submit(lambda mark=mark: write(mark))
            store.artifacts()
    assert names == {"artifact-writer"}
    assert len(ArtifactStore.open(store.root).shards(StepRange(0, 40))) == 20
    assert store.verify() == []


def test_an_artifact_of_another_rank_or_file_is_not_committed(tmp_path: Path, make_manifest: Any, kit: Any) -> None:
    stores = [ArtifactStore.create(tmp_path / "s", make_manifest(), rank) for rank in (0, 1)]
    written = stores[0].write_gradients(1, 1, (0, 4), kit.gradients_of((0, 4)))
    with pytest.raises(StoreError, match="cannot be committed by rank 1"):
        stores[1].commit(written)
    (stores[0].root / written.path).unlink()
    with pytest.raises(StoreError, match="cannot be read"):
        stores[0].commit(written)
    assert stores[0].artifacts() == ()


def test_checkpoints_are_ordered_by_step(tmp_path: Path, make_manifest: Any, kit: Any, module: Any) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    for step in (30, 10, 20):
        store.commit_checkpoint(Checkpoint(step, 0, step), store.write_weights(step, step, module.state_dict()))
    assert [checkpoint.step for checkpoint in store.checkpoints()] == [10, 20, 30]
