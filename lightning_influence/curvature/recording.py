"""Curvatures in a store: estimated at a checkpoint and written beside its weights, and read back by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_influence.artifacts import Artifact, ArtifactStore, Checkpoint, ParameterGroup
from lightning_influence.curvature.block_diagonal import BlockDiagonal
from lightning_influence.curvature.curvature import Curvature, CurvatureStatistics
from lightning_influence.curvature.diagonal import Diagonal
from lightning_influence.curvature.evidence import Stationarity, TrainingEvidence
from lightning_influence.curvature.kronecker import EKFAC, KFAC
from lightning_influence.errors import CurvatureError, StoreError

_DECOUPLED = ("AdamW", "NAdamW")  # their decay is not divided by sqrt(v_hat); others have an option that says so


@dataclass(frozen=True)
class RecordedCurvature:
    """A curvature as it lies in a store, and how it came about.

    Attributes:
        curvature: H, weight decay included.
        name: what it is called there.
        at: the checkpoint whose weights it belongs to.
        labels, seed, num_samples: over which labels and samples it was taken.
        decay: the weight decay that is part of H, by parameter name.
        stationarity: how near the weights were to a stationary point, where that was looked at.
        look_ups: embedding weights of which it knows the look-ups alone, without other uses such as a tied head.
    """

    curvature: Curvature
    name: str
    at: Checkpoint
    labels: str | None
    seed: int
    num_samples: int
    decay: Mapping[str, float]
    stationarity: Stationarity | None
    look_ups: tuple[str, ...] = ()


def write_curvature(
    store: ArtifactStore,
    at: Checkpoint,
    statistics: CurvatureStatistics,
    curvature: Curvature,
    evidence: TrainingEvidence,
    decay: Mapping[str, float],
    facts: Mapping[str, Any] | None = None,
) -> Artifact:
    """Write and commit an estimated curvature (rank zero only); weight decay goes onto its diagonal first.

    Args:
        facts: more to be said about it, or otherwise than the evidence says it.
    """
    tensors, config = curvature.decayed(decay).state()
    look = evidence.stationarity
    meta = {
        "kind": curvature.kind,
        "name": statistics.name,
        "statistics": {"class": type(statistics).__name__, **statistics.settings()},
        "labels": evidence.labels if statistics.uses_labels else None,
        "seed": evidence.seed,
        "num_samples": evidence.num_samples,
        "decay": dict(decay),
        "stationarity": None if look is None else asdict(look),
        "parameters": list(curvature.parameters),
        "look_ups": sorted(evidence.selection.input_only),
        "config": config,
        **(facts or {}),
    }
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _refuse_not_finite(held, curvature, config)
    artifact = store.write_curvature(at, statistics.name, held, meta)
    store.commit(artifact)
    return artifact


def _refuse_not_finite(tensors: Mapping[str, Tensor], curvature: Curvature, config: Mapping[str, Any]) -> None:
    bad = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if not bad:
        return
    number, blocks = bad[0].partition(".")[0], config.get("blocks")
    owners = blocks[int(number)]["names"] if blocks is not None and number.isdigit() else curvature.parameters
    raise CurvatureError(
        f"the curvature of {', '.join(map(repr, owners))} is NaN or infinite",
        expected="finite sums over the training set",
        found=f"values that are not, in {bad[0]!r}",
        hint="look for samples whose gradient is not finite although their loss is; in half precision use a wider type",
    )


def recorded_curvature(
    store: ArtifactStore, name: str | None = None, at: Checkpoint | None = None
) -> RecordedCurvature:
    """A curvature of the store.

    Args:
        name: such as `"ekfac"`; `None` takes the only kind that there is.
        at: its checkpoint; `None` is the last that has one.

    Raises:
        CurvatureError: the store has none, or several and no name says which.
        StoreError: its file is damaged.
    """
    files = [file for file in store.artifacts("curvature") if at is None or file.step == at.step]
    names = sorted({str(file.meta.get("name")) for file in files})
    if not names or (name is not None and name not in names) or (name is None and len(names) > 1):
        wanted = "a curvature" if name is None else f"the curvature {name!r}"
        where = f"the store at {store.root}" if at is None else f"the checkpoint at step {at.step} in {store.root}"
        several = name is None and len(names) > 1
        raise CurvatureError(
            f"{where} holds {'several curvatures' if several else 'no such curvature'}",
            expected=f"one, or a name: {', '.join(names)}" if several else wanted,
            found=", ".join(names) or "none: it was written without a CurvatureSnapshot",
            hint=f"pass curvature={names[0]!r}"
            if several
            else f"pass curvature={names[0]!r}, or fit with callbacks=[..., CurvatureSnapshot(statistics={name!r})]"
            if names
            else "fit with callbacks=[..., CurvatureSnapshot(store)], add one afterwards with add_curvature(...), or "
            "use InfluenceFunction(curvature=MatrixFree()), which needs nothing stored",
        )
    file = [file for file in files if str(file.meta.get("name")) == (name or names[0])][-1]
    try:
        meta: dict[str, Any] = dict(file.meta)
        kind = Curvature.kinds.get(str(meta["kind"]))
        if kind is None:
            raise ValueError(f"a curvature of the unknown kind {meta['kind']!r}")
        look = meta["stationarity"]
        curvature = kind.load(store.curvature(file), meta["config"])
        for parameter in curvature.parameters:
            known = store.manifest.parameters[parameter].shape
            if isinstance(curvature, BlockDiagonal) and curvature.shapes[parameter] != tuple(known):
                raise ValueError(f"{parameter} of shape {curvature.shapes[parameter]}, in the model {tuple(known)}")
        return RecordedCurvature(
            curvature=curvature,
            name=str(meta["name"]),
            at={c.step: c for c in store.checkpoints()}[file.step],
            labels=meta["labels"],
            seed=int(meta["seed"]),
            num_samples=int(meta["num_samples"]),
            decay={str(n): float(v) for n, v in meta["decay"].items()},
            stationarity=None if look is None else Stationarity(**look),
            look_ups=tuple(str(n) for n in meta.get("look_ups", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"{store.root / file.path} does not describe a curvature",
            expected="the tensors and facts that write_curvature wrote",
            found=f"{type(error).__name__}: {error}",
            hint="restore the file from a copy of the store, or read it with the version of the library that wrote it",
        ) from error


def refuse_labels(statistics: CurvatureStatistics, labels: str | None) -> None:
    """CurvatureError for labels that the statistics have no use for."""
    if labels is not None and not statistics.uses_labels:
        raise CurvatureError(
            f"labels have no effect on the curvature {statistics.name!r}",
            expected="labels=None",
            found=f"labels={labels!r}",
            hint="it is made of exact second derivatives; EKFAC(), KFAC() and Diagonal() are taken over labels",
        )


_BY_NAME: dict[str, Callable[[], CurvatureStatistics]] = {"ekfac": EKFAC, "kfac": KFAC, "diagonal": Diagonal}


def statistics_of(statistics: CurvatureStatistics | str) -> CurvatureStatistics:
    """Statistics by name, with their default settings, or as they are.

    Raises:
        CurvatureError: an unknown name, or something else.
    """
    if isinstance(statistics, CurvatureStatistics):
        return statistics
    if not isinstance(statistics, str) or statistics not in _BY_NAME:
        raise CurvatureError(
            "unknown curvature statistics",
            expected=", ".join(map(repr, _BY_NAME)) + ", or an object such as EKFAC()",
            found=repr(statistics),
            hint="pass an instance for settings: EKFAC(exact_up_to=1024), LowRank(rank=50), curvature.Dense('hessian')",
        )
    return _BY_NAME[statistics]()


def is_decoupled(group: ParameterGroup) -> bool:
    """Whether the weight decay of a group bypasses the optimizer's division by √v̂+ε, as AdamW's does."""
    return bool(dict(group.options).get("decoupled_weight_decay", group.optimizer in _DECOUPLED))


def weight_decay_at(
    store: ArtifactStore, at: Checkpoint, names: tuple[str, ...], *, summed_over: int = 1
) -> dict[str, float]:
    """`weight_decay` as a checkpoint of the store tells it."""
    saved = {file.step for file in store.artifacts("optimizer")}
    scales = store.preconditioner(at) if at.step in saved else {}
    return weight_decay(at.groups, names, scales, summed_over=summed_over)


def weight_decay(
    groups: tuple[ParameterGroup, ...],
    names: tuple[str, ...],
    denominators: Mapping[str, Tensor],
    *,
    summed_over: int = 1,
) -> dict[str, float]:
    """What the optimizer's weight decay adds to the diagonal of H, by parameter name; 0 is left out.

    An L2 term wd/2 |θ|² adds wd. Decoupled decay (AdamW) is stationary where ∇ℓ + wd (√v̂+ε) θ = 0 and adds
    wd (√v̂+ε), of which the mean over the parameter is taken.

    Args:
        summed_over: samples whose losses `training_step` adds up instead of averaging: beside a sum the decay weighs so
            many times less.
    """
    decay: dict[str, float] = {}
    for group in groups:
        options: dict[str, Any] = dict(group.options)
        rate = float(options.get("weight_decay", 0.0) or 0.0)
        for name in group.parameters:
            if rate == 0.0 or name not in names:
                continue
            if is_decoupled(group):
                scale = denominators.get(name)
                factor = 1.0 if scale is None else float(scale.detach().to(torch.float64).mean())
                decay[name] = decay.get(name, 0.0) + rate * factor
            else:
                decay[name] = decay.get(name, 0.0) + rate
    return {name: value / summed_over for name, value in decay.items()}
