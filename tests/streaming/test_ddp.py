"""Two processes share the training set, and give the answers of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_influence import QueryError
from lightning_influence.queries.batches import refuse_idle_ranks
from tests.stores import Texts, loader_of

ROOT = Path(__file__).parents[2]


def test_two_processes(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests/streaming/launch.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and ranks[0]["not scored"] == 8
    assert "refused on one rank, in the training samples" in ranks[0]["one rank"]


def test_fewer_samples_than_processes() -> None:
    source = SimpleNamespace(dataloader=lambda: loader_of(Texts(1)), is_defined=lambda: True)
    trainer: Any = SimpleNamespace(
        world_size=2,
        _accelerator_connector=SimpleNamespace(use_distributed_sampler=True),
        predict_loop=SimpleNamespace(_data_source=source),
    )
    with pytest.raises(QueryError, match="fewer training samples than processes"):
        refuse_idle_ranks(trainer, "training samples")
