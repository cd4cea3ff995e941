"""Stores that are not there, not ours, damaged or hostile: each a StoreError that says what to do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_influence.artifacts import ArtifactStore, disk
from lightning_influence.artifacts.journal import Journal
from lightning_influence.artifacts.json_values import digest
from lightning_influence.artifacts.ledger import read_record
from lightning_influence.errors import StoreError

SHARD = "checkpoints/step=00000010/gradients-00001.safetensors"


def refusal(call: Callable[[], object], match: str) -> StoreError:
    with pytest.raises(StoreError, match=match) as error:
        call()
    text = str(error.value)
    assert "expected:" in text and "found:" in text and "HINT:" in text
    return error.value


def rewrite_manifest(root: Path, **changes: object) -> None:
    record = {**json.loads((root / "manifest.json").read_text()), **changes}
    (root / "manifest.json").write_text(json.dumps({**record, "check": digest(record)}))


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs://b/x", "hdfs://n/x", "file:///tmp/x", "https://a/b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_remote_addresses(address: str, kind: Callable[[str], Any], make_manifest: Any) -> None:
    scheme = re.escape(f"the scheme '{address.split(':')[0]}'")
    refusal(lambda: ArtifactStore.open(kind(address)), scheme)
    refusal(lambda: ArtifactStore.create(kind(address), make_manifest()), scheme)


def test_no_store_there(tmp_path: Path, make_manifest: Any) -> None:
    refusal(lambda: ArtifactStore.open(tmp_path / "nothing"), "no artifact store at")
    refusal(lambda: ArtifactStore.open(tmp_path), "is not an artifact store")
    (tmp_path / "file").write_text("x")
    refusal(lambda: ArtifactStore.open(tmp_path / "file"), "is not a folder")
    refusal(lambda: ArtifactStore.create(tmp_path / "file", make_manifest()), "is not a folder")
    refusal(lambda: ArtifactStore.create(tmp_path / "file/below", make_manifest()), "cannot be written")
    refusal(lambda: ArtifactStore.create(tmp_path / "new", make_manifest(), rank=1), "is not an artifact store")


def test_a_folder_that_is_not_empty(tmp_path: Path, replayed: ArtifactStore, make_manifest: Any) -> None:
    error = refusal(lambda: ArtifactStore.create(replayed.root, make_manifest()), "is not empty")
    assert "ckpt_path" in error.hint and "checkpoints" in str(error.found)
    refusal(lambda: ArtifactStore.create(replayed.root, replayed.manifest, rank=0), "is not empty")
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text("mine")
    assert "and 5 more" in str(refusal(lambda: ArtifactStore.create(tmp_path, make_manifest()), "not empty").found)
    assert replayed.verify() == []


def test_a_rank_cannot_join_twice(tmp_path: Path, make_manifest: Any) -> None:
    for rank in (0, 1):
        ArtifactStore.create(tmp_path / "s", make_manifest(), rank)
    refusal(lambda: ArtifactStore.create(tmp_path / "s", make_manifest(), 1), "rank 1 already has records")


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_schema_version(replayed: ArtifactStore, version: int) -> None:
    rewrite_manifest(replayed.root, schema_version=version, library_version="7.0")
    error = refusal(lambda: ArtifactStore.open(replayed.root), "another schema version")
    assert error.expected == 1 and error.found == f"{version}, written by version 7.0 of the library"


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"{}", b'{"schema_version": true}'],
    ids=["empty", "torn", "list", "null", "bytes", "deep list", "deep", "no fields", "boolean version"],
)
def test_a_damaged_manifest(replayed: ArtifactStore, text: bytes) -> None:
    (replayed.root / "manifest.json").write_bytes(text)
    refusal(lambda: ArtifactStore.open(replayed.root), "manifest.json is damaged")


@pytest.mark.parametrize(
    "change",
    [
        {"dataset": 3},
        {"dataset": {"length": -1, "fingerprint": "x"}},
        {"selected": "x"},
        {"parameters": {"a": {"shape": [-1], "dtype": "float32"}}},
        {"hyper_parameters": 3},
        {"facts": None},
    ],
    ids=str,
)
def test_a_manifest_with_wrong_fields(replayed: ArtifactStore, change: dict[str, object]) -> None:
    rewrite_manifest(replayed.root, **change)
    refusal(lambda: ArtifactStore.open(replayed.root), "manifest.json is damaged")


def test_a_changed_digit_in_the_manifest(replayed: ArtifactStore) -> None:
    text = (replayed.root / "manifest.json").read_text()
    (replayed.root / "manifest.json").write_text(text.replace('"length": 10', '"length": 11'))
    refusal(lambda: ArtifactStore.open(replayed.root), "check digits")


def test_every_flipped_bit_of_a_journal_is_found_or_tears_its_end(in_flight: ArtifactStore) -> None:
    path = in_flight.root / "manifest-rank00000.jsonl"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refusal(lambda: ArtifactStore.open(in_flight.root), "is damaged")
    path.write_bytes(whole[:-1] + b"\x0b")  # the last line feed: a torn line
    assert len(ArtifactStore.open(in_flight.root).artifacts()) == 2


@pytest.mark.parametrize(
    "record",
    [
        {"record": "artifact"},
        {"record": "surprise"},
        {"record": 3},
        {},
        {"record": "checkpoint", "step": 1, "epoch": 0, "mark": 1, "groups": [3]},
        {"record": "checkpoint", "step": 1.5, "epoch": 0, "mark": 1, "groups": []},
        {"record": "checkpoint", "step": 20, "epoch": 0, "mark": 1, "groups": []},
    ],
    ids=str,
)
def test_records_without_meaning(replayed: ArtifactStore, record: dict[str, Any]) -> None:
    Journal(replayed.root, 0).append([record])
    refusal(lambda: ArtifactStore.open(replayed.root), r"line 14 of .*manifest-rank00000.jsonl is damaged")


def test_only_rank_zero_names_checkpoints_and_nothing_is_named_twice(replayed: ArtifactStore, kit: Any) -> None:
    other = Journal(replayed.root, 1)
    other.append([{"record": "checkpoint", **kit.checkpoint_at(30).to_json()}])
    refusal(lambda: ArtifactStore.open(replayed.root), "journal of rank 1")
    other.replace([{"record": "artifact", **replayed_artifact(replayed).to_json()}])
    refusal(lambda: ArtifactStore.open(replayed.root), "committed twice")


def replayed_artifact(store: ArtifactStore) -> Any:
    return read_record(Journal(store.root, 0).read()[0], 0)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/passwd", "a/../../x", "", ".", "a\\..\\b", "a\0b"])
def test_a_journal_that_points_outside(replayed: ArtifactStore, path: str) -> None:
    record = {**replayed_artifact(replayed).to_json(), "path": path}
    Journal(replayed.root, 1).append([{"record": "artifact", **record}])
    refusal(lambda: ArtifactStore.open(replayed.root), "names a file outside its folder")
    refusal(lambda: replayed.write("x", path, {}, step=0, mark=0), "names a file outside its folder")


@pytest.mark.parametrize("kind", ["file", "folder", "journal", "manifest", "loop"])
def test_symbolic_links_that_lead_outside(tmp_path: Path, replayed: ArtifactStore, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    names = {"file": SHARD, "folder": "frozen", "journal": "manifest-rank00000.jsonl", "manifest": "manifest.json"}
    path = replayed.root / names.get(kind, SHARD)
    target = outside / path.name
    path.rename(target)
    path.symlink_to(path if kind == "loop" else target)

    def use() -> None:
        store = ArtifactStore.open(replayed.root)
        for checkpoint in store.checkpoints():
            store.shards(checkpoint), store.weights(checkpoint)

    refusal(use, "outside its folder")
    with pytest.raises(StoreError):
        ArtifactStore.resume(replayed.root, replayed.manifest, 0)
    assert target.exists()


def test_a_linked_store_is_fine(tmp_path: Path, replayed: ArtifactStore) -> None:
    (tmp_path / "link").symlink_to(replayed.root)
    assert ArtifactStore.open(tmp_path / "link").verify() == []


def test_a_frozen_reference_to_a_file_that_is_not_listed(replayed: ArtifactStore, kit: Any) -> None:
    artifact = replayed.artifacts("weights")[0]
    meta: dict[str, Any] = json.loads(json.dumps(artifact.meta))
    meta["frozen"]["base.bias"] = ["../../etc/passwd", "x"]
    lines = Journal(replayed.root, 0).read()
    for line in lines:
        if line.get("path") == artifact.path:
            line["meta"] = meta
    Journal(replayed.root, 0).replace(lines)
    store = ArtifactStore.open(replayed.root)
    refusal(lambda: store.weights(kit.checkpoint_at(10)), "has no ../../etc/passwd")
    assert any("which is not in the store" in problem for problem in store.verify())


@pytest.mark.parametrize("meta", [{"frozen": {"a": ["x"]}}, {"aliases": {"a": "nowhere"}}, {"frozen": 3}, {}], ids=str)
def test_weights_whose_record_makes_no_sense(replayed: ArtifactStore, kit: Any, meta: dict[str, Any]) -> None:
    lines = Journal(replayed.root, 0).read()
    for line in lines:
        if line.get("kind") == "weights":
            line["meta"] = {**line["meta"], **meta} if meta else {}
    Journal(replayed.root, 0).replace(lines)
    refusal(lambda: ArtifactStore.open(replayed.root).weights(kit.checkpoint_at(10)), "are not whole")


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploded",)


def damage_truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def damage_pickle(path: Path) -> None:
    content = pickle.dumps(Bomb())
    path.write_bytes(content + bytes(max(0, path.stat().st_size - len(content))))


def damage_header(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def damage_remove(path: Path) -> None:
    path.unlink()


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [damage_truncate, damage_bit, damage_pickle, damage_header, damage_remove, damage_folder]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard(
    replayed: ArtifactStore, kit: Any, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is named, its neighbours and the other checkpoint are still read, verify lists it, nothing is run."""
    monkeypatch.chdir(tmp_path)
    damage(replayed.root / SHARD)
    store = ArtifactStore.open(replayed.root)

    def read() -> None:
        for shard in store.shards(kit.checkpoint_at(10)):
            _ = shard.sample_ids

    refusal(read, r"gradients-00001\.safetensors")
    assert len(store.shards(kit.checkpoint_at(20))) == 3
    assert len(store.weights(kit.checkpoint_at(10))) == len(store.weights(kit.checkpoint_at(20)))
    problems = store.verify()
    assert len(problems) == 1 and SHARD in problems[0]
    assert not (tmp_path / "exploded").exists()


