"""Which training labels are wrong? A tenth is flipped, and every score of suspicion is judged by where they come.

python recipes/mislabel_hunt.py                  # sentences of docstrings, some minutes; quick=true: a part of it
python recipes/mislabel_hunt.py setting=mislabel_hunt_ag_news data_root=/path/to/data
python recipes/mislabel_hunt.py setting=mislabel_hunt_mnist data_root=/path/to/data
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lightning_influence.metrics import MislabelDetection, MislabelsFound, mislabel_detection
from lightning_influence.report import label_issues

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes import tables
from recipes.hunting.data import Hunted
from recipes.hunting.fitting import Training, accuracy, accuracy_without, fitted
from recipes.hunting.suspicion import OUT_OF_FOLD, RANDOM, Suspicion, suspicions

NOTHING, FLIPPED = "nothing", "exactly the flipped ones"


@dataclass
class Results:
    """What all seeds came out with, one entry a seed.

    Args:
        found: of each score, by its title.
        seconds: of each score.
        accuracies: after training without what was dropped: by whom, and which share (None where that is no question).
        wrong: of what was dropped, the share whose label was wrong.
    """

    found: dict[str, list[MislabelsFound]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    accuracies: dict[tuple[str, float | None], list[float]] = field(default_factory=dict)
    wrong: dict[tuple[str, float | None], list[float]] = field(default_factory=dict)

    def add(self, suspicion: Suspicion, found: MislabelsFound) -> None:
        """One score of one seed."""
        self.found.setdefault(suspicion.title, []).append(found)
        self.seconds.setdefault(suspicion.title, []).append(suspicion.seconds)

    def drop(self, by: str, share: float | None, reached: float, wrong: float | None = None) -> None:
        """One training without some samples."""
        self.accuracies.setdefault((by, share), []).append(reached)
        if wrong is not None:
            self.wrong.setdefault((by, share), []).append(wrong)
        print(f"without {by} {share or ''}: accuracy {reached:.4f}", flush=True)


def hunt(config: Any, hunted: Hunted, seed: int, results: Results) -> list[Suspicion]:
    """All scores of one seed."""
    training = Training(**config.training)
    with tempfile.TemporaryDirectory() as folder:
        fit = fitted(hunted, training, seed, Path(folder))
        results.drop(NOTHING, None, accuracy(hunted, fit.module))
        scored = []
        for suspicion in suspicions(fit, seed):
            found = mislabel_detection(suspicion.scores, hunted.wrong, at=list(config.shares))
            print(f"seed {seed}  {suspicion.title:45s} {found}  {suspicion.seconds:.1f} s", flush=True)
            results.add(suspicion, found)
            scored.append(suspicion)
    return scored


def drop(config: Any, hunted: Hunted, seed: int, scores: Mapping[str, Tensor], results: Results) -> None:
    """Train again without the most suspicious samples of some scores."""
    training = Training(**config.training)
    flipped = hunted.wrong.nonzero().squeeze(1)
    results.drop(FLIPPED, None, accuracy_without(hunted, flipped, training, seed), 1.0)
    for title in config.dropped:
        for share in config.shares:
            dropped = scores[title].argsort(descending=True, stable=True)[: round(share * len(hunted))]
            wrong = float(hunted.wrong[dropped].double().mean())
            results.drop(title, share, accuracy_without(hunted, dropped, training, seed), wrong)


def found_table(results: Results, shares: Sequence[float]) -> str:
    """A line a score."""
    rows = []
    for title, found in results.found.items():
        row: dict[str, object] = {"score": title}
        for place, share in enumerate(shares):
            row[f"in the first {share:.0%}"] = _spread([one.at[place].recall for one in found])
        row["AUROC"] = _spread([one.auroc for one in found])
        row["average precision"] = _spread([one.average_precision for one in found])
        row["s"] = f"{statistics.mean(results.seconds[title]):.1f}"
        rows.append(row)
    return tables.table(rows)


def best(results: Results, place: int) -> tuple[str, float]:
    """The score of any kind but a baseline that finds most in one of the shares, and what it finds."""
    found = {
        title: statistics.mean(one.at[place].recall for one in of_seeds)
        for title, of_seeds in results.found.items()
        if title not in (OUT_OF_FOLD, RANDOM)
    }
    return max(found.items(), key=lambda item: item[1])


def verdict(results: Results, shares: Sequence[float]) -> str:
    """Who is ahead, the best score of ours or the simple baseline."""
    told = []
    for place, share in enumerate(shares):
        title, ours = best(results, place)
        simple = statistics.mean(one.at[place].recall for one in results.found[OUT_OF_FOLD])
        ahead = "is ahead of" if ours > simple else "is behind"
        told.append(
            f"In the first {share:.0%} the best of our scores ({title}, {ours:.3f}) {ahead} the simple "
            f"baseline, out of fold ({simple:.3f})."
        )
    return " ".join([*told, "The best was picked after the fact, on these very seeds."])


def dropped_table(results: Results, seeds: int) -> str:
    """A line for every way of dropping, over the first seeds."""
    rows: list[dict[str, object]] = []
    nothing = results.accuracies[NOTHING, None][:seeds]
    for (by, share), every in results.accuracies.items():
        reached = every[:seeds]
        gains = [after - before for after, before in zip(reached, nothing, strict=True)]
        wrong = results.wrong.get((by, share))
        rows.append(
            {
                "dropped by": by,
                "share": "" if share is None else f"{share:.0%}",
                "wrong among them": "" if wrong is None else _spread(wrong),
                "test accuracy": _spread(reached),
                "gain, points": "" if by == NOTHING else _spread([100 * gain for gain in gains], 2),
            }
        )
    return tables.table(rows)


def remarks(config: Any, hunted: Hunted, seeds: Sequence[int]) -> str:
    """What was done."""
    training = Training(**config.training)
    chosen = (
        "Epochs are those of recipes/demo.py; nothing was chosen on these flips."
        if config.chosen_on is None
        else f"Epochs, widths and dropout were chosen on the flips of seed {config.chosen_on}."
    )
    every = "every epoch" if training.every_n_epochs == 1 else f"every {training.every_n_epochs} epochs"
    return (
        f"{len(hunted)} training samples, {len(hunted.label_names)} classes, {config.flipped:.0%} of the labels "
        f"flipped to another class. {training.epochs} epochs; at the end of {every} training dynamics and the "
        f"gradients of all parameters ({training.dtype}), at the end of the fit EK-FAC. “In the first 10%”: share of "
        "the flipped labels among the tenth of the training set that is most suspicious; 10% by chance, and all of "
        "them at best. “Self-influence”: of every training sample, the highest first. “Opponents”: summed influence on "
        f"the losses of {config.hunted.held_out} held-out samples with right labels, which the other scores do not "
        "need; the most negative first. “Harm”: the sum of the negative ones of these scores alone. Under Adam TracIn "
        "is in the metric of the optimizer. “Gradient norm”: of all parameters, at the last checkpoint. “Mean margin” "
        "and “mean probability”: of the given label, over the checkpoints, the lowest first. “Forgetting events”: from "
        "right to wrong between two checkpoints. “Variability”: standard deviation of the probability. “Out of fold”: "
        "the probability of the given label by a logistic regression that was not trained on it (five folds; texts: "
        "tf-idf of words and pairs of words; images: pixels), the lowest first. Equal scores count as the mean over "
        "their orders. “s”: seconds on one core that others used too, beside the fit and its callbacks; opponents and "
        "harm come from one pass.\n\n"
        f"Mean ± standard deviation over the seeds {list(seeds)}, each with flips, held-out samples, initial weights "
        f"and batches of its own. {chosen}"
    )


@hydra.main(version_base="1.3", config_path="../configs", config_name="mislabel_hunt")
def main(config: DictConfig) -> float:
    """Hunt, write the tables, the picture and the suspects, and return the best share found by any but a baseline."""
    config = tables.chosen(config)
    path, results = Path(config.results), Results()
    for number, seed in enumerate(config.seeds):
        hunted: Hunted = instantiate(config.hunted, flipped=config.flipped, seed=seed)
        scored = hunt(config, hunted, seed, results)
        by_title = {suspicion.title: suspicion.scores for suspicion in scored}
        if config.dropped and number < config.retrained:
            drop(config, hunted, seed, by_title, results)
        told = [remarks(config, hunted, config.seeds[: number + 1]), found_table(results, config.shares)]
        told += [verdict(results, config.shares)]
        if config.dropped:
            again = min(number + 1, config.retrained)
            told += [f"Trained again without the most suspicious samples, seeds {list(config.seeds[:again])}:"]
            told += [dropped_table(results, again)]
        tables.write(path.with_suffix(".md"), f"Wrong labels, {config.title}", config.command, told)
        if not number:
            found = {title: mislabel_detection(by_title[title], hunted.wrong) for title in config.drawn}
            tables.picture(path.with_suffix(".png"), [partial(MislabelDetection().plot, found)], width=5.4)
            _export(config, hunted, by_title[config.exported])
    return best(results, len(config.shares) - 1)[1]


def _export(config: Any, hunted: Hunted, scores: Tensor) -> None:
    """The suspects of one score, for people and for other tools."""
    names = [hunted.label_names[label] for label in hunted.labels.tolist()]
    issues = label_issues(scores, share=config.shares[0], given_labels=names, texts=hunted.texts or None)
    folder = Path(config.folder)
    print(f"{issues}\n{issues.to_csv(folder / 'issues.csv')}\n{issues.to_jsonl(folder / 'issues.jsonl')}")


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
