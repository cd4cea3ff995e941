"""Influence functions: the query's gradient through the inverse curvature at the final weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_influence.artifacts import Checkpoint
from lightning_influence.curvature import (
    Curvature,
    CurvatureStatistics,
    Damping,
    Freezing,
    PartialInverse,
    ProjectedCurvature,
    RecordedCurvature,
    StoredEvidence,
    TrainingEvidence,
    Whole,
    as_damping,
    recorded_curvature,
    refuse_labels,
    weight_decay_at,
)
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Estimator, Stage, Term
from lightning_influence.estimators.tracin import look_ups
from lightning_influence.gradients import Gradients, TargetParameters, meant, select
from lightning_influence.objective import Labels
from lightning_influence.replay import TrainingData

DampingArgument: TypeAlias = Damping | float | Literal["auto"] | None

_FAR_FROM_STATIONARY = 0.1  # mean gradient over the root mean square of single samples' gradients, less their noise


class InfluenceFunction(Estimator):
    """What up-weighting a training sample does to the query, to first order at a stationary point (Koh & Liang 2017,
    1703.04730).

        score(q, z) = ∇m(q)ᵀ (H + λI)⁻¹ ∇ℓ(z)            H: curvature of the mean loss, weight decay included

    Scores are changes of m per unit of weight: removing the samples S and training again changes m by about
    (1/N) Σ_{z ∈ S} score(q, z).

    Args:
        curvature: the name of one in the store (`"ekfac"`, ...), `None` for the only one there; or statistics that are
            estimated when they are needed, from the model and the `train_loader` of the `InfluenceModule`:
            `MatrixFree()`, `EKFAC()`, ...; or `DataInf()`, `ProjectedGram()`, for which the gradients in the store are
            enough.
        damping: λ: a number, `Relative(factor)` of the mean eigenvalue of each block, `None` for a tenth of it
            (Grosse et al. 2023, 2308.03296), or `"auto"` for what `choose_damping` has found for this store.
        parameters: parameter names, or globs over them (what is a name is no glob); `None` takes all that curvature and
            gradients are known of; `TargetParameters` K takes H_KK⁻¹, as `FreezingInfluenceFunction(K)` does.
        labels, seed: of statistics that are estimated when they are needed, as in `CurvatureSnapshot`; `None` is
            `"observed"` for `DataInf` and `ProjectedGram`.

    Raises:
        QueryError: the store lacks the gradients, the model or the training data that this needs.
        CurvatureError: the store lacks the curvature; H + λI cannot be inverted.
    """

    counterfactual = True

    def __init__(
        self,
        curvature: str | CurvatureStatistics | None = None,
        *,
        damping: DampingArgument = None,
        parameters: str | Sequence[str] | TargetParameters | None = None,
        labels: Labels | None = None,
        seed: int = 0,
    ) -> None:
        if not (curvature is None or isinstance(curvature, (str, CurvatureStatistics))):
            raise QueryError(
                "this is no curvature",
                expected='a name such as "ekfac", or statistics such as MatrixFree()',
                found=repr(curvature),
                hint="write InfluenceFunction('ekfac') or InfluenceFunction(MatrixFree())",
            )
        if isinstance(curvature, CurvatureStatistics):
            refuse_labels(curvature, labels)
        self.damping: Damping | Literal["auto"] = "auto" if damping == "auto" else as_damping(damping)
        self.source, self._labels, self._seed = curvature, labels, seed
        self.inverse: PartialInverse = Whole()
        self._globs: Sequence[str] | None = None
        if isinstance(parameters, TargetParameters):
            self.inverse = Freezing(parameters)
        elif parameters is not None:
            self._globs = (parameters,) if isinstance(parameters, str) else parameters
        self._known: dict[tuple[Any, ...], RecordedCurvature] = {}

    @property
    def takes_all(self) -> bool:
        """Whether all parameters take part that curvature and gradients are known of."""
        return self._globs is None and self.inverse.target is None

    def __repr__(self) -> str:
        source, damping = self.source, self.damping
        if isinstance(source, CurvatureStatistics):
            given = ", ".join(f"{name}={value!r}" for name, value in source.settings().items())
            told = f"{type(source).__name__}({given})"
        else:
            told = "" if source is None else repr(source)
        parts = [told, f"damping={damping if isinstance(damping, str) else damping.record()}"]
        parts += [] if self._globs is None else [f"parameters={list(self._globs)}"]
        parts += [] if self.inverse.target is None else [f"{self.inverse.target.size} target parameters"]
        return f"{type(self).__name__}({', '.join(part for part in parts if part)})"

    def terms(self, stage: Stage) -> Sequence[Term]:
        """The one term of the sum, at the checkpoint of the curvature."""
        found = self.recorded(stage)
        names = self._names(stage, found)
        damping = self.damping_of(stage, found)
        inner = None if stage.projection is None else found.curvature.within(stage.projection)
        if inner is not None and self.inverse.target is not None:
            raise QueryError(
                "target parameters are entries of whole gradients, and this curvature is one of projected ones",
                expected="a curvature of whole gradients, such as MatrixFree() or EKFAC()",
                found=f"the curvature {found.name!r} of gradients projected by {stage.projection}",
                hint="pass another curvature=, or take InfluenceFunction() without target parameters",
            )
        if inner is None:
            return [Term(found.at, found.at, names, lambda v: self.solved(stage, found, v, damping))]
        within = replace(found, curvature=inner)
        return [Term(found.at, found.at, names, stored_transform=lambda v: self.solved(stage, within, v, damping))]

    def recorded(self, stage: Stage) -> RecordedCurvature:
        """The curvature, read or estimated once for a store."""
        source, store = self.source, stage.store
        files = (*store.artifacts("weights"), *store.artifacts("curvature"))
        key: tuple[Any, ...] = (str(store.root), *(file.sha256 for file in files))
        if isinstance(source, CurvatureStatistics):  # estimated of what is asked about, with the model at hand
            key = (*key, stage.stored, id(stage.module))
        if key not in self._known:
            if isinstance(source, CurvatureStatistics):
                found = self._estimated(stage, source)
            else:
                found = recorded_curvature(store, source)
            _warn_if_half_trained(found)
            _warn_of_other_uses(stage, found)
            self._known = {key: found}
        return self._known[key]

    def damping_of(self, stage: Stage, found: RecordedCurvature) -> Damping:
        """The damping, chosen or given.

        Raises:
            QueryError: `"auto"`, and nothing was chosen for this store and curvature.
        """
        if self.damping != "auto":
            return self.damping
        chosen = stage.store.manifest.facts.get("damping")
        value = chosen.get(found.name) if isinstance(chosen, dict) else None
        if not isinstance(value, dict):
            raise QueryError(
                f"no damping has been chosen for the curvature {found.name!r} of this store",
                expected="a finished influence.choose_damping(val_loader)",
                found=f"choices for {', '.join(chosen) if isinstance(chosen, dict) and chosen else 'none'}",
                hint="call influence.choose_damping(val_loader) once, on an InfluenceModule(..., train_loader=...), or "
                "pass damping=None for the default of a tenth of the mean eigenvalue",
            )
        return Damping.from_record(value)

    def labels_for(self, statistics: CurvatureStatistics) -> Labels | None:
        """Over which labels statistics are estimated when they are needed; `None` lets the loss choose.

        Raises:
            CurvatureError: labels that these statistics have no use for.
        """
        refuse_labels(statistics, self._labels)
        return self._labels or ("observed" if statistics.from_stored else None)

    def chosen(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """Of the parameters those that `parameters=` names.

        Raises:
            QueryError: a glob that names none.
        """
        return _chosen(known, self._globs)

    def solved(self, stage: Stage, found: RecordedCurvature, v: Gradients, damping: Damping) -> Gradients:
        """T v = (H + λI)⁻¹ v, at the weights that the curvature belongs to where it needs the model."""
        with stage.at(found.at) if found.curvature.needs_model else nullcontext():
            return self.inverse.transposed(found.curvature, v, damping)

    def change(self, stage: Stage, found: RecordedCurvature, g: Gradients, damping: Damping) -> Gradients:
        """Tᵀ g: how the parameters answer when gradients g leave the loss; equal to T g where T is symmetric."""
        with stage.at(found.at) if found.curvature.needs_model else nullcontext():
            return self.inverse.change(found.curvature, g, damping).change

    def _names(self, stage: Stage, found: RecordedCurvature) -> tuple[str, ...]:
        """The parameters that take part: those of the curvature whose training gradients are known, or stream by."""
        known = found.curvature.parameters
        if self.inverse.required is not None:
            self._check_required(stage, known)
        if stage.stored:
            held = stage.store.manifest.selected
            if not any(file.step == found.at.step for file in stage.store.artifacts("gradients")):
                raise QueryError(
                    f"the store holds no training gradients at step {found.at.step}, where its curvature is",
                    expected="gradients replayed at the checkpoint of the curvature",
                    found=f"gradients of {', '.join(held) or 'no parameter'} in mode {stage.store.manifest.mode!r}",
                    hint="let the training data stream by: influence.prepare(query_loader), then "
                    "Trainer().predict(influence, train_loader); or fit with GradientSnapshot(store, parameters=...)",
                )
            if self.inverse.required is not None and not set(self.inverse.required) <= set(held):
                missing = [name for name in self.inverse.required if name not in held]
                raise QueryError(
                    f"{type(self).__name__} needs training gradients that the store does not hold",
                    expected=f"gradients of {', '.join(missing)} too",
                    found=f"gradients of {', '.join(held)}",
                    hint="let the training data stream by: influence.prepare(query_loader), then "
                    "Trainer().predict(influence, train_loader); or fit with GradientSnapshot(parameters='all'); "
                    "FreezingInfluenceFunction needs the gradients of the target parameters alone",
                )
            known = tuple(name for name in known if name in held)
        if self.inverse.required is not None:
            return self.inverse.required
        names = _chosen(known, self._globs)
        if not names:
            raise QueryError(
                "curvature and training gradients share no parameter",
                expected=f"some of {', '.join(found.curvature.parameters)}",
                found=f"gradients of {', '.join(stage.store.manifest.selected) or 'none'}",
                hint="select the same parameters in CurvatureSnapshot and GradientSnapshot, or stream training data",
            )
        return names

    def _check_required(self, stage: Stage, known: Collection[str]) -> None:
        """Refuse target parameters of another model, and a curvature that lacks what is required."""
        if self.inverse.target is not None:
            self.inverse.target.check({name: spec.shape for name, spec in stage.store.manifest.parameters.items()})
            if stage.module is not None and not isinstance(self.inverse, Freezing):  # which asks about K alone
                self.inverse.target.check_trained([n for n, p in stage.module.named_parameters() if p.requires_grad])
        if missing := [name for name in self.inverse.required or () if name not in known]:
            raise QueryError(
                f"{type(self).__name__} needs a curvature of more parameters",
                expected=f"one that knows {', '.join(missing)} too",
                found=f"a curvature of {', '.join(known)}",
                hint="fit with CurvatureSnapshot(parameters='all'), or leave the curvature out: it is then multiplied "
                "from the model and its training data",
            )

    def _estimated(self, stage: Stage, statistics: CurvatureStatistics) -> RecordedCurvature:
        """The curvature of the last checkpoint, from the gradients in the store, or the model and the training data."""
        at = stage.checkpoints[-1]
        if statistics.from_stored and self._labels in (None, "observed") and (held := self._held(stage, at)):
            return self._from_store(stage, at, statistics, held)
        if stage.module is None or stage.train_loader is None:
            raise QueryError(
                f"{type(statistics).__name__} is estimated from the training data",
                expected="the module and its training data",
                found="no training data" if stage.module is not None else "no module",
                hint="pass InfluenceModule(module, store, estimator, train_loader=train_loader)",
            )
        names = self.inverse.required or _wanted(stage, self._globs)
        data = TrainingData.of(stage.train_loader, forked=True)
        decay = _decay(stage, at, names, data.batch_size)
        with stage.at(at) as module:
            evidence = TrainingEvidence(
                module,
                select(module, list(names), input_only=look_ups(stage.store)),
                data,
                labels=self.labels_for(statistics),
                seed=self._seed,
                per_sample_loss=stage.per_sample_loss,
                reduction=stage.reduction,
                decay=decay,
            )
            curvature: Curvature = statistics.collect(evidence).decayed(decay)
        return RecordedCurvature(
            curvature,
            statistics.name,
            at,
            evidence.labels,
            self._seed,
            evidence.num_samples,
            decay,
            evidence.stationarity,
            tuple(sorted(evidence.selection.input_only)),
        )

    def _held(self, stage: Stage, at: Checkpoint) -> tuple[str, ...]:
        """The parameters that take part, if the store holds all their gradients at this checkpoint; else none."""
        held = stage.store.manifest.selected
        if not any(file.step == at.step for file in stage.store.artifacts("gradients")):
            return ()
        if stage.stored or stage.module is None:
            return self.inverse.required or _chosen(held, self._globs)
        wanted = self.inverse.required or _wanted(stage, self._globs)
        return wanted if set(wanted) <= set(held) else ()

    def _from_store(
        self, stage: Stage, at: Checkpoint, statistics: CurvatureStatistics, names: tuple[str, ...]
    ) -> RecordedCurvature:
        """The curvature from stored gradients; of projected ones, with its action on whole ones."""
        loader = stage.train_loader
        size = None if loader is None else TrainingData.of(loader, forked=True).batch_size
        decay = _decay(stage, at, names, size)
        evidence = StoredEvidence(stage.store, at, names)
        curvature = statistics.collect(evidence).decayed(decay)
        if evidence.projection is not None:
            curvature = ProjectedCurvature(curvature, evidence.projection, evidence.shapes)
        return RecordedCurvature(
            curvature,
            statistics.name,
            at,
            "observed",
            self._seed,
            evidence.num_samples,
            decay,
            None,
            look_ups(stage.store),
        )


def _decay(stage: Stage, at: Checkpoint, names: tuple[str, ...], batch_size: int | None) -> dict[str, float]:
    """Weight decay at a checkpoint, in the units of the mean loss, by parameter name.

    Raises:
        QueryError: a loss that sums over batches whose size is not known.
    """
    decay = weight_decay_at(stage.store, at, names)
    if not decay or stage.reduction == "mean":
        return decay
    if batch_size is None:
        raise QueryError(
            "training_step sums the losses of a batch: how much weight decay weighs depends on the batch size",
            expected="the training data",
            found="none",
            hint="pass InfluenceModule(module, store, estimator, train_loader=train_loader)",
        )
    return weight_decay_at(stage.store, at, names, summed_over=batch_size)


def _wanted(stage: Stage, globs: Sequence[str] | None) -> tuple[str, ...]:
    """The parameters of a curvature that is estimated now: those that the store holds, or all that are trained."""
    assert stage.module is not None
    held = stage.store.manifest.selected
    known = held if stage.stored and held else tuple(n for n, p in stage.module.named_parameters() if p.requires_grad)
    return _chosen(known, globs)


def _chosen(known: tuple[str, ...], globs: Sequence[str] | None) -> tuple[str, ...]:
    """Those of the known parameters that the globs name; a QueryError for a glob that names none."""
    if globs is None:
        return known
    found = {glob: meant(glob, known) for glob in globs}
    if unmatched := [glob for glob, names in found.items() if not names]:
        raise QueryError(
            f"InfluenceFunction(parameters=...) names what is not known here: {', '.join(unmatched)}",
            expected=f"globs over {', '.join(known) or 'no parameter'}",
            found=", ".join(unmatched),
            hint="select these parameters in both GradientSnapshot and CurvatureSnapshot, or leave them out here",
        )
    return tuple(name for name in known if any(name in names for names in found.values()))


def _warn_if_half_trained(found: RecordedCurvature) -> None:
    look = found.stationarity
    if look is None or look.excess <= _FAR_FROM_STATIONARY:
        return
    rank_zero_warn(
        f"The model was far from a stationary point at step {found.at.step}: the mean gradient of its training loss "
        f"has norm {look.mean_gradient:.3g}, beside {look.sample_gradient:.3g} for a single sample ({look.num_samples} "
        "samples looked at). Influence functions assume a mean gradient near 0. HINT: train longer, or use TracIn."
    )


def _warn_of_other_uses(stage: Stage, found: RecordedCurvature) -> None:
    """Say so where gradients are of an embedding's look-ups alone and the curvature of its tied head too, or the other
    way round."""
    if stage.module is None:
        return
    names = set(look_ups(stage.store)).symmetric_difference(found.look_ups) & set(found.curvature.parameters)
    for name in sorted(names):
        if all(isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) for layer in select(stage.module, name).layers):
            continue  # tied to nothing: its look-ups are all there is
        alone, both = ("curvature", "gradients") if name in found.look_ups else ("gradients", "curvature")
        rank_zero_warn(
            f"{name!r} is tied: the {alone} of this store are of its look-ups alone, the {both} of its other uses too, "
            "so that scores are neither those of the one nor of the other. HINT: select 'word_embeddings' in both "
            "GradientSnapshot and CurvatureSnapshot, or in neither."
        )