def test_a_shard_of_other_samples(replayed: ArtifactStore, kit: Any) -> None:
    """Right size and checksum, wrong content: what a program that is not ours could have written."""
    path = "checkpoints/step=00000030/gradients-00000.safetensors"
    for ids in (torch.arange(4, 8), torch.arange(3), torch.ones(4), torch.zeros(2, 2, dtype=torch.int64)):
        store = ArtifactStore.resume(replayed.root, replayed.manifest, None)
        store.commit(store.write("gradients", path, {"sample_ids": ids}, step=30, mark=30, meta={"span": [0, 4]}))
        for span in kit.spans()[1:]:
            store.commit(store.write_gradients(30, 30, span, kit.gradients_of(span)))
        store.commit_checkpoint(kit.checkpoint_at(30), store.write_weights(30, 30, {"a": torch.ones(1)}))
        with pytest.raises(StoreError, match=r"samples that its manifest entry promises|outside its span"):
            for shard in store.shards(kit.checkpoint_at(30)):
                _ = shard.sample_ids
        assert len(store.verify()) == 1
        ArtifactStore.resume(replayed.root, replayed.manifest, 20)


def test_verify_lists_every_problem(replayed: ArtifactStore, kit: Any) -> None:
    root = replayed.root
    damage_bit(root / SHARD)
    damage_remove(root / "checkpoints/step=00000020/optimizer.safetensors")
    damage_truncate(root / "checkpoints/step=00000020/weights.safetensors")
    (root / "notes.txt").write_text("mine")
    (root / "frozen/link").symlink_to("/etc")
    (root / "checkpoints/x.safetensors.rank00003.tmp").write_bytes(b"")
    replayed.commit(replayed.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4))))
    replayed.write_gradients(30, 30, (4, 8), kit.gradients_of((4, 8)))
    Journal(root, 0).append([{"record": "surprise"}])
    with open(root / "manifest-rank00000.jsonl", "ab") as journal:
        journal.write(b'{"record"')
    problems = replayed.verify()
    expected = [
        "line 15",
        "unfinished line",
        "gradients-00001.safetensors is damaged",
        "optimizer.safetensors cannot be read",
        "weights.safetensors has the wrong size",
        "step 30 was never completed",
        "rank00003.tmp is left",
        "step=00000030/gradients-00001.safetensors is in the folder but in no journal",
        "frozen/link is in the folder",
        "notes.txt is in the folder",
    ]
    for part in expected:
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    assert len(problems) == len(expected)


