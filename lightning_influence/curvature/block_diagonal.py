"""Curvatures made of blocks that do not meet: one block a layer, each inverted by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_influence.curvature.curvature import Curvature
from lightning_influence.curvature.damping import Damping
from lightning_influence.errors import CurvatureError, StoreError
from lightning_influence.gradients import Dense, Gradients


class CurvatureBlock(ABC):
    """The curvature of a few parameters that belong together, such as a layer's weight and bias."""

    kind: ClassVar[str] = ""
    kinds: ClassVar[dict[str, type[CurvatureBlock]]] = {}
    decays_as_one: ClassVar[bool] = False  # weight decay of its first parameter counts for all

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        CurvatureBlock.kinds[cls.kind] = cls

    names: tuple[str, ...]

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the parameters, in the order of `names`."""

    @property
    @abstractmethod
    def mean_eigenvalue(self) -> float:
        """Mean of the eigenvalues, weight decay apart: the scale of a relative damping."""

    @abstractmethod
    def matvec(self, v: Gradients) -> Gradients:
        """H v for vectors of all parameters of the block."""

    @abstractmethod
    def solve(self, v: Gradients, damping: float) -> Gradients:
        """(H + λI)⁻¹ v for vectors of all parameters of the block.

        Raises:
            CurvatureError: H + λI is singular.
        """

    @abstractmethod
    def decayed(self, decay: Mapping[str, float]) -> CurvatureBlock:
        """The block with weight decay (by parameter name) on its diagonal."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain JSON for the store."""

    @classmethod
    @abstractmethod
    def load(cls, names: tuple[str, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CurvatureBlock:
        """The block whose `state` these are."""


class BlockDiagonal(Curvature):
    """H = diag(H₁, …, H_L): no curvature between the parameters of different blocks."""

    kind = "block_diagonal"

    def __init__(self, blocks: Sequence[CurvatureBlock]) -> None:
        self.blocks = tuple(blocks)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of all blocks."""
        return tuple(name for block in self.blocks for name in block.names)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all parameters."""
        return {name: shape for block in self.blocks for name, shape in block.shapes.items()}

    def matvec(
        self, v: Gradients, rows: Collection[str] | None = None, columns: Collection[str] | None = None
    ) -> Gradients:
        """H v, block by block; rows that lie in no block of a column are refused."""
        chosen = self._chosen(v, columns)
        wanted = self._wanted(chosen, rows)
        product: dict[str, Any] = {}
        for block in self.blocks:
            mine = _completed(block, chosen)
            if mine and any(name in wanted for name in block.names):
                product |= {name: part for name, part in block.matvec(mine).items() if name in wanted}
        if cross := [name for name in wanted if name not in product]:
            raise CurvatureError(
                f"this curvature has no entries between {', '.join(cross)} and {', '.join(chosen)}",
                expected="rows and columns of the same layers",
                found="layers that a block-diagonal curvature keeps apart",
                hint="take MatrixFree() or curvature.Dense(), which know all of H",
            )
        return {name: product[name] for name in wanted}

    def solve(self, v: Gradients, damping: Damping) -> Gradients:
        """(H + λI)⁻¹ v, block by block, λ of each from the damping."""
        chosen = self._chosen(v, None)
        solved: dict[str, Any] = {}
        for block in self.blocks:
            mine = _own(block, chosen)
            if mine is not None:
                solved |= block.solve(mine, damping.of(block.mean_eigenvalue))
        return {name: solved[name] for name in chosen}

    def connected(self, names: Collection[str]) -> tuple[str, ...]:
        """The parameters of the blocks in which the names are."""
        return tuple(n for block in self.blocks if any(name in names for name in block.names) for n in block.names)

    def shifts(self, damping: Damping) -> dict[str, float]:
        """λ of every parameter, by block."""
        return {name: damping.of(block.mean_eigenvalue) for block in self.blocks for name in block.names}

    def decayed(self, decay: Mapping[str, float]) -> BlockDiagonal:
        """H with weight decay (by parameter name) on its diagonal."""
        return BlockDiagonal([block.decayed(decay) for block in self.blocks])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors as `<number of the block>.<field>`."""
        tensors: dict[str, Tensor] = {}
        config: list[dict[str, Any]] = []
        for number, block in enumerate(self.blocks):
            fields, facts = block.state()
            tensors |= {f"{number}.{field}": tensor for field, tensor in fields.items()}
            config.append({"kind": block.kind, "names": list(block.names), **facts})
        return tensors, {"blocks": config}

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> BlockDiagonal:
        """The curvature that `state` described."""
        fields: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, _, field = name.partition(".")
            fields.setdefault(place, {})[field] = tensor
        blocks = []
        for number, facts in enumerate(config["blocks"]):
            kind = CurvatureBlock.kinds.get(facts["kind"])
            if kind is None:
                raise StoreError(
                    f"the curvature of {', '.join(facts['names'])} is stored in an unknown form",
                    expected=sorted(CurvatureBlock.kinds),
                    found=facts["kind"],
                    hint="read the store with the version of the library that wrote it",
                )
            blocks.append(kind.load(tuple(facts["names"]), fields.get(str(number), {}), facts))
        return cls(blocks)


def _completed(block: CurvatureBlock, v: Gradients) -> Gradients:
    """The vectors of a block's parameters, zero where v lacks some of them; empty if it lacks all."""
    some = next((v[name] for name in block.names if name in v), None)
    if some is None:
        return {}
    empty = torch.zeros((), dtype=some.dtype, device=some.device)
    zeros = {name: Dense(empty.expand(some.num_samples, *shape)) for name, shape in block.shapes.items()}
    return {name: v.get(name, zeros[name]) for name in block.names}


def _own(block: CurvatureBlock, v: Gradients) -> Gradients | None:
    """The vectors of a block's parameters, `None` if v has none of them; what v lacks of them is an error."""
    found = {name: v[name] for name in block.names if name in v}
    if found and len(found) < len(block.names):
        missing = [name for name in block.names if name not in found]
        raise CurvatureError(
            f"the curvature of {', '.join(block.names)} is one block, and only a part of it is asked for",
            expected=f"gradients of {', '.join(missing)} too",
            found=f"gradients of {', '.join(found)}",
            hint="capture weight and bias together: GradientSnapshot(parameters=...) and CurvatureSnapshot alike",
        )
    return found or None


def expect_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the stored tensors of a block have these shapes."""
    for field, shape in expected.items():
        if tuple(tensors[field].shape) != shape:
            raise ValueError(f"{field} of shape {tuple(tensors[field].shape)} where {shape} belongs")


def shifted(eigenvalues: Tensor, shift: float, names: Sequence[str]) -> Tensor:
    """Λ + shift, to divide by.

    Raises:
        CurvatureError: a divisor is zero, or indistinguishable from it by the precision of Λ; where Λ ≥ 0 any positive
            shift will do.
    """
    divisors = eigenvalues + shift
    smallest, largest = divisors.abs().min(), divisors.abs().max()
    noise = 0.0 if shift > 0 and bool(eigenvalues.min() >= 0) else torch.finfo(divisors.dtype).eps
    if not bool(smallest > noise * largest):
        zero = not bool(largest > 0)
        raise CurvatureError(
            f"the curvature of {', '.join(names)} cannot be inverted",
            expected="eigenvalues above zero after damping",
            found="all eigenvalues and the damping are 0: the layer got no gradient"
            if zero
            else f"a smallest eigenvalue of {float(smallest):.3g} beside a largest of {float(largest):.3g}",
            hint="pass a positive damping=, or leave these parameters out",
        )
    return divisors
