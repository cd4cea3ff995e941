"""A query pulled back through a finetuning run: from its gradient there to that of the weights that the run began from.

Finetuning trained y = (W_t, Θ): shared parameters that it tuned, and new ones; shared parameters W_f stayed frozen.
With F its loss and m the query, a change of the weights that it began from changes m by the gradient (Chen et al. 2020,
2007.09081, for all shared parameters frozen, or all tuned)

    v_{W_f} = ∇_{W_f} m − ∇²_{W_f y}F x,       v_{W_t} = h

    Proximity       min F + α‖W_t − W_t*‖²         x = (∇²_yy F + 2α E_{W_t})⁻¹ ∇_y m,   h = 2α x_{W_t}
    SmallProximity  its limit, 2α left out         x = (∇²_yy F)⁻¹ ∇_y m,                h = x_{W_t}
    Source          gradient flow, A = ηK ∇²_yy F  x = ηK (1 − e^(−A))/A ∇_y m,          h = [e^(−A) ∇_y m]_{W_t}

(`Source` is the segment of Bae et al. 2024, 2405.12186, in place of the proximal model.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_influence.curvature import Curvature, Damping
from lightning_influence.curvature.block_diagonal import BlockDiagonal
from lightning_influence.curvature.matrix_free import solving_bar
from lightning_influence.curvature.matrix_function import exponential, matrix_function, saturated
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.curvature.solvers import minres
from lightning_influence.errors import QueryError
from lightning_influence.gradients import Dense, GradientBlock, Gradients
from lightning_influence.stages.travel import Held

_MOST_STEPS = 2000


class Link(ABC):
    """How finetuning answers when the weights that it began from are others."""

    #: Whether pulled-back gradients are those of m, so that amounts can be told; otherwise they only rank.
    amounts: bool = True

    @abstractmethod
    def answer(self, trained: Trained, v: Gradients) -> Answer:
        """x and h for gradients v = ∇_y m, (Q, *shape) of parameters of the curvature."""

    @property
    def alpha(self) -> float | None:
        """α where it was given."""
        return None

    def held_names(self, trained: Collection[str], tuned: Collection[str]) -> Collection[str]:
        """The parameters of which `held` must be known."""
        return tuned


@dataclass(frozen=True)
class Trained:
    """What finetuning trained.

    Attributes:
        curvature: ∇²_yy F, weight decay included.
        damping: λ, added to it (not by `Source`, which needs none).
        held: 2α of every tuned shared parameter; for `Source` 1/(ηK) of all of y.
        tuned: W_t.
    """

    curvature: Curvature
    damping: Damping
    held: Held
    tuned: Collection[str]


@dataclass(frozen=True)
class Answer:
    """What finetuning does with a gradient.

    Attributes:
        moved: x, by which the trained parameters answer.
        kept: h, what arrives at the start of the tuned shared parameters.
    """

    moved: Gradients
    kept: Gradients


class Proximity(Link):
    """Finetuning as min F + α‖W − W*‖² over the tuned shared parameters W, and over the new ones freely.

    Args:
        alpha: α, in units of the mean loss over squared weights; `None` takes 2α = 1/(ηK) of the run itself, ηK the sum
            of its learning rates, over 1 − β under momentum, and 2α_i = (√v̂_i+ε)/Σ_t η_t entry by entry under Adam.

    Raises:
        QueryError: an α that is no positive number.
    """

    def __init__(self, alpha: float | None = None) -> None:
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if alpha is not None and not (number and 0 < alpha < float("inf")):
            raise QueryError(
                "this is no proximity",
                expected="a positive number, or None for that of the run",
                found=repr(alpha),
                hint="a parameter that stayed where it was is not held, but frozen: the link knows those by itself",
            )
        self._alpha = None if alpha is None else float(alpha)

    @property
    def alpha(self) -> float | None:
        """α where it was given."""
        return self._alpha

    def answer(self, trained: Trained, v: Gradients) -> Answer:
        """(∇²F + λ + 2αE)⁻¹ v, and 2α times its shared part."""
        x, held = _solved(trained, v, trained.held), trained.held
        return Answer(x, {name: _times(x[name], held[name]) for name in trained.tuned if name in x})

    def __repr__(self) -> str:
        return f"Proximity({'' if self._alpha is None else self._alpha})"


class SmallProximity(Link):
    """The ranking that `Proximity` tends to as α → 0, 2α left out: its scores are no amounts. Where a part of the
    shared parameters stayed frozen, that part alone is the limit. With EK-FAC at both
    stages this is ∇mᵀ H_ft⁻¹ H_pt⁻¹ ∇ℓ, in which parameters that are not shared drop out."""

    amounts = False

    def answer(self, trained: Trained, v: Gradients) -> Answer:
        """(∇²F + λ)⁻¹ v, and its shared part."""
        x = _solved(trained, v, {})
        return Answer(x, {name: x[name] for name in trained.tuned if name in x})

    def held_names(self, trained: Collection[str], tuned: Collection[str]) -> Collection[str]:
        """None."""
        return ()

    def __repr__(self) -> str:
        return "SmallProximity()"


class Source(Link):
    """Finetuning as gradient flow for as long as the run went, 1/ηK of every trained parameter in the place of 2α: what
    stops early keeps e^(−ηKσ) of its start. A damping is not added: what it is for, the end of training does."""

    def answer(self, trained: Trained, v: Gradients) -> Answer:
        """With P = diag(1/ηK) and A = P^(−1/2) H P^(−1/2): x = P^(−1/2) (1 − e^(−A))/A P^(−1/2) v and
        h = P^(1/2) e^(−A) P^(−1/2) v."""
        space = ParameterSpace({name: tuple(v[name].shape) for name in v})
        flat = space.rows(v, torch.empty(0, dtype=torch.float32))
        root = _diagonal(space, trained.held, flat).sqrt()

        def product(rows: Tensor) -> Tensor:
            out = trained.curvature.matvec(space.named(rows / root, space.names, v), rows=space.names)
            return space.rows(out, rows).to(rows) / root

        with solving_bar("Lanczos' process", "product") as progress:
            (flown, kept), converged = matrix_function(
                product, flat / root, (saturated, exponential), tolerance=_tolerance(flat), progress=progress
            )
        if not converged:
            rank_zero_warn(
                "exp(−ηK H) of the finetuning run has not converged: its answers are approximate. HINT: ηK times the "
                "largest curvature is huge; take link=Proximity()."
            )
        h = space.named(kept * root, [name for name in space.names if name in trained.tuned], v)
        return Answer(space.named(flown / root, space.names, v), h)

    def held_names(self, trained: Collection[str], tuned: Collection[str]) -> Collection[str]:
        """All that were trained."""
        return trained

    def __repr__(self) -> str:
        return "Source()"


def pulled_back(
    v: Gradients,
    answer: Answer,
    shared: Mapping[str, str],
    frozen: Collection[str],
    through: Gradients,
) -> dict[str, GradientBlock]:
    """The gradient of m with respect to the weights that finetuning began from, by the earlier run's names.

    Args:
        v: ∇m of the frozen shared parameters, and of others that do not matter here.
        answer: of the trained ones.
        shared: finetuning's names -> the earlier run's. Several that come from one add up.
        frozen: those of them that stayed where they were.
        through: ∇²_{W_f y}F x; where it is missing it counts as 0.
    """
    found: dict[str, GradientBlock] = {}
    for name, earlier in shared.items():
        if name in frozen:
            block = v[name]
            if name in through:
                block = Dense(block.dense() - through[name].dense().to(block.dense()))
        elif name in answer.kept:
            block = answer.kept[name]
        else:
            continue
        if earlier in found:  # tied there, untied here
            block = Dense(found[earlier].dense() + block.dense().to(found[earlier].device))
        found[earlier] = block
    return found


def _solved(trained: Trained, v: Gradients, held: Held) -> Gradients:
    """(H + λI + diag(held))⁻¹ v: by the curvature's own means where what holds is one number a block."""
    if not v:
        return {}
    curvature, damping = trained.curvature, trained.damping
    numbers = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
    whole = _in_whole_blocks(curvature, v)
    if len(numbers) == len(held) and whole and _alike(curvature, numbers):
        return curvature.decayed(numbers).solve(v, damping)
    shifts = curvature.shifts(damping)
    space = ParameterSpace({name: tuple(v[name].shape) for name in v})
    b = space.rows(v, torch.empty(0, dtype=torch.float32))
    diagonal = _diagonal(space, held, b) + space.diagonal(shifts, b)

    def product(rows: Tensor) -> Tensor:
        out = curvature.matvec(space.named(rows, space.names, v), rows=space.names)
        return space.rows(out, rows).to(rows) + diagonal * rows

    means = {name: float(value.mean()) if isinstance(value, Tensor) else value for name, value in held.items()}
    nearby = curvature.decayed(means) if whole and not curvature.needs_model else None

    def preconditioned(rows: Tensor) -> Tensor:
        assert nearby is not None
        return space.rows(nearby.solve(space.named(rows, space.names, v), damping), rows).to(rows)

    with solving_bar("minres", "product") as progress:
        found = minres(
            product, b, tolerance=_tolerance(b), max_iterations=_MOST_STEPS, progress=progress,
            preconditioner=None if nearby is None else preconditioned,
        )  # fmt: skip
    if not found.converged:
        rank_zero_warn(
            f"the answer of the finetuning run did not converge: relative residual {float(found.residual.max()):.1e} "
            f"after {found.iterations} steps. HINT: damp more: "
            "MultiStage(..., finetuned=InfluenceFunction(damping=...))."
        )
    return space.named(found.x, space.names, v)


