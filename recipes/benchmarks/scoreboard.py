"""One table: our methods, the baselines and the peers on the same trained classifier, judged by the same retrainings.

    /tmp/peers/bin/python recipes/benchmarks/scoreboard.py --cache /tmp/truths \\
        --out recipes/results/scoreboard_ag_news.md setting=case_deletion_ag_news data_root=/path/to/data

It needs the environment of the peers (README.md here says how); what follows the options are overrides of
`configs/case_deletion.yaml`, whose classifier, training and questions these are. The measures:

- LDS: rank correlation, over random halves of the training set, of the halves' summed scores with the loss of the
  predicted class that the models trained on them have, the mean over three seeds; over all questions.
- AUC-DEL+ and AUC-DEL−: change of the predicted class's probability without the first k proponents or opponents, k as
  in the configuration, of the first questions (`few_points`) alone.
- AUC of wrong labels: the same training with a tenth of the labels flipped; how well self-influence tells them, with
  its 95% interval over the texts.
- CPU seconds, measured once, of the scores of all questions, beside the plain training, the callbacks' hooks included;
  and what is kept on disk for them, beside the weights of checkpoints. Dattri keeps everything in memory.

Intervals of LDS and deletions are over questions, for one draw of random halves and of trained models, which all
questions share: another draw would move them together. “Chosen damping” may look at 400 held-out texts that nobody asks
about and train seventeen short runs, which its seconds hold; the others have the dampings that are their defaults.

A method that fails is a line of the table with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import traceback
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that `recipes` is found however this is started
from lightning_influence.metrics import (
    Deletion,
    NoiseCeiling,
    QueryMean,
    case_deletion,
    linear_datamodeling_score,
    mislabel_detection,
    noise_ceiling,
)
from recipes import tables
from recipes.benchmarks.contestants import Answer, Contestant, contestants
from recipes.benchmarks.measuring import Row, report
from recipes.case_deletion import check, set_up_of
from recipes.data.corpus import in_one_line
from recipes.deletions.deleting import Truths, delete_texts
from recipes.deletions.fitting import Explained, SetUp, fitted
from recipes.deletions.texts import Texts
from recipes.hunting import out_of_fold
from recipes.truths.retraining import random_subsets, retrain

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEED, RETRAINED_SEEDS = 0, (100, 101, 102)
FLIPPED = 0.1
PEERS = ("kronfluence", "captum", "traker", "dattri")
Scores = Mapping[str, Tensor]
Name = TypeVar("Name", bound=Hashable)


def flipped(config: Any, set_up: SetUp) -> SetUp:
    """The same training with some labels flipped."""
    texts = Texts.of(instantiate(config.data, flip_fraction=FLIPPED, seed=SEED))
    return dataclasses.replace(set_up, texts=texts)


@dataclass
class Answers:
    """What the contestants said, by their names.

    Args:
        scores: (Q, N) each.
        suspicion: self-influence (N,) of those that have one.
        failed: what was raised instead, or is wrong with the scores.
    """

    scores: dict[str, Answer] = field(default_factory=dict)
    suspicion: dict[str, Answer] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def finite(self) -> dict[str, Tensor]:
        """Scores that can be judged."""
        return {name: a.values.double() for name, a in self.scores.items() if a.values.isfinite().all()}


def ask(which: Sequence[Contestant], set_up: SetUp, hunted: SetUp) -> Answers:
    """Scores of all contestants, and the self-influence of those that have one."""
    found = Answers()
    for contestant in which:
        name = contestant.name
        kinds = [(contestant.scores, set_up, found.scores), (contestant.self_influence, hunted, found.suspicion)]
        for answer, asked, kept in kinds:
            if answer is None:
                continue
            with tempfile.TemporaryDirectory() as folder:
                try:
                    kept[name] = own = answer(asked, SEED, Path(folder))
                except Exception as error:  # another library's; the table says it
                    traceback.print_exc()
                    found.failed[name] = type(error).__name__
                    continue
            print(f"{name}: {tuple(own.values.shape)}, {own.seconds:.1f} s, {own.size / 1e6:.2f} MB", flush=True)
            if not own.values.isfinite().all():
                found.failed[name] = "not finite"
    return found


def lds_of(
    fit: Explained, scores: Mapping[Name, Tensor], subsets: int, cache: Path
) -> tuple[dict[Name, QueryMean], NoiseCeiling]:
    """LDS of every method, by whatever names it, and the most that the noise of the retrained models leaves to any."""
    train, recipe = fit.set_up.texts.train, fit.set_up.recipe
    halves = random_subsets(len(train), subsets, 0.5, SEED)
    losses = retrain(
        fit.set_up.again, recipe, train, fit.queries, halves, seeds=RETRAINED_SEEDS, cache=cache, at_once=1
    ).losses
    found = {name: linear_datamodeling_score(values, halves, losses) for name, values in scores.items()}
    return found, noise_ceiling(losses)


def deletion_of(fit: Explained, scores: Scores, points: int, sizes: Sequence[int], cache: Path) -> dict[str, Deletion]:
    """Deletions at the first questions, by every method whose scores there rank the training texts at all."""
    first = {name: values[:points] for name, values in scores.items()}
    ranking = {name: v.argsort(dim=1, descending=True, stable=True) for name, v in first.items() if _ranks(v)}
    found = delete_texts(fit, ranking, sizes, Truths(cache))
    return {name: case_deletion(sizes, d.before, d.proponents, d.opponents) for name, d in found.items()}


def _ranks(scores: Tensor) -> bool:
    return bool((scores.amax(1) > scores.amin(1)).all())


def auc_of(suspicion: Tensor, wrong: Tensor) -> str:
    """ROC-AUC of a score of suspicion, with its interval over the texts."""
    if not suspicion.isfinite().all():
        return "not finite"
    return mislabel_detection(suspicion.double(), wrong).area


def rows(config: Any, options: argparse.Namespace) -> list[Row]:
    """The table."""
    set_up = set_up_of(config)
    check(config, set_up)
    if config.few_points < 1:
        raise ValueError(
            f"Expected few_points of at least 1, the questions of the deletions, found {config.few_points}."
        )
    hunted = flipped(config, set_up)
    wrong = torch.tensor(hunted.texts.data.flipped)
    which = contestants()
    answers = ask(which, set_up, hunted)
    finite = answers.finite()
    with tempfile.TemporaryDirectory() as folder:
        fit = fitted(set_up, SEED, Path(folder), [])
        lds, ceiling = lds_of(fit, finite, options.subsets, options.cache)
        deleted = deletion_of(fit, finite, config.few_points, list(config.sizes), options.cache)
    found: list[Row] = [{"method": "noise ceiling: at most, by a perfect attribution", "LDS": str(ceiling)}]
    for name in (contestant.name for contestant in which):
        row: dict[str, str] = {"method": name, "LDS": answers.failed.get(name, "")}
        if name in lds:
            row["LDS"] = str(lds[name])
        if name in deleted:
            row |= {"AUC-DEL+": str(deleted[name].auc_proponents), "AUC-DEL−": str(deleted[name].auc_opponents)}
        if name in answers.suspicion:
            row["AUC of wrong labels"] = auc_of(answers.suspicion[name].values, wrong)
        if name in answers.scores:
            row |= {"CPU s": f"{answers.scores[name].seconds:.1f}", "MB": f"{answers.scores[name].size / 1e6:.2f}"}
        found.append(row)
    texts = [in_one_line(text) for text in hunted.texts.data.train_texts]
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
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("case_deletion", options.overrides)
    config = tables.chosen(config)
    found = rows(config, options)
    settings = {
        "training texts": config.data.source.get("train_size", "all"), "questions": config.points,
        "deletions at": config.few_points, "k": list(config.sizes), "random halves": options.subsets,
        "seeds of the halves": list(RETRAINED_SEEDS), "seed of the explained model": SEED,
        **{name: version(name) for name in PEERS if _installed(name)}, "command": " ".join(options.overrides),
    }  # fmt: skip
    report(f"Scoreboard, {config.title}", found, options.out, **settings)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
