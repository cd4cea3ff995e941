"""The recipes of model edits run from end to end on the embedded digits, and say what they did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lightning_influence.targets import RULES
from recipes import class_removal, label_change, parameter_selection
from recipes.images import tables
from recipes.images.tables import Row

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ("seeds=[3]", "ratios=[0.3]", "solving.iterations=2", "solving.steps=1", "training.epochs=3")
pytestmark = pytest.mark.filterwarnings("ignore:.*(stopped before its tolerance|did not converge)")


def run(program: Any, name: str, folder: Path, *overrides: str) -> tuple[float, str]:
    """What a recipe returns and writes."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose(name, [*SMALL, f"results={folder}/{name}", f"training.cache={folder}", *overrides])
    value = program.main.__wrapped__(config)
    return value, (folder / f"{name}.md").read_text()


def test_class_removal(tmp_path: Path) -> None:
    value, text = run(class_removal, "class_removal", tmp_path)
    assert 0 <= value <= 1
    methods = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert methods == ["original", "retrained", "GIF", "FIF", "PIF", "IF", "SIF"]
    assert "| retrained |  |" in text and "0.00" in text
    assert (tmp_path / "class_removal.png").stat().st_size > 10_000
    assert "`python recipes/class_removal.py`" in text


def test_label_change(tmp_path: Path) -> None:
    value, text = run(label_change, "label_change", tmp_path)
    assert 0 <= value <= 1
    assert "backdoored" in text and "| SIF | 100% |" in text


def test_parameter_selection(tmp_path: Path) -> None:
    value, text = run(parameter_selection, "parameter_selection", tmp_path)
    assert 0 <= value <= 1
    for rule in RULES:
        assert f"| {rule.replace('_', ' ')} | 30% |" in text
    assert "| everything | 100% |" in text


def test_quick_values_override_the_others() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("class_removal", ["quick=true"])
    merged: Any = OmegaConf.merge(config, config.when_quick)
    assert merged.seeds == [0] and config.seeds != [0] and merged.removed == config.removed


def test_a_table_has_mean_and_spread() -> None:
    rows = [
        Row("GIF", 0.1, seed, {"kept": kept, "distance": 0.5}, step=2.0, seconds=3.0, left=0.25)
        for seed, kept in enumerate((0.5, 0.7))
    ]
    body = tables.table([*rows, Row("retrained", None, 0, {"kept": 1.0, "distance": 0.0})], ("kept",))
    assert "| GIF | 10% | 60.00 ± 14.14 | 0.5000 ± 0.0000 | 0.250 | 2.00 | 3 |" in body
    assert "| retrained |  | 100.00 | 0.0000 |  |  |  |" in body
