"""Does the curvature of a word embedding help or harm? LDS of influence functions by part of the model and damping.

    python recipes/benchmarks/embedding_curvature.py --cache /tmp/truths --out recipes/results/embedding_curvature.md \\
        --setting case_deletion_ag_news --setting case_deletion_sst2 data_root=/path/to/data

The classifier, the questions and the retrained models are those of `scoreboard.py`, whose cache of truths it takes. The
gradients are those at the end of training. A damping is a multiple of each block's mean eigenvalue; without curvature
the scores are plain inner products.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence import CurvatureSnapshot, GradientSnapshot, InfluenceFunction, Relative, TracIn
from recipes.benchmarks.measuring import Row, report
from recipes.benchmarks.scoreboard import CONFIGS, SEED, lds_of
from recipes.case_deletion import set_up_of
from recipes.deletions.fitting import Explained, fitted

PARTS = {"all layers": ["*"], "without the embedding": ["convolutions.*", "head.*"], "the embedding": ["embedding.*"]}
DAMPINGS = (0.1, 3.0, 100.0)


def scores_of(fit: Explained) -> dict[tuple[str, str], Tensor]:
    """Scores (Q, N) of all questions by part and damping."""
    found, count = {}, len(fit.set_up.positions)
    for part, parameters in PARTS.items():
        for damping in DAMPINGS:
            estimator = InfluenceFunction(parameters=parameters, damping=Relative(damping))
            found[part, f"EK-FAC, damping {damping:g}"] = fit.scores("final", estimator, count)
        found[part, "no curvature"] = fit.scores("final", TracIn(parameters=parameters), count)
    return found


def rows(config: Any, subsets: int, cache: Path) -> list[Row]:
    """A line for each part, a column for each damping."""
    set_up = set_up_of(config)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "final"
        gradients = GradientSnapshot(store, "all", every_n_epochs=set_up.recipe.epochs)
        fit = fitted(set_up, SEED, Path(folder), [gradients, CurvatureSnapshot(store, "ekfac")])
        found, _ = lds_of(fit, scores_of(fit), subsets, cache)
    lines: dict[str, dict[str, str | float]] = {}
    for (part, damping), lds in found.items():
        lines.setdefault(part, {"set": config.title, "gradients of": part})[damping] = str(lds)
    return list(lines.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the truths, kept between runs")
    parser.add_argument("--subsets", type=int, default=100, help="random halves of the training set")
    parser.add_argument("--setting", action="append", required=True, help="of configs/setting; may be given again")
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    parser.add_argument("overrides", nargs="*", help="of configs/case_deletion.yaml")
    options = parser.parse_args()
    found: list[Row] = []
    for setting in options.setting:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("case_deletion", [f"setting={setting}", *options.overrides])
        found += rows(config, options.subsets, options.cache)
    report("LDS by part of the model and damping", found, options.out, **{"random halves": options.subsets})


if __name__ == "__main__":
    main()
