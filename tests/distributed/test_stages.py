"""StageLinker on two processes: training unchanged on both, and one link that counts each step once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_influence import ArtifactStore
from tests.distributed.test_snapshot import launch

WHAT = ("link", "alone", "beside")
STEPS, RATE, FALL, MOMENTUM = 12, 0.3, 0.9, 0.9  # 45 samples in batches of 4 on two processes, for two epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pair of processes fits three times."""
    folder = tmp_path_factory.mktemp("ddp")
    launch(folder, *(f"stages:{what}" for what in WHAT))
    return folder


def outcome(folder: Path, what: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{what}-rank{rank}.json").read_text())
    return found


@pytest.mark.parametrize("what", WHAT[1:])
def test_training_is_bit_identical_on_both_ranks(folder: Path, what: str) -> None:
    for rank in range(2):
        plain, watched = outcome(folder, "link", rank), outcome(folder, what, rank)
        assert plain["end"] == watched["end"] and plain["steps"] == watched["steps"]


@pytest.mark.parametrize("what", WHAT[1:])
def test_one_link_counts_every_step_once(folder: Path, what: str) -> None:
    store = ArtifactStore.open(folder / what)
    link = store.link
    assert link is not None and link.complete and dict(link.shared) == {"embedding.weight": "embedding.weight"}
    travelled = sum(RATE * FALL**step for step in range(STEPS)) / (1 - MOMENTUM)
    assert link.travel == pytest.approx(dict.fromkeys(("embedding.weight", "head.weight", "head.bias"), travelled))
    assert store.verify() == [] and len(store.checkpoints()) == 1
    assert link.parent == ArtifactStore.open(folder / "pretraining").identity
