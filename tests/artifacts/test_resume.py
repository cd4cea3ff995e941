"""Crashes at every moment of a commit, and what a resumed run finds: nothing lost, nothing twice, nothing left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_influence.artifacts import ArtifactStore, StepRange
from lightning_influence.errors import StoreError


def content(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_resume_of_a_whole_store_changes_nothing(replayed: ArtifactStore, in_flight: ArtifactStore) -> None:
    for store, mark in ((replayed, 20), (replayed, None), (in_flight, 6), (in_flight, None)):
        before = content(store.root)
        assert ArtifactStore.resume(store.root, store.manifest, mark).verify() == []
        assert content(store.root) == before


def test_records_after_the_mark_are_dropped(
    replayed: ArtifactStore, in_flight: ArtifactStore, kit: Any, module: Any
) -> None:
    store = ArtifactStore.resume(replayed.root, replayed.manifest, mark=19)
    assert store.checkpoints() == (kit.checkpoint_at(10),) and store.verify() == []
    assert not (store.root / "checkpoints/step=00000020").exists()
    assert len(store.artifacts("frozen")) == 1  # the first checkpoint needs it
    store = ArtifactStore.resume(in_flight.root, in_flight.manifest, mark=4)
    assert len(store.shards(StepRange(0, 9))) == 2 and store.verify() == []


def test_what_is_written_after_a_resume_equals_the_uninterrupted_run(
    tmp_path: Path, make_manifest: Any, kit: Any, in_flight: ArtifactStore
) -> None:
    whole = content(in_flight.root)
    store = ArtifactStore.resume(in_flight.root, in_flight.manifest, mark=2)
    kit.chunk(store, 4)
    kit.chunk(store, 6)
    assert content(store.root) == whole


def test_mark_zero_starts_over(replayed: ArtifactStore, in_flight: ArtifactStore) -> None:
    for store in (replayed, in_flight):
        again = ArtifactStore.resume(store.root, store.manifest, mark=0)
        assert again.artifacts() == () and again.checkpoints() == () and again.verify() == []
        assert [path for path in content(store.root) if path.endswith(".safetensors")] == []


def crash_after_temporary_file(store: ArtifactStore, kit: Any, module: Any) -> None:
    folder = store.root / "checkpoints/step=00000030"
    folder.mkdir(parents=True)
    (folder / "gradients-00000.safetensors.rank00000.tmp").write_bytes(b"half a file")
    (store.root / "manifest.json.rank00000.tmp").write_bytes(b"{")
    (store.root / "manifest-rank00000.jsonl.rank00000.tmp").write_bytes(b"{")


def crash_after_rename(store: ArtifactStore, kit: Any, module: Any) -> None:
    store.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4)))


def crash_in_a_journal_line(store: ArtifactStore, kit: Any, module: Any) -> None:
    store.commit(store.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4))))
    journal = store.root / "manifest-rank00000.jsonl"
    os.truncate(journal, journal.stat().st_size - 30)


def crash_before_the_line_feed(store: ArtifactStore, kit: Any, module: Any) -> None:
    store.commit(store.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4))))
    journal = store.root / "manifest-rank00000.jsonl"
    os.truncate(journal, journal.stat().st_size - 1)


def crash_with_zeros_at_the_journals_end(store: ArtifactStore, kit: Any, module: Any) -> None:
    crash_after_rename(store, kit, module)
    with open(store.root / "manifest-rank00000.jsonl", "ab") as journal:
        journal.write(bytes(300))


def crash_between_shards(store: ArtifactStore, kit: Any, module: Any) -> None:
    for span in kit.spans()[:2]:
        store.commit(store.write_gradients(30, 30, span, kit.gradients_of(span)))


def crash_before_the_checkpoint_line(store: ArtifactStore, kit: Any, module: Any) -> None:
    for span in kit.spans():
        store.commit(store.write_gradients(30, 30, span, kit.gradients_of(span)))
    module.base.bias.data.add_(1)
    store.commit(*store.write_weights(30, 30, module.state_dict(), module.frozen_names()))


CRASHES = [
    crash_after_temporary_file,
    crash_after_rename,
    crash_in_a_journal_line,
    crash_before_the_line_feed,
    crash_with_zeros_at_the_journals_end,
    crash_between_shards,
    crash_before_the_checkpoint_line,
]


@pytest.mark.parametrize("mark", [20, 30, None])
@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: crash.__name__)
def test_crashes(replayed: ArtifactStore, kit: Any, module: Any, crash: Any, mark: int | None) -> None:
    """The store opens at its last commit; the resumed one is as if the crash had not been."""
    before = content(replayed.root)
    crash(replayed, kit, module)
    reader = ArtifactStore.open(replayed.root)
    assert reader.checkpoints() == (kit.checkpoint_at(10), kit.checkpoint_at(20))
    assert [shard.sample_ids.tolist() for shard in reader.shards(kit.checkpoint_at(20))[:1]] == [[0, 1, 2, 3]]
    assert reader.verify() != []
    store = ArtifactStore.resume(replayed.root, replayed.manifest, mark)
    assert content(store.root) == before
    assert store.verify() == []
    kit.snapshot(store, module, 30)
    assert ArtifactStore.open(store.root).checkpoints()[-1] == kit.checkpoint_at(30)
    assert store.verify() == []


def test_a_crash_in_the_resume_itself(replayed: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the journal was replaced and before any file went."""

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            ArtifactStore.resume(replayed.root, replayed.manifest, mark=10)
    assert [at.step for at in ArtifactStore.open(replayed.root).checkpoints()] == [10]
    store = ArtifactStore.resume(replayed.root, replayed.manifest, mark=10)
    assert store.verify() == [] and not (store.root / "checkpoints/step=00000020").exists()


