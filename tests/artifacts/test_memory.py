"""Reading a store in less memory than it takes on disk, and leaving nothing open behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_influence.artifacts import ArtifactStore

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

READER = """
import resource, sys, torch
torch.set_num_threads(1)
from lightning_influence.artifacts import ArtifactStore
store = ArtifactStore.open(sys.argv[1])
torch.ones(1000).sum()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
limit = used + (32 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
total = 0.0
for checkpoint in store.checkpoints():
    for shard in store.shards(checkpoint):
        total += float(shard.tensors["dense|w|values"].sum()) + int(shard.sample_ids.sum())
print(total)
try:
    kept = [shard.tensors["dense|w|values"] for shard in store.shards(checkpoint)]
except Exception as error:
    print("all at once:", type(error).__name__)
"""


def test_a_store_five_times_the_memory_that_is_allowed(tmp_path: Path, make_manifest: Any, kit: Any) -> None:
    """24 shards of 8 MiB under an address space limit of 32 MiB more than the empty process needs."""
    length, size, width = 24 * 64, 64, 1 << 15
    store = ArtifactStore.create(tmp_path / "s", make_manifest(dataset_length=length, shard_size=size))
    for span in kit.spans(length, size):
        store.commit(store.write_gradients(1, 1, span, {"dense|w|values": torch.ones(size, width)}))
    store.commit_checkpoint(kit.checkpoint_at(1), store.write_weights(1, 1, {}))
    assert sum(artifact.bytes for artifact in store.artifacts()) > 5 * (32 << 20)
    command = [sys.executable, "-c", textwrap.dedent(READER), str(store.root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    total, all_at_once = found.stdout.splitlines()
    assert float(total) == length * width + sum(range(length))
    assert all_at_once.startswith("all at once:")  # the limit is real


def test_nothing_stays_open(replayed: ArtifactStore) -> None:
    shards = [shard for checkpoint in replayed.checkpoints() for shard in replayed.shards(checkpoint)]
    tensors = [shard.tensors["dense|embedding.weight|values"] for shard in shards]
    descriptors = [path.resolve().name for path in Path("/proc/self/fd").iterdir()]
    assert not [name for name in descriptors if name.endswith((".safetensors", ".jsonl"))]
    del tensors
    assert str(replayed.root) not in Path("/proc/self/maps").read_text()
