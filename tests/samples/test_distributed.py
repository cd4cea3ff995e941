"""Two processes by each launcher: the ids of every rank are the truth in its batches, and training is unchanged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *launches: str) -> None:
    """Run the launches; once more if they hang: these loaders fork beside the threads of gloo, as users' loaders do,
    and on a busy machine such a fork can catch a lock that nobody will ever open (torch warns of it)."""
    for last in (False, True):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/samples/launches.py"), str(folder), *launches],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            said = process.communicate(timeout=120)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks and their workers too
            process.communicate()
            if last:
                raise
            continue
        assert process.returncode == 0, said[-4000:]
        return


def outcomes(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launches")


def check(tracked: list[dict[str, Any]], plain: list[dict[str, Any]], loaders: int) -> None:
    for ours, theirs in zip(tracked, plain, strict=True):
        assert ours["known"] == ours["truth"] == theirs["truth"]
        assert ours["weights"] == theirs["weights"]
        assert {len(step) for step in ours["known"]} == {loaders}
    assert tracked[0]["weights"] == tracked[1]["weights"]


def test_ddp(folder: Path) -> None:
    launch(folder, *(f"ddp:{what}:{how}" for what in ("distributed", "own") for how in ("tracked", "plain")))
    check(outcomes(folder, "ddp-distributed-tracked"), outcomes(folder, "ddp-distributed-plain"), loaders=6)
    check(outcomes(folder, "ddp-own-tracked"), outcomes(folder, "ddp-own-plain"), loaders=2)
    ranks = [
        [i for step in outcome["known"][:3] for i in step[0]] for outcome in outcomes(folder, "ddp-distributed-tracked")
    ]
    assert len(ranks[0] + ranks[1]) == 20 and len(set(ranks[0] + ranks[1])) == 19, "padded to even halves"


def test_ddp_fork_and_ddp_spawn(folder: Path) -> None:
    launches = ("ddp_fork:distributed:tracked", "ddp_fork:distributed:plain", "ddp_spawn:distributed:tracked")
    launch(folder, *launches)
    plain = outcomes(folder, "ddp_fork-distributed-plain")
    check(outcomes(folder, "ddp_fork-distributed-tracked"), plain, loaders=6)
    check(outcomes(folder, "ddp_spawn-distributed-tracked"), plain, loaders=6)