def _in_whole_blocks(curvature: Curvature, v: Gradients) -> bool:
    """Whether v has all parameters of each block that it has some of, so that a closed form takes it."""
    if not isinstance(curvature, BlockDiagonal):
        return set(v) == set(curvature.parameters)
    return all(len({name in v for name in block.names}) == 1 for block in curvature.blocks)


def _alike(curvature: Curvature, held: Mapping[str, float]) -> bool:
    """Whether each block can take up what holds its parameters, so that it has a closed form."""
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else ()
    return all(not b.decays_as_one or len({held.get(name, 0.0) for name in b.names}) == 1 for b in blocks)


def _diagonal(space: ParameterSpace, held: Held, like: Tensor) -> Tensor:
    """`held` end to end, 0 where nothing holds."""
    diagonal = like.new_zeros(space.size)
    for name, span in space.spans():
        value = held.get(name, 0.0)
        diagonal[span] = value.reshape(-1).to(diagonal) if isinstance(value, Tensor) else value
    return diagonal


def _times(block: GradientBlock, held: float | Tensor) -> GradientBlock:
    if isinstance(held, Tensor):
        return block.multiplied(held.to(block.device, block.dtype))
    return block.scaled(torch.full((block.num_samples,), held, dtype=block.dtype, device=block.device))


def _tolerance(like: Tensor) -> float:
    return 1e-4 if like.dtype == torch.float32 else 1e-10
