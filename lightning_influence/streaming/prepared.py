"""Prepared queries: their gradients at every checkpoint, transformed and perhaps compressed, waiting for a stream."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts import Checkpoint
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import (
    Estimator,
    Queries,
    Stage,
    Term,
    Transform,
    query_side,
    unchanged,
)
from lightning_influence.gradients import Dense, Factored, GradientBlock, Gradients, LowRankGradients, cat
from lightning_influence.samples import fingerprint

_MOST_BYTES = 1 << 30  # of query gradients that wait to be compressed
_MORE = 4  # times the memory of factors that their product may take


@dataclass(frozen=True)
class PreparedTerm:
    """One term of the sum: its parameters, transformed query gradients, and what training gradients pass through."""

    parameters: tuple[str, ...]
    queries: Gradients
    train_transform: Transform

    @property
    def linear(self) -> bool:
        """Whether parts of a training gradient can be scored as they come, and the scores added."""
        return self.train_transform is unchanged


@dataclass(frozen=True)
class Part:
    """What is scored in one pass over a batch: the terms whose training gradients belong to one checkpoint."""

    at: Checkpoint
    parameters: tuple[str, ...]
    terms: tuple[PreparedTerm, ...]

    def to(self, device: torch.device) -> Part:
        """The same on another device."""

        def moved(gradients: Gradients) -> Gradients:
            return {name: block.to(device=device) for name, block in gradients.items()}

        return replace(self, terms=tuple(replace(term, queries=moved(term.queries)) for term in self.terms))


@dataclass(frozen=True)
class Prepared:
    """Queries that wait for the training data.

    Attributes:
        parts: by checkpoint.
        num_queries: Q.
        relative_error: (Q,), norm of what low rank left out over the norm of the query's transformed gradient; `None`
            without compression.
        recognised: hexadecimal digits over queries, checkpoints, estimator and settings, by which scores on disk are
            known to belong to them.
        scores_file: where all scores are kept, if anywhere.
    """

    parts: tuple[Part, ...]
    num_queries: int
    relative_error: Tensor | None
    recognised: str
    scores_file: Path | None

    @property
    def nbytes(self) -> int:
        """Bytes of the query gradients that are held."""
        return sum(b.nbytes() for part in self.parts for term in part.terms for b in term.queries.values())

    def __repr__(self) -> str:
        lost = "" if self.relative_error is None else f", relative error {float(self.relative_error.mean()):.3g}"
        return f"Prepared({self.num_queries} queries, {len(self.parts)} checkpoints, {self.nbytes / 1e6:.1f} MB{lost})"


def batches_of(queries: Iterable[Any]) -> list[Any]:
    """The batches of a query loader.

    Raises:
        QueryError: a single batch, or nothing.
    """
    if isinstance(queries, (Tensor, Mapping, tuple, str, bytes)) or not isinstance(queries, Iterable):
        raise QueryError(
            "these are no query batches",
            expected="a DataLoader, or a list of batches",
            found=f"a {type(queries).__name__}",
            hint="write influence.prepare([batch]) for a single batch",
        )
    batches = list(queries)
    if not batches:
        raise QueryError("there are no queries", expected="at least one batch", found="none", hint="look at the loader")
    return batches


def prepare(
    stage: Stage,
    estimator: Estimator,
    batches: Sequence[Any],
    queries: Callable[[Sequence[Any]], Queries],
    *,
    rank: int | None,
    dtype: torch.dtype | None,
    scores_file: Path | None,
    question: str,
) -> Prepared:
    """Take the query gradients, at most a gigabyte of them at a time if they are compressed.

    Args:
        queries: from batches to what an estimator is given.
        question: what the queries' influence is on, in words.

    Raises:
        QueryError: an estimator whose training gradients cannot be taken now; a rank or type that makes no sense.
    """
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise QueryError("rank must be a positive integer", expected=">= 1", found=repr(rank), hint="try 32")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise QueryError(
            "dtype must be a floating type", expected="such as torch.bfloat16", found=repr(dtype), hint="leave it out"
        )
    terms = estimator.terms(stage)
    _refuse_stored(terms)
    asked = queries(batches)
    columns: list[list[Gradients]] = [[] for _ in terms]
    squares: list[Tensor] = []
    for group in [range(len(batches))] if rank is None else _groups(asked.sizes, terms, stage):
        some = asked if len(group) == len(batches) else queries([batches[i] for i in group])
        total = torch.zeros(2, len(some), dtype=torch.float64)  # squared norms: of what is lost, of all
        for column, gradients in zip(columns, query_side(terms, some), strict=True):
            column.append(_held(gradients, rank, dtype, total))
        squares.append(total)
    lost, whole = torch.cat(squares, 1)
    by_step: dict[int, list[tuple[Term, Gradients]]] = {}
    for term, column in zip(terms, columns, strict=True):
        assert isinstance(term.train_at, Checkpoint)
        by_step.setdefault(term.train_at.step, []).append((term, cat(column)))
    parts = []
    for members in by_step.values():
        at = members[0][0].train_at
        assert isinstance(at, Checkpoint)
        names = tuple(dict.fromkeys(name for term, _ in members for name in term.parameters))
        parts.append(
            Part(
                at, names, tuple(PreparedTerm(term.parameters, found, term.train_transform) for term, found in members)
            )
        )
    return Prepared(
        tuple(parts),
        len(asked),
        None if rank is None else (lost / whole.clamp_min(1e-300)).sqrt(),
        "" if scores_file is None else _recognised(stage, estimator, batches, parts, f"{question} {rank} {dtype}"),
        scores_file,
    )


def _refuse_stored(terms: Sequence[Term]) -> None:
    """Refuse what only stored gradients can answer."""
    if any(not isinstance(term.train_at, Checkpoint) or term.train_weight is not None for term in terms):
        raise QueryError(
            "scores of records made in flight cannot be streamed",
            expected="training gradients at the weights of a checkpoint",
            found="gradients at the weights of every single step, which exist in the store alone",
            hint="ask the store, without prepare; or fit with GradientSnapshot(mode='replay') or CurvatureSnapshot",
        )


def _groups(sizes: Sequence[int], terms: Sequence[Term], stage: Stage) -> Iterator[range]:
    """Query batches that are compressed together: as many as keep their gradients below a gigabyte."""
    shapes = {name: math.prod(spec.shape) for name, spec in stage.store.manifest.parameters.items()}
    each = 4 * sum(shapes[name] for term in terms for name in term.parameters)
    start, count = 0, 0
    for index, size in enumerate(sizes):
        if count and (count + size) * each > _MOST_BYTES:
            yield range(start, index)
            start, count = index, 0
        count += size
    yield range(start, len(sizes))


def _held(gradients: Gradients, rank: int | None, dtype: torch.dtype | None, squares: Tensor) -> Gradients:
    """The blocks as they are kept; `squares` (2, q) gains the squared norms of what is lost and of all."""
    held: dict[str, GradientBlock] = {}
    for name, block in gradients.items():
        kept = _written_out(block if rank is None else _compressed(block, rank, squares))
        kept = kept.to(dtype=dtype) if dtype is not None else kept
        if not kept.all_finite():
            raise QueryError(
                f"the query gradient of '{name}' is NaN or infinite",
                expected="finite gradients" + ("" if dtype is None else f" that {dtype} can hold"),
                found=f"values up to {float(block.norm().max()):.3g}",
                hint="look at the query's loss, or hold bfloat16 or float32 instead of float16",
            )
        held[name] = kept
    return held


def _compressed(block: GradientBlock, rank: int, squares: Tensor) -> GradientBlock:
    """In low rank, if that is smaller."""
    whole = block.norm().double().cpu().square()
    squares[1] += whole
    rows, columns = (block.shape[0], math.prod(block.shape[1:])) if len(block.shape) > 1 else (1, 1)
    positions = block.inputs.shape[1] if isinstance(block, Factored) else rank + 1  # a sum of so many of rank one
    small = rank * (rows + columns) < rows * columns and rank < positions
    if not isinstance(block, (Dense, Factored)) or not small:
        return block
    thin = LowRankGradients.of(block, rank)
    squares[0] += (whole - thin.norm().double().cpu().square()).clamp_min(0)  # an orthogonal projection
    return thin


def _written_out(block: GradientBlock) -> GradientBlock:
    """Factors of several positions as one matrix a query, where that takes not much more memory: they meet every batch
    of the training data, and would be multiplied out again for each."""
    if not isinstance(block, Factored) or block.inputs.shape[1] == 1:
        return block
    size = math.prod(block.shape)
    factors = block.inputs.shape[1] * (block.inputs.shape[2] + block.output_grads.shape[2])
    return Dense(block.dense().to(block.dtype)) if size <= _MORE * factors else block


def _recognised(stage: Stage, estimator: Estimator, batches: Sequence[Any], parts: Sequence[Part], how: str) -> str:
    manifest = stage.store.manifest
    whole = hashlib.sha256(f"{manifest.dataset_fingerprint} {how} {manifest.facts.get('damping')}".encode())
    for part in parts:
        files = [f.sha256 for f in stage.store.artifacts() if f.step == part.at.step and f.kind in _DECIDING]
        whole.update(f"{part.at.step} {part.parameters} {files}".encode())
    whole.update(f"{type(estimator).__qualname__} {_settings(vars(estimator))}".encode())
    for batch in batches:
        whole.update(fingerprint([batch]).encode())
    return whole.hexdigest()


_DECIDING = ("weights", "frozen", "optimizer", "curvature")


def _settings(values: Mapping[str, Any]) -> str:
    """What an estimator was made with, in words that are the same in every process; what it remembers is left out."""
    described = []
    for name, value in sorted(values.items()):
        if isinstance(value, Tensor):
            value = value.tolist()
        if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
            described.append(f"{name}={value!r}")
        elif not isinstance(value, dict):
            described.append(f"{name}={type(value).__qualname__}({_settings(getattr(value, '__dict__', {}))})")
    return ", ".join(described)
