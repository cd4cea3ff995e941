"""Does a prediction change when its reasons are deleted and the model is trained again? TracIn-WE and others on texts.

python recipes/case_deletion.py                  # sentences of docstrings, some minutes; quick=true: a part of it
python recipes/case_deletion.py setting=case_deletion_ag_news data_root=/path/to/data
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lightning_influence.metrics import CaseDeletion, Comparison, Deletion, QueryMean, case_deletion, difference, ratio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes import tables
from recipes.deletions.deleting import Deletions, Truths, delete_texts, unlike
from recipes.deletions.fitting import Explained, SetUp, explained, explained_in_all_ways
from recipes.deletions.methods import Method, methods
from recipes.deletions.texts import Texts
from recipes.deletions.words import delete_words

WE, LAST = "TracIn-WE", "TracIn-Last"


@dataclass
class Found:
    """What the deletions of every method changed, seed by seed.

    Args:
        deletions: of each method, one entry a seed.
        seconds: of each method's scores, of the first seed.
        accuracies: of each seed's model on the held-out texts.
        noise: of each seed, how far the whole model trained again is from the explained one.
    """

    deletions: dict[str, list[Deletions]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    accuracies: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)

    def add(self, deletions: Mapping[str, Deletions]) -> None:
        """One seed's."""
        for name, found in deletions.items():
            self.deletions.setdefault(name, []).append(found)

    def judged(self, sizes: list[int], *, queries: int | None = None, seeds: int | None = None) -> dict[str, Deletion]:
        """The metric of every method, over its first queries and seeds, or all."""
        judged = {}
        for name, of_seeds in self.deletions.items():
            parts = [(d.before, d.proponents, d.opponents) for d in of_seeds[:seeds]]
            judged[name] = case_deletion(sizes, *(torch.stack(each)[:, :queries] for each in zip(*parts, strict=True)))
        return judged


def set_up_of(config: Any) -> SetUp:
    """Model, recipe, texts and questions of a configuration."""
    texts = Texts.of(instantiate(config.data))
    sizes = {"vocabulary_size": len(texts.data.vocabulary), "num_classes": len(texts.data.label_names)}
    build = instantiate(config.model, **sizes, _partial_=True)
    again = instantiate(config.model, **sizes, _partial_=True, _target_=config.again or config.model._target_)
    positions = texts.drawn(config.points, config.drawn_by)
    return SetUp(build, again, instantiate(config.recipe), texts, positions, config.every_n_epochs)


def experiment(config: Any, set_up: SetUp, cache: str) -> Found:
    """Fit, rank and delete, seed after seed."""
    found, truths, sizes = Found(), Truths(cache, config.at_once), list(config.sizes)
    check(config, set_up)
    listed = methods(config.frequent)
    for seed in config.seeds:
        first = seed == config.seeds[0]
        with tempfile.TemporaryDirectory() as folder:
            fit = (explained_in_all_ways if first and config.few_points else explained)(set_up, seed, Path(folder))
            found.accuracies.append(_accuracy(fit))
            print(f"seed {seed}: {found.accuracies[-1]:.1%} of the held-out texts right", flush=True)
            rankings: dict[str, Tensor] = {}
            for method in listed:
                count = config.points if method.everywhere else config.few_points
                if count and (first or method.everywhere):
                    rankings[method.name] = _ranking(method, fit, count, found if first else None)
            found.add(delete_texts(fit, rankings, sizes, truths))
            found.noise.append(unlike(fit, found.deletions[WE][-1].before))
            if first and config.word_points:
                found.add(delete_words(fit, config.word_points, sizes, truths))
    return found


def check(config: Any, set_up: SetUp) -> None:
    """Refuse what could not be judged in the end, before anything is trained."""
    count, asked = len(set_up.texts.train), len(set_up.positions)
    sizes = list(config.sizes)
    if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1 or 2 * sizes[-1] > count:
        raise ValueError(f"Expected increasing sizes from 1 to half of the {count} training texts, found {sizes}.")
    for name in ("points", "few_points", "word_points"):
        if not 0 <= config[name] <= asked:
            raise ValueError(f"Expected {name} up to the {asked} points that there are, found {config[name]}.")


def _ranking(method: Method, fit: Explained, count: int, found: Found | None) -> Tensor:
    began = time.perf_counter()
    scores = method.scores(fit, count)
    if found is not None:
        found.seconds[method.name] = time.perf_counter() - began
    return scores.argsort(dim=1, descending=True, stable=True)


def _accuracy(fit: Explained) -> float:
    test = fit.set_up.texts.test
    with torch.no_grad():
        said = torch.cat([fit.module(tokens).argmax(1) for tokens in torch.split(test.inputs, 500)])
    return float((said == test.labels).float().mean())


def lines(sizes: list[int], judged: Mapping[str, Deletion], seconds: Mapping[str, float]) -> list[dict[str, object]]:
    """A row for every method: DEL+ and DEL− of every size, their means over the sizes, and seconds."""
    rows = []
    for name, deletion in judged.items():
        row: dict[str, object] = {
            "method": name,
            "AUC-DEL+": deletion.auc_proponents,
            "AUC-DEL−": deletion.auc_opponents,
        }
        row |= {f"DEL+({k})": f"{q.mean:.3f}" for k, q in zip(sizes, deletion.proponents, strict=True)}
        row |= {f"DEL−({k})": f"{q.mean:.3f}" for k, q in zip(sizes, deletion.opponents, strict=True)}
        rows.append(row | {"s": seconds.get(name, "")})
    return rows