@pytest.mark.parametrize("mark", [3, 5, 7])
def test_fewer_in_flight_records_than_the_mark_requires(in_flight: ArtifactStore, mark: int) -> None:
    before = content(in_flight.root)
    with pytest.raises(StoreError, match="do not reach the Lightning checkpoint") as error:
        ArtifactStore.resume(in_flight.root, in_flight.manifest, mark)
    assert f"up to {mark}" in str(error.value.expected) and error.value.found == f"the batches up to {min(6, mark - 1)}"
    assert content(in_flight.root) == before


def test_a_rank_without_records(in_flight: ArtifactStore) -> None:
    with pytest.raises(StoreError, match="of rank 1 do not reach"):
        ArtifactStore.resume(in_flight.root, in_flight.manifest, 6, rank=1)


def test_a_hole_in_the_in_flight_records(tmp_path: Path, make_manifest: Any, kit: Any) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest(mode="in_flight"))
    kit.chunk(store, 2)
    kit.chunk(store, 6)
    with pytest.raises(StoreError, match="the batches up to 2"):
        ArtifactStore.resume(store.root, store.manifest, 6)


def test_a_store_that_began_in_the_middle_of_a_fit(tmp_path: Path, make_manifest: Any, kit: Any) -> None:
    store = ArtifactStore.create(tmp_path / "s", make_manifest(mode="in_flight"))
    kit.chunk(store, 22)
    kit.chunk(store, 24)
    assert len(ArtifactStore.resume(store.root, store.manifest, 24).artifacts()) == 2


def test_a_committed_file_that_is_gone_is_noticed_at_resume(replayed: ArtifactStore) -> None:
    (replayed.root / "checkpoints/step=00000010/gradients-00001.safetensors").unlink()
    before = content(replayed.root)
    with pytest.raises(StoreError, match=r"gradients-00001.safetensors cannot be read"):
        ArtifactStore.resume(replayed.root, replayed.manifest, mark=10)
    assert content(replayed.root) == before


@pytest.mark.parametrize("crashed", [False, True])
def test_two_ranks_resume_one_after_the_other(
    tmp_path: Path, make_manifest: Any, kit: Any, module: Any, crashed: bool
) -> None:
    root, manifest = tmp_path / "s", make_manifest()
    stores = [ArtifactStore.create(root, manifest, rank) for rank in (0, 1)]
    for step in (10, 20):
        for number, span in enumerate(kit.spans()):
            store = stores[number % 2]
            store.commit(store.write_gradients(step, step, span, kit.gradients_of(span)))
        if step == 10 or not crashed:
            files = stores[0].write_weights(step, step, module.state_dict())
            stores[0].commit_checkpoint(kit.checkpoint_at(step), files)
    (root / "checkpoints/step=00000020/x.safetensors.rank00001.tmp").write_bytes(b"x")
    for rank in (0, 1):
        stores[rank] = ArtifactStore.resume(root, manifest, 20 if crashed else 19, rank, world_size=2)
    assert stores[0].verify() == []
    assert [at.step for at in stores[1].checkpoints()] == [10]
    assert [shard.span for shard in stores[1].shards(kit.checkpoint_at(10))] == kit.spans()
    stores[1].commit(stores[1].write_gradients(20, 20, (4, 8), kit.gradients_of((4, 8))))