def test_verify_trusts_no_earlier_check(replayed: ArtifactStore, kit: Any) -> None:
    path = replayed.root / SHARD
    assert replayed.verify() == []
    status = path.stat()
    damage_bit(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # damage that leaves no trace in the file's times
    assert len(replayed.verify()) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_while_committing(
    replayed: ArtifactStore, kit: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A journal line that was half written is taken back: the next commit is whole again."""
    written = replayed.write_gradients(30, 30, (0, 4), kit.gradients_of((0, 4)))
    before = (replayed.root / "manifest-rank00000.jsonl").read_bytes()

    def half(file: Any, data: memoryview) -> None:
        file.write(data[: len(data) // 2])
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr("lightning_influence.artifacts.journal.write_all", half)
        refusal(lambda: replayed.commit(written), "no space left" if code == errno.ENOSPC else "cannot be written")
    assert (replayed.root / "manifest-rank00000.jsonl").read_bytes() == before
    assert len(replayed.artifacts("gradients")) == 6
    replayed.commit(written)
    assert len(ArtifactStore.open(replayed.root).artifacts("gradients")) == 7


def test_a_full_disk_while_facts_are_recorded(replayed: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        refusal(lambda: replayed.record("a", 1), "no space left")
    assert ArtifactStore.open(replayed.root).manifest.facts == {} == replayed.manifest.facts
    replayed.record("a", 2)
    assert ArtifactStore.open(replayed.root).manifest.facts == {"a": 2}
