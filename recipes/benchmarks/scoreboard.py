"""One table: our methods, the baselines and the peers on the same trained classifier, judged by the same retrainings.

    /tmp/peers/bin/python recipes/benchmarks/scoreboard.py --cache /tmp/truths \\
        --out recipes/results/scoreboard_ag_news.md setting=case_deletion_ag_news data_root=/path/to/data

It needs the environment of the peers (README.md here says how); what follows the options are overrides of
`configs/case_deletion.yaml`, whose classifier, training and questions these are. The measures:

- LDS: rank correlation, over random halves of the training set, of the halves' summed scores with the loss of the
  predicted class that the models trained on them have, the mean over three seeds; over all questions.
- AUC-DEL+: change of the predicted class's probability without the first k proponents, k as in the configuration, of
  the first questions alone.
- AUC of wrong labels: the same training with a tenth of the labels flipped; how well self-influence tells them.
- CPU seconds and bytes of the answer to all questions, beside the plain training, the callbacks' hooks included.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence.metrics import (
    QueryMean,
    case_deletion,
    linear_datamodeling_score,
    mislabel_detection,
    noise_ceiling,
)
from recipes import tables
from recipes.benchmarks.contestants import Answer, Contestant, contestants
from recipes.benchmarks.measuring import Row, report
from recipes.case_deletion import set_up_of
from recipes.deletions.deleting import Truths, delete_texts
from recipes.deletions.fitting import Explained, SetUp, explained
from recipes.deletions.texts import Texts
from recipes.hunting import out_of_fold
from recipes.truths.retraining import random_subsets, retrain

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEED, RETRAINED_SEEDS = 0, (100, 101, 102)
FLIPPED = 0.1
Answers = Mapping[str, Answer]


def flipped(config: Any, set_up: SetUp) -> SetUp:
    """The same training with some labels flipped."""
    texts = Texts.of(instantiate(config.data, flip_fraction=FLIPPED, seed=SEED))
    return dataclasses.replace(set_up, texts=texts)


def ask(which: Sequence[Contestant], set_up: SetUp, hunted: SetUp) -> tuple[Answers, Answers]:
    """Scores of all contestants, and the self-influence of those that have one."""
    scores: dict[str, Answer] = {}
    suspicion: dict[str, Answer] = {}
    for contestant in which:
        with tempfile.TemporaryDirectory() as folder:
            scores[contestant.name] = found = contestant.scores(set_up, SEED, Path(folder))
        print(f"{contestant.name}: {found.seconds:.1f} s, {found.size / 1e6:.1f} MB", flush=True)
        if not found.values.isfinite().all():
            print(f"{contestant.name}: {int((~found.values.isfinite()).sum())} scores are not finite", flush=True)
        if contestant.self_influence is not None:
            with tempfile.TemporaryDirectory() as folder:
                suspicion[contestant.name] = found = contestant.self_influence(hunted, SEED, Path(folder))
            print(f"{contestant.name}, self-influence: {found.seconds:.1f} s", flush=True)
    return scores, suspicion


def lds_of(fit: Explained, answers: Answers, subsets: int, cache: Path) -> tuple[dict[str, QueryMean], QueryMean]:
    """LDS of every method, and how far the retrained models agree among themselves."""
    train, recipe = fit.set_up.texts.train, fit.set_up.recipe
    halves = random_subsets(len(train), subsets, 0.5, SEED)
    losses = retrain(
        fit.set_up.again, recipe, train, fit.queries, halves, seeds=RETRAINED_SEEDS, cache=cache, at_once=1
    ).losses
    found = {name: linear_datamodeling_score(a.values.double(), halves, losses) for name, a in answers.items()}
    return found, noise_ceiling(losses)


def deletion_of(
    fit: Explained, answers: Answers, points: int, sizes: Sequence[int], cache: Path
) -> dict[str, QueryMean]:
    """AUC-DEL+ of every method at the first questions."""
    orders = {name: a.values[:points].argsort(dim=1, descending=True, stable=True) for name, a in answers.items()}
    found = {}
    for name, deleted in delete_texts(fit, orders, sizes, Truths(cache)).items():
        parts = (part.unsqueeze(0) for part in (deleted.before, deleted.proponents, deleted.opponents))
        found[name] = case_deletion(sizes, *parts).auc_proponents
    return found


def auc_of(suspicion: Tensor, wrong: Tensor) -> str:
    """ROC-AUC of a score of suspicion."""
    return f"{mislabel_detection(suspicion.double(), wrong).auroc:.3f}"


def rows(config: Any, options: argparse.Namespace) -> list[Row]:
    """The table."""
    set_up = set_up_of(config)
    hunted = flipped(config, set_up)
    wrong = torch.tensor(hunted.texts.data.flipped)
    scores, suspicion = ask(contestants(), set_up, hunted)
    judged = {name: answer for name, answer in scores.items() if answer.values.isfinite().all()}
    with tempfile.TemporaryDirectory() as folder:
        fit = explained(set_up, SEED, Path(folder))
        lds, ceiling = lds_of(fit, judged, options.subsets, options.cache)
        deleted = deletion_of(fit, judged, config.few_points, list(config.sizes), options.cache)
    found: list[Row] = [{"method": "noise ceiling: half of the seeds against the others", "LDS": str(ceiling)}]
    for name, answer in scores.items():
        own = suspicion.get(name)
        found.append({
            "method": name,
            "LDS": str(lds.get(name, "scores not finite")),
            "AUC-DEL+": str(deleted.get(name, "")),
            "AUC of wrong labels": auc_of(own.values, wrong) if own and own.values.isfinite().all() else "",
            "CPU s": f"{answer.seconds:.1f}",
            "MB": f"{answer.size / 1e6:.2f}",
        })  # fmt: skip
    texts = [text if isinstance(text, str) else " / ".join(text) for text in hunted.texts.data.train_texts]
    doubt = out_of_fold.of_texts(texts, hunted.texts.train.labels, SEED)
    found.append({"method": "out-of-fold logistic regression on tf-idf", "AUC of wrong labels": auc_of(doubt, wrong)})
    return found


def main() -> None:
    """Ask everybody, train again, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the truths")
    parser.add_argument("--subsets", type=int, default=100, help="random halves to train on")
    parser.add_argument("--out", type=Path, default=None, help="write the table as .json or .md")
    parser.add_argument("overrides", nargs="*", help="of configs/case_deletion.yaml")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("case_deletion", options.overrides)
    config = tables.chosen(config)
    OmegaConf.set_struct(config, False)
    report(
        f"Scoreboard, {config.title}", rows(config, options), options.out,
        texts=config.points, deletions=config.few_points, subsets=options.subsets,
    )  # fmt: skip


if __name__ == "__main__":
    main()
