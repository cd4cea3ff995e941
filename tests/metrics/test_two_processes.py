"""Two processes compute together what one computes alone, even if one of them has seen nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.metrics.launch import results

ROOT = Path(__file__).parents[2]


def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.metrics.launch", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    alone = results(0, 1, True)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for how in ("shared", "all on one"):
            for name, expected in alone.items():
                assert found[how][name] == pytest.approx(expected, rel=1e-9, nan_ok=True), (how, name)