def test_ranks_that_are_no_more_are_cleaned_by_rank_zero(
    tmp_path: Path, make_manifest: Any, kit: Any, module: Any
) -> None:
    root, manifest = tmp_path / "s", make_manifest(mode="in_flight")
    stores = [ArtifactStore.create(root, manifest, rank) for rank in (0, 1)]
    for store in stores:
        kit.chunk(store, 2)
        kit.chunk(store, 4)
    (root / "in_flight/rank00001/chunk-00000004.safetensors").write_bytes(b"never committed")
    store = ArtifactStore.resume(root, manifest, 2, world_size=1)
    assert [(a.rank, a.mark) for a in store.artifacts()] == [(0, 2), (1, 2)] and store.verify() == []


def test_a_new_rank_joins_a_resumed_replay_store(replayed: ArtifactStore, kit: Any) -> None:
    ArtifactStore.resume(replayed.root, replayed.manifest, 20, 0, world_size=2)
    store = ArtifactStore.resume(replayed.root, replayed.manifest, 20, 1, world_size=2)
    store.commit(store.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4))))
    assert store.artifacts("gradients")[-1].rank == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dataset_length": 12}, "the length of the dataset"),
        ({"dataset_fingerprint": "other"}, "the content of the dataset"),
        ({"settings": {"every_n_epochs": 2, "betas": [0.9, 0.999]}}, "the setting 'every_n_epochs'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_resume_by_another_run_names_the_difference(
    replayed: ArtifactStore, make_manifest: Any, change: dict[str, Any], what: str
) -> None:
    before = content(replayed.root)
    for call in (
        lambda: ArtifactStore.resume(replayed.root, make_manifest(**change), 20),
        lambda: ArtifactStore.create(replayed.root, make_manifest(**change), rank=1),
    ):
        with pytest.raises(StoreError, match=what) as error:
            call()
        assert "(the store)" in str(error.value) and "(this run)" in str(error.value)
    assert content(replayed.root) == before


def test_resume_without_a_store(tmp_path: Path, make_manifest: Any) -> None:
    with pytest.raises(StoreError, match="is not an artifact store"):
        ArtifactStore.resume(tmp_path / "nothing", make_manifest(), 3)
    with pytest.raises(StoreError, match="not a local folder"):
        ArtifactStore.resume("s3://bucket/x", make_manifest(), 3)


def test_a_crash_before_the_manifest_does_not_block_the_folder(tmp_path: Path, make_manifest: Any) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/manifest.json.rank00000.tmp").write_bytes(b"{")
    store = ArtifactStore.create(tmp_path / "s", make_manifest())
    assert store.verify() == []


def test_files_of_other_people_survive_a_resume(replayed: ArtifactStore) -> None:
    notes = [replayed.root / "notes.txt", replayed.root / "checkpoints/step=00000020/plot.png"]
    for path in notes:
        path.write_text("mine")
    store = ArtifactStore.resume(replayed.root, replayed.manifest, 10)
    assert all(path.read_text() == "mine" for path in notes)
    assert len(store.verify()) == 2


WRITER = """
import sys, torch
from lightning_influence.artifacts import ArtifactStore, Manifest
root, mark = sys.argv[1], int(sys.argv[2])
manifest = Manifest(10, "f", {}, (), "in_flight", 4, "float32")
store = ArtifactStore.create(root, manifest) if mark < 0 else ArtifactStore.resume(root, manifest, mark)
mark = max(mark, 0)
print("ready", flush=True)
while True:
    mark += 1
    ids, values = torch.arange(4) + mark % 5, {"dense|w|values": torch.full((4, 300), float(mark))}
    store.commit(store.write_in_flight((mark, mark), mark, 1, ids, values))
    print(mark, flush=True)
"""


def test_real_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    """SIGKILL at two moments of one fit that is resumed each time at what it had reported as committed."""
    root, mark = tmp_path / "s", -1
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(root), str(mark)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.0173 * kill)
        process.send_signal(signal.SIGKILL)
        reported = process.stdout.read().split("\n")[:-1]
        process.wait()
        process.stdout.close()
        store = ArtifactStore.open(root)
        marks = sorted(artifact.mark for artifact in store.artifacts())
        mark = int(reported[-1]) if reported else max(mark, 0)
        assert marks == list(range(1, len(marks) + 1)) and len(marks) in (mark, mark + 1)
        for shard in store.shards(StepRange(0, mark)) if marks else ():
            assert shard.tensors["dense|w|values"].unique().numel() == 1
    assert mark > 3
    assert ArtifactStore.resume(root, store.manifest, mark).verify() == []