def compared(judged: Mapping[str, Deletion]) -> str:
    """TracIn-WE beside TracIn-Last and random, where all three were asked about the same points."""

    def line(what: str, one: QueryMean, other: QueryMean) -> str:
        times: Comparison = ratio(one, other)
        return f"| {what} | {difference(one, other)} | {times} |"

    we = judged[WE]
    rows = ["| TracIn-WE beside | difference of the means | ratio of the means |", "|---|---|---|"]
    for name in (LAST, "random"):
        other = judged[name]
        rows.append(line(f"{name}, AUC-DEL+", we.auc_proponents, other.auc_proponents))
        rows.append(line(f"{name}, AUC-DEL−", we.auc_opponents, other.auc_opponents))
        rows.append(line(f"{name}, both in one", we.auc, other.auc))
    return "\n".join(rows)


def remarks(config: Any, set_up: SetUp, found: Found, seconds: float) -> str:
    """What was done."""
    model = config.model._target_.rpartition(".")[2]
    accuracies = ", ".join(f"{a:.1%}" for a in found.accuracies)
    whole = torch.stack([d.before for d in found.deletions[WE]]).mean()
    return (
        f"{model} with SGD ({set_up.recipe}) on {len(set_up.texts.train)} texts of at most {config.data.max_tokens} "
        f"words; {config.points} held-out texts, drawn at random, are asked why the model says what it says; seeds "
        f"{list(config.seeds)} (accuracy {accuracies}; mean probability of the predicted class {float(whole):.3f}). "
        f"The first k of a ranking (DEL+) or the last k (DEL−), k = {list(config.sizes)}, are taken out of the "
        "training set, and the model is trained again from the same initial weights in the same batches, a deleted "
        f"text having weight 0. Rounding alone moves the probability by {sum(found.noise) / len(found.noise):.3f} in "
        "the mean, whole model against whole model. DEL is the change of the predicted class's probability: negative "
        "is good for DEL+, "
        "positive for DEL−; AUC-DEL the mean over k, “both in one” (AUC-DEL− − AUC-DEL+) / 2; in brackets the 95% "
        "bootstrap interval over the points, the seeds of a point averaged. TracIn-WE, TracIn-Last and random: all "
        f"points and seeds; the others: the first {config.few_points} points and the first seed; words: the first "
        f"{config.word_points}, k words instead of texts. Random: eight rankings, which the points take in turn, so "
        "that its interval is rather narrow. “Signed by the label”: positive where the training text has the predicted "
        "class as its label, negative otherwise. “s”: seconds for the scores of the first "
        "seed's points, as many as the method is asked about. "
        f"The whole run: {seconds / 60:.0f} minutes, less where truths were known already."
    )


@hydra.main(version_base="1.3", config_path="../configs", config_name="case_deletion")
def main(config: DictConfig) -> float:
    """Delete, write the table and the picture, and return AUC-DEL of TracIn-WE, both signs in one."""
    began = time.perf_counter()
    config = tables.chosen(config)
    set_up, sizes, results = set_up_of(config), list(config.sizes), Path(config.results)
    with tempfile.TemporaryDirectory() as folder:
        found = experiment(config, set_up, config.cache or folder)
    judged = found.judged(sizes)
    parts = [
        remarks(config, set_up, found, time.perf_counter() - began),
        compared(judged),
        tables.table(lines(sizes, judged, found.seconds)),
    ]
    if config.few_points:
        few = found.judged(sizes, queries=config.few_points, seeds=1)
        parts += ["On the few points and the first seed alone, for all methods alike:"]
        parts += [tables.table(lines(sizes, {name: few[name] for name in judged}, {}))]
    tables.write(results.with_suffix(".md"), f"Case deletion, {config.title}", config.command, parts)
    tables.picture(results.with_suffix(".png"), [partial(_curves, judged), partial(_bars, judged)], width=5.6)
    return judged[WE].auc.mean


def _curves(judged: Mapping[str, Deletion], axis: Any) -> None:
    shown = {name: judged[name] for name in (WE, LAST, "random")}
    CaseDeletion(next(iter(shown.values())).sizes).plot(shown, axis)
    axis.set_ylabel("change of the probability: DEL+ full, DEL− dashed", fontsize=8)
    axis.set_xlabel("deleted texts k", fontsize=8)
    axis.legend(fontsize=7)


def _bars(judged: Mapping[str, Deletion], axis: Any) -> None:
    measures = {
        "AUC-DEL+": [(q.mean, q.low, q.high) for q in (d.auc_proponents for d in judged.values())],
        "AUC-DEL−": [(q.mean, q.low, q.high) for q in (d.auc_opponents for d in judged.values())],
    }
    tables.paired_bars(axis, list(judged), measures)
    axis.axvline(0, color="black", linewidth=0.6)


if __name__ == "__main__":
    main()
