"""What a metric refuses: scores and truths that do not belong together, named before anything is computed from them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_influence.errors import MetricError

_NAMED = 5  # of ids or places that differ, so many are named
_FEWEST = 3  # subsets; the rank correlation of two is 1 or −1 whatever the scores


@dataclass(frozen=True)
class Ids:
    """Whose scores or truths these are; what is `None` is not compared.

    Args:
        queries: an id for each query, in the order of the tensor.
        samples: an id for each training sample, in the order of the tensor.
    """

    queries: Sequence[Hashable] | None = None
    samples: Sequence[Hashable] | None = None


def check_ids(scores: Ids | None, truth: Ids | None) -> None:
    """Refuse ids of the scores that are not those of the truth, in the same order.

    Raises:
        MetricError: they differ; the first few are named.
    """
    if scores is None or truth is None:
        return
    for what, mine, theirs in (
        ("query", scores.queries, truth.queries),
        ("sample", scores.samples, truth.samples),
    ):
        if mine is None or theirs is None:
            continue
        mine, theirs = _plain(mine), _plain(theirs)
        if mine == theirs:
            continue
        if len(mine) != len(theirs):
            found = f"{len(mine)} ids of the scores and {len(theirs)} of the truth"
        else:
            places = [place for place, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
            named = ", ".join(f"{mine[p]!r} and {theirs[p]!r} at {p}" for p in places[:_NAMED])
            found = f"{len(places)} that differ: {named}{', …' if len(places) > _NAMED else ''}"
        raise MetricError(
            f"the {what} ids of the scores are not those of the truth",
            expected="the same ids in the same order",
            found=found,
            hint=f"bring the {what} dimension of one of them into the order of the other",
        )


def floats(values: Tensor, what: str, shape: str) -> Tensor:
    """Check finite numbers of a shape such as "(Q, N)", and return them in float64, without a graph.

    Raises:
        MetricError: another number of dimensions, nothing in one of them, NaN or infinity.
    """
    dims = shape.count(",") + (not shape.endswith(",)"))
    if values.dim() != dims or not values.numel():
        raise MetricError(
            f"the {what} have the wrong shape",
            expected=shape,
            found=tuple(values.shape),
            hint="every dimension is there even if it has one entry, and none is empty",
        )
    finite = values.isfinite()
    if not bool(finite.all()):
        places = (~finite).nonzero()
        raise MetricError(
            f"the {what} are not all finite",
            expected="neither NaN nor infinity",
            found=f"{len(places)} of {values.numel()}, the first at {tuple(places[0].tolist())}",
            hint="find what went wrong where they were made; nothing sensible can be said of their ranks",
        )
    return values.detach().double()


def measured(measurements: Tensor) -> Tensor:
    """Check measurements (S, seeds, Q) of models trained on subsets, and return them in float64.

    Raises:
        MetricError: fewer than three subsets, another shape, NaN.
    """
    measurements = floats(measurements, "measurements", "(S, seeds, Q)")
    enough_subsets(len(measurements))
    return measurements


def enough_subsets(count: int) -> None:
    """Refuse fewer subsets than can be ranked.

    Raises:
        MetricError: fewer than three.
    """
    if count < _FEWEST:
        raise MetricError(
            "a rank correlation over so few subsets says nothing",
            expected=f"{_FEWEST} subsets or more; 50 to 100 are usual",
            found=count,
            hint="train on more random subsets",
        )


def booleans(values: Tensor, what: str, shape: tuple[int, ...]) -> Tensor:
    """Check truth values of this shape.

    Raises:
        MetricError: another type than bool, or another shape.
    """
    if values.dtype != torch.bool:
        raise MetricError(
            f"the {what} are not boolean",
            expected="torch.bool",
            found=values.dtype,
            hint="compare them with what they should be, as in `labels != true_labels`",
        )
    same_shape(what, tuple(values.shape), shape)
    return values


def classes(values: Tensor, what: str, count: int) -> Tensor:
    """Check one class index for each of so many.

    Raises:
        MetricError: no integers, or another number of them.
    """
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise MetricError(
            f"the {what} are no class indices", expected="integers", found=values.dtype, hint="pass `labels.long()`"
        )
    same_shape(what, tuple(values.shape), (count,))
    return values


def same_shape(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse what does not fit the scores.

    Raises:
        MetricError: the shapes differ.
    """
    if found != expected:
        raise MetricError(
            f"the {what} do not fit the scores",
            expected=f"shape {expected}",
            found=f"shape {found}",
            hint="scores and truths are about the same queries and samples in the same order",
        )


def count_of(k: int | float, available: int) -> int:
    """How many the first k are: an int is a number, a float a share, which is rounded and at least one.

    Raises:
        MetricError: not between 1 and all of them, or no share above 0 and up to 1.
    """
    share = isinstance(k, float)
    if isinstance(k, bool) or not (0 < k <= 1 if share else 1 <= k <= available):
        raise MetricError(
            "k is out of range",
            expected=f"a number from 1 to {available}, or a share as a float above 0 and up to 1.0",
            found=repr(k),
            hint="1 is one sample and 1.0 is all of them",
        )
    return max(1, int(k * available + 0.5)) if share else int(k)


def _plain(ids: Sequence[Hashable]) -> list[Hashable]:
    return list(ids.tolist()) if isinstance(ids, Tensor) else list(ids)
