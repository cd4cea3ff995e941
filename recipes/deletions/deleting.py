"""What deleting changes: the probability of the predicted class after training again without parts of a ranking."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipes.deletions.fitting import Explained
from recipes.truths.retraining import Samples, retrain

_ROUNDING = 0.1  # what rounding may do to a probability in the mean, over a whole training


@dataclass(frozen=True)
class Deletions:
    """The probability of the class that the whole model predicts, after deletions.

    Args:
        before: of the whole model (Q,).
        proponents: without the first k proponents (Q, K).
        opponents: without the first k opponents (Q, K).
    """

    before: Tensor
    proponents: Tensor
    opponents: Tensor


@dataclass(frozen=True)
class Truths:
    """Where the retrained models are kept, and how many are trained together."""

    cache: str | os.PathLike[str]
    at_once: int = 1


def delete_texts(
    fit: Explained, rankings: Mapping[str, Tensor], sizes: Sequence[int], truths: Truths
) -> dict[str, Deletions]:
    """Train again without the first and the last texts of every ranking, for each query and each number of texts.

    A deleted text keeps its place in its batch, with weight 0: the other texts are seen in the same batches and the
    mean is over as many as before, so that nothing but the deletion differs from the whole model.

    Args:
        rankings: of each method, training texts from first proponent to first opponent (Q', N), Q' ≤ Q.
        sizes: numbers of deleted texts, K of them.
    """
    count, most = len(fit.set_up.texts.train), max(len(order) for order in rankings.values())
    asked = [(query, name) for query in range(most) for name, order in rankings.items() if query < len(order)]
    deleted = [ids for q, name in asked for k in sizes for ids in (rankings[name][q, :k], rankings[name][q, -k:])]
    weights = [torch.ones(count).index_fill(0, ids, 0.0) for ids in deleted]
    whose = [query for query, _ in asked for _ in range(2 * len(sizes))]
    every = torch.arange(count)
    before, after = _probabilities(fit, fit.set_up.texts.train, [every] * len(deleted), weights, whose, truths)
    parts = after.view(len(asked), len(sizes), 2)
    found = {}
    for name, order in rankings.items():
        own = parts[[place for place, (_, asking) in enumerate(asked) if asking == name]]
        found[name] = Deletions(before[: len(order)], own[..., 0], own[..., 1])
    return found


def replace_texts(
    fit: Explained, edited: Samples, replaced: Sequence[Mapping[int, int]], whose: Sequence[int], truths: Truths
) -> tuple[Tensor, Tensor]:
    """Train again with some texts in other words, which stand in the places of the first ones.

    Args:
        edited: the other texts, (E, T), as long as the training texts are.
        replaced: of each model, training text -> text of `edited`.
        whose: query that each model is asked about.

    Returns:
        Probabilities of the predicted class: of the whole model (Q,), and of each of these (R,) for its query.
    """
    train = fit.set_up.texts.train
    together = Samples(
        torch.cat([train.inputs, edited.inputs]), torch.cat([train.labels, edited.labels]), padding=train.padding
    )
    subsets = []
    for of_model in replaced:
        subset = torch.arange(len(train))
        subset[list(of_model)] = len(train) + torch.tensor(list(of_model.values()), dtype=torch.long)
        subsets.append(subset)
    return _probabilities(fit, together, subsets, [torch.ones(len(train))] * len(subsets), whose, truths)


def _probabilities(
    fit: Explained,
    train: Samples,
    subsets: Sequence[Tensor],
    weights: Sequence[Tensor],
    whose: Sequence[int],
    truths: Truths,
) -> tuple[Tensor, Tensor]:
    """Probabilities of the predicted classes: of the whole model (Q,), and of each subset's model for its query."""
    count = len(fit.set_up.texts.train)
    whole = [torch.arange(count)], [torch.ones(count)]
    before = _said(fit, train, *whole, truths)[0]
    _check(fit, before)
    after = _said(fit, train, subsets, weights, truths)  # (R, Q)
    return before, after[torch.arange(len(whose)), torch.tensor(whose, dtype=torch.long)]


def _said(
    fit: Explained, train: Samples, subsets: Sequence[Tensor], weights: Sequence[Tensor], truths: Truths
) -> Tensor:
    """Probabilities of the predicted classes (R, Q) by models trained on the subsets."""
    truth = retrain(
        fit.set_up.again, fit.set_up.recipe, train, fit.queries, subsets,
        seeds=[fit.seed], weights=weights, cache=truths.cache, at_once=truths.at_once,
    )  # fmt: skip
    return (-truth.losses[:, 0]).exp()


def unlike(fit: Explained, before: Tensor) -> float:
    """How far the probabilities of the whole model trained again (Q,) are from the explained one's, in the mean.

    Both are trained alike. What rounding does to one step, many steps can make large: this is the noise that a
    deletion's change stands in.
    """
    with torch.no_grad():
        logits = fit.module(fit.queries.inputs).double()
    found = logits.softmax(1).gather(1, fit.queries.labels.unsqueeze(1)).squeeze(1)
    return float((found[: len(before)] - before).abs().mean())


def _check(fit: Explained, before: Tensor) -> None:
    """Refuse a model that is trained again in another way than the explained one, before many are trained."""
    if (gap := unlike(fit, before)) > _ROUNDING:
        raise RuntimeError(
            f"The whole model trained again says other probabilities than the explained one: expected at most "
            f"{_ROUNDING} between them in the mean, found {gap:.2g}. HINT: is it the same recipe?"
        )
