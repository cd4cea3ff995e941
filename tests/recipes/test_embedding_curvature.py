"""Scores by part of the model are shares of the whole, with and without curvature; the table has a cell for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_influence import CurvatureSnapshot, GradientSnapshot
from recipes.benchmarks.embedding_curvature import rows, scores_of
from recipes.benchmarks.scoreboard import CONFIGS
from recipes.case_deletion import set_up_of
from recipes.deletions.fitting import fitted

pytestmark = pytest.mark.filterwarnings("ignore:The model was far from a stationary point")  # it stops early here
TINY = [
    "data.source._target_=tests.recipes.few_texts.FewTexts", "data.min_count=1", "recipe.epochs=2", "points=3",
    "model.embedding_dim=4", "model.channels=[4]",
]  # fmt: skip


def test_the_parts_make_up_the_whole_and_have_a_cell_each(tmp_path: Path) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("case_deletion", TINY)
    gradients = GradientSnapshot(tmp_path / "final", "all", every_n_epochs=2)
    found = scores_of(
        fitted(set_up_of(config), 0, tmp_path, [gradients, CurvatureSnapshot(tmp_path / "final", "ekfac")])
    )
    kinds = list(dict.fromkeys(kind for _, kind in found))
    for kind in kinds:
        parts = found["without the embedding", kind] + found["the embedding", kind]
        torch.testing.assert_close(found["all layers", kind], parts, rtol=1e-3, atol=1e-4)
    assert len(kinds) == 4 and not torch.allclose(found["the embedding", kinds[0]], found["the embedding", kinds[1]])
    told = rows(config, 5, tmp_path / "truths")
    assert [row["gradients of"] for row in told] == ["all layers", "without the embedding", "the embedding"]
    assert all("[" in str(row[kind]) for row in told for kind in kinds)
