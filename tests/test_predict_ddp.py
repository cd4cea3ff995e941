"""Two processes answer as one does, whatever the number of queries, and every rank knows the whole answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_influence import InfluenceModule, TracIn
from tests.predict_launch import COUNTS, told
from tests.stores import Texts, all_names, batch_of, classifier, group, replay_store, trajectory

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, module = tmp_path_factory.mktemp("ranks"), classifier()
    states = trajectory(module, 2)
    replay_store(folder / "store", module, Texts(), states, lambda c: [group(all_names(module), 0.1 + c)])
    return folder


def launch(folder: Path, strategy: str) -> list[dict[str, Any]]:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/predict_launch.py"), str(folder), strategy],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{strategy}-rank*.json"))]


def check(found: dict[str, Any], folder: Path, counts: tuple[int, ...]) -> None:
    """Against one process that is asked about the whole batch."""
    expected: dict[str, Any] = {"queries": list(range(sum(counts))), "proponents": [], "scores": [], "opponents": []}
    for count in counts:
        alone = InfluenceModule(classifier(), folder / "store", TracIn(), k=4)
        part = told(alone.query(batch_of(Texts(count, seed=1))))
        for side in ("proponents", "scores", "opponents"):
            expected[side] += part[side]
    assert {k: v for k, v in found.items() if k != "scores"} == {k: v for k, v in expected.items() if k != "scores"}
    torch.testing.assert_close(torch.tensor(found["scores"]), torch.tensor(expected["scores"]), rtol=1e-6, atol=1e-9)


def test_ddp(folder: Path) -> None:
    ranks = launch(folder, "ddp")
    assert len(ranks) == 2 and ranks[0] == ranks[1]
    for count in COUNTS:
        check(ranks[0][str(count)], folder, (count,))
    check(ranks[0]["replicated"], folder, (5,))
    check(ranks[0]["two loaders"], folder, (5, 3))
    assert "refused on one rank" in ranks[0]["one rank"] and "refused on one rank" in ranks[1]["one rank"]
    assert "fewer queries than processes" in ranks[0]["one query"]
    assert "no word: [2, 3]" in ranks[0]["some"], "answers are refused with their places in the dataset"
    for answers in ("others", "saved"):
        check(ranks[0][answers], folder, (5,))


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_processes_that_keep_what_they_know_save_it(folder: Path, strategy: str) -> None:
    (found,) = launch(folder, strategy)
    check(found["11"], folder, (11,))
    assert strategy != "ddp_fork" or "save_to='answers.safetensors'" in found["unsaved"]
