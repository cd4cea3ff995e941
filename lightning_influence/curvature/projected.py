"""Curvature in the space of projected gradients: their Gram matrix, and its action on whole gradients."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_influence.curvature.block_diagonal import BlockDiagonal
from lightning_influence.curvature.curvature import Accumulator, Curvature, Evidence, OnePass, nothing_seen
from lightning_influence.curvature.damping import Damping
from lightning_influence.curvature.dense import OuterSums
from lightning_influence.curvature.layout import by_layer
from lightning_influence.curvature.stored import StoredEvidence
from lightning_influence.errors import CurvatureError, StoreError
from lightning_influence.gradients import Gradients, Projection, Selection


class ProjectedCurvature(Curvature):
    """A curvature of projected gradients, as it acts on whole ones: (H + λI)⁻¹ v becomes Pᵀ (H_P + λI)⁻¹ P v.

    Args:
        inner: H_P.
        projection: P.
        shapes: of the parameters, before the projection.
    """

    kind = "projected"

    def __init__(self, inner: Curvature, projection: Projection, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.inner, self.projection, self.shapes = inner, projection, dict(shapes)
        self.needs_model = inner.needs_model

    @property
    def parameters(self) -> tuple[str, ...]:
        """Those of the curvature of projected gradients."""
        return self.inner.parameters

    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """Pᵀ H_P P v."""
        return self._lifted(self.inner.matvec(self.projection.apply(self._chosen(v, columns)), rows))

    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """Pᵀ (H_P + λI)⁻¹ P v."""
        return self._lifted(self.inner.solve(self.projection.apply(self._chosen(v, None)), damping))

    def _lifted(self, v: Gradients) -> Gradients:
        return self.projection.lift(v, self.shapes)

    def within(self, projection: Projection) -> Curvature | None:
        """H_P, for gradients that were projected by P."""
        return self.inner if projection == self.projection else None

    def decayed(self, decay: Mapping[str, float]) -> ProjectedCurvature:
        """With weight decay on the diagonal of H_P: as inner products are kept, so are those through (H + wd I)⁻¹."""
        return ProjectedCurvature(self.inner.decayed(decay), self.projection, self.shapes)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of H_P, and the projection."""
        tensors, config = self.inner.state()
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return tensors, {
            "projection": self.projection.record(),
            "shapes": shapes,
            "inner": {"kind": self.inner.kind, **config},
        }

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> ProjectedCurvature:
        """The curvature that `state` described."""
        kind = Curvature.kinds.get(config["inner"]["kind"])
        if kind is None:
            raise StoreError(
                "a curvature of projected gradients is stored in an unknown form",
                expected=sorted(Curvature.kinds),
                found=config["inner"]["kind"],
                hint="read the store with the version of the library that wrote it",
            )
        shapes = {name: tuple(int(size) for size in shape) for name, shape in config["shapes"].items()}
        return cls(kind.load(tensors, config["inner"]), Projection.from_record(config["projection"]), shapes)


class ProjectedGram(OnePass):
    """The Gram matrix of projected training gradients (LoGra: Choe et al. 2024, 2405.13954; TRAK: 2303.14186).

        H_P = (1/N) Σ_n φ_n φ_nᵀ,    φ = P ∇ℓ

    In `InfluenceFunction(ProjectedGram())` it comes from the gradients that a store holds, projected or not, without
    any pass of the model; scores of projected stores are φ(q)ᵀ (H_P + λI)⁻¹ φ(z). Elsewhere (`CurvatureSnapshot`, or
    where training gradients stream by) it comes from the model, over any labels, and acts on whole gradients.

    Weight decay and damping are added to H_P in the units of H. A relative damping is one of trace(H_P) over the number
    of *projected* coordinates, as in LoGra: about (weights / coordinates) times that of an unprojected curvature.

    Args:
        projection: P; `None` takes the one that the store's gradients went through, or none.
        per: one matrix for each layer (weight and bias together), or one for the whole model.
        at_most: largest number of projected coordinates of a matrix.
    """

    name = "projected_gram"
    from_stored = True

    def __init__(
        self,
        projection: Projection | None = None,
        *,
        per: Literal["layer", "model"] = "layer",
        at_most: int = 8192,
    ) -> None:
        if projection is not None and not isinstance(projection, Projection):
            raise CurvatureError(
                "this is no projection",
                expected="FactorProjection(rank), RandomProjection(size) or None",
                found=repr(projection),
                hint="write ProjectedGram(FactorProjection(16)), with the brackets",
            )
        if per not in ("layer", "model"):
            raise CurvatureError(
                "unknown size of blocks", expected='"layer" or "model"', found=repr(per), hint="choose one"
            )
        self.projection, self.per, self.at_most = projection, per, at_most

    @property
    def has_shifts(self) -> bool:
        """Where nothing is projected."""
        return self.projection is None

    def settings(self) -> dict[str, Any]:
        """Projection and blocks."""
        projection = None if self.projection is None else self.projection.record()
        return {"projection": projection, "per": self.per, "at_most": self.at_most}

    def accumulator(self, selection: Selection) -> Accumulator:
        """Sums over gradients as they are captured."""
        return _Grams(self, self.projection)

    def collect(self, evidence: Evidence) -> Curvature:
        """The Gram matrix of one walk; over a projected store, of the gradients as they are.

        Raises:
            CurvatureError: a store whose gradients went through another projection; too many coordinates.
        """
        projection = self.projection
        if isinstance(evidence, StoredEvidence) and evidence.projection is not None:
            if projection not in (None, evidence.projection):
                raise CurvatureError(
                    "the gradients of this store were projected otherwise",
                    expected=f"ProjectedGram(), or {evidence.projection}",
                    found=f"{projection}",
                    hint="leave the projection out: the store's own is taken",
                )
            projection = None
        sums = _Grams(self, projection)
        evidence.visit(0, sums.update)
        return sums.finish(evidence, evidence.num_samples)


class _Grams(Accumulator):
    def __init__(self, settings: ProjectedGram, projection: Projection | None) -> None:
        self._settings, self._projection = settings, projection
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._blocks: list[OuterSums] = []

    def update(self, columns: Iterator[Gradients]) -> None:
        for gradients in columns:
            if not self._blocks:
                self._begin(gradients)
            found = gradients if self._projection is None else self._projection.apply(gradients)
            for block in self._blocks:
                block.add(found)

    def _begin(self, gradients: Gradients) -> None:
        self._shapes = {name: block.shape for name, block in gradients.items()}
        groups = (tuple(gradients),) if self._settings.per == "model" else by_layer(tuple(gradients))
        for names in groups:
            shapes = [self._shapes[name] for name in names]
            size = sum(math.prod(s if self._projection is None else self._projection.shape(s)) for s in shapes)
            if size > self._settings.at_most:
                raise CurvatureError(
                    f"the Gram matrix of {', '.join(names)} does not fit",
                    expected=f"at most {self._settings.at_most} coordinates",
                    found=f"{size}, a matrix of {size * size * 8 / 1e9:.1f} GB in float64",
                    hint="pass a projection: ProjectedGram(FactorProjection(16)), or a smaller one; or use DataInf()",
                )
        self._blocks = [OuterSums(names) for names in groups]

    def finish(self, evidence: Evidence, num_samples: int) -> Curvature:
        if not self._blocks:
            raise nothing_seen()
        inner = BlockDiagonal([block.block(evidence, num_samples) for block in self._blocks])
        return inner if self._projection is None else ProjectedCurvature(inner, self._projection, self._shapes)
