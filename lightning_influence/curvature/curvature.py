"""What a curvature is: H at some weights as a linear map on gradients, how it is solved, and how it is estimated.

    H = (1/N) sum over n of the curvature of l(z_n), and the weight decay of the optimizer on its diagonal

Vectors are `Gradients`: parameter name to a block of Q rows, one row a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor

from lightning_influence.curvature.damping import Damping
from lightning_influence.errors import CurvatureError
from lightning_influence.gradients import Gradients, Projection, Selection

if TYPE_CHECKING:
    from lightning_influence.curvature.operators import LossOperator


class Curvature(ABC):
    """A symmetric matrix H over named parameters, in whatever form is small."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[Curvature]]] = {}
    needs_model: bool = False  # products and solves run the model, at the weights that H belongs to

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" in cls.__dict__:
            Curvature.kinds[cls.kind] = cls

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Full names of the parameters that H is about."""

    @abstractmethod
    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """H[rows, columns] v, undamped.

        Args:
            v: vectors (Q, *shape) of the parameters `columns`; those that it lacks count as zero.
            rows: parameters of the result; `None` is those of v.
            columns: parameters of v that are used; `None` is all.

        Raises:
            CurvatureError: rows and columns that this structure does not connect, by name.
        """

    @abstractmethod
    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """(H + λI)⁻¹ v; nothing that is cached changes.

        Raises:
            CurvatureError: H + λI is singular or (where that is asked for) not positive; a parameter is missing in v.
        """

    def connected(self, names: Collection[str]) -> tuple[str, ...]:
        """The rows that can have entries in the columns `names`, in the order of `parameters`."""
        return self.parameters

    def shifts(self, damping: Damping) -> Mapping[str, float]:
        """λ of every parameter, as `solve` adds it to the diagonal.

        Raises:
            CurvatureError: an inverse that is not that of H + λI.
        """
        raise CurvatureError(
            f"{type(self).__name__} has no inverse on a part of its parameters",
            expected="a curvature of whole gradients, such as MatrixFree(), curvature.Dense(), LowRank() or EKFAC()",
            found=type(self).__name__,
            hint="pass another curvature=, or take InfluenceFunction()",
        )

    @abstractmethod
    def decayed(self, decay: Mapping[str, float]) -> Curvature:
        """H with weight decay, by parameter name, on its diagonal."""

    def within(self, projection: Projection) -> Curvature | None:
        """The curvature as it acts on gradients that were projected so; `None` if it acts on whole gradients alone."""
        return None

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors, and the plain JSON beside them, from which `load` makes the curvature again."""

    @classmethod
    @abstractmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Curvature:
        """The curvature whose `state` these are."""

    def _chosen(self, v: Gradients, columns: Collection[str] | None) -> Gradients:
        """The part of v that is used.

        Raises:
            CurvatureError: a parameter that H knows nothing of.
        """
        chosen = {name: block for name, block in v.items() if columns is None or name in columns}
        unknown = [name for name in (*chosen, *(columns or ())) if name not in self.parameters]
        if unknown:
            raise self._unknown(unknown)
        return chosen

    def _wanted(self, chosen: Gradients, rows: Collection[str] | None) -> tuple[str, ...]:
        """The rows of a product: those asked for, or those of the vectors.

        Raises:
            CurvatureError: a parameter that H knows nothing of.
        """
        wanted = tuple(chosen) if rows is None else tuple(rows)
        if unknown := [name for name in wanted if name not in self.parameters]:
            raise self._unknown(unknown)
        return wanted

    def _unknown(self, names: Collection[str]) -> CurvatureError:
        return CurvatureError(
            f"the curvature holds nothing for {', '.join(map(repr, names))}",
            expected=f"some of {', '.join(self.parameters)}",
            found=", ".join(names),
            hint="select these parameters in CurvatureSnapshot(parameters=...), or leave them out of the estimator",
        )


class Evidence(Protocol):
    """What statistics are estimated from: a training set walked at fixed weights, shared among processes."""

    @property
    def selection(self) -> Selection:
        """The parameters that the curvature is about."""

    @property
    def num_samples(self) -> int:
        """Samples that are walked, of all processes together."""

    def visit(self, draw: int, batch: Callable[[Iterator[Gradients]], None]) -> None:
        """Call `batch` with the columns of every batch of this process: per-sample gradients, in factored form, whose
        outer products summed over the columns are (or are, on average over the labels) the Fisher information of each
        sample.

        Args:
            draw: number of the pass; sampled labels are drawn afresh for each.
        """

    def operator(self, matrix: Literal["hessian", "ggn"]) -> LossOperator:
        """Products with the exact Hessian or Gauss–Newton matrix of the mean loss."""

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The tensor of process zero, in place."""


class CurvatureStatistics(ABC):
    """How a curvature is estimated. The objects hold settings only, so that one serves many snapshots.

    Attributes:
        name: what its artifacts are called in a store.
        from_stored: whether the gradients of the given labels that a store holds are enough to estimate it.
    """

    name: ClassVar[str]

    @property
    def uses_labels(self) -> bool:
        """Whether the estimate is taken over labels; if not, it is made of products with exact second derivatives."""
        return True

    from_stored: ClassVar[bool] = False

    @property
    def has_shifts(self) -> bool:
        """Whether the inverse of what is collected from a model is that of H + λI (see `Curvature.shifts`)."""
        return True

    @property
    def stands_for(self) -> Literal["hessian", "ggn"]:
        """The matrix of exact products (`Evidence.operator`) that this estimates: in place of the Fisher information it
        is the Gauss–Newton matrix, equal to it where labels are exact."""
        return "ggn"

    @abstractmethod
    def collect(self, evidence: Evidence) -> Curvature:
        """The curvature of the mean loss over the evidence, without weight decay.

        Raises:
            CurvatureError: a layer that it does not serve, values that are NaN or infinite.
        """

    def settings(self) -> dict[str, Any]:
        """The settings as plain JSON, for the record."""
        return dict(vars(self))


class Accumulator(ABC):
    """A curvature that grows by batches."""

    @abstractmethod
    def update(self, columns: Iterator[Gradients]) -> None:
        """Add a batch, given by its columns."""

    @abstractmethod
    def finish(self, evidence: Evidence, num_samples: int) -> Curvature:
        """The curvature of what was added in all processes, `num_samples` together."""


def nothing_seen() -> CurvatureError:
    """The error of statistics that were given no batch."""
    return CurvatureError(
        "there is nothing to estimate a curvature from",
        expected="at least one batch in every process",
        found="none",
        hint="use fewer processes, or a larger part of the training set",
    )


class OnePass(CurvatureStatistics):
    """Statistics that see every batch once, and so can be summed while a model trains."""

    @abstractmethod
    def accumulator(self, selection: Selection) -> Accumulator:
        """Sums that grow by batches."""

    def collect(self, evidence: Evidence) -> Curvature:
        """The curvature of one walk over the evidence."""
        sums = self.accumulator(evidence.selection)
        evidence.visit(0, sums.update)
        return sums.finish(evidence, evidence.num_samples)
