"""The parameters of layers without a product form: a whole matrix where they are few, else their diagonal."""

from __future__ import annotations

from lightning_influence.curvature.block_diagonal import CurvatureBlock
from lightning_influence.curvature.curvature import Evidence
from lightning_influence.curvature.dense import OuterSums
from lightning_influence.curvature.diagonal import SquareSums
from lightning_influence.curvature.layout import LayerBlock
from lightning_influence.gradients import Gradients


class WholeSums:
    """What is summed for such a layer in the first pass.

    Args:
        block: its parameters.
        exact_up_to: number of weights up to which they get a matrix.
    """

    def __init__(self, block: LayerBlock, exact_up_to: int) -> None:
        self.exact = block.numel <= exact_up_to
        self._sums: OuterSums | SquareSums = OuterSums(block.names) if self.exact else SquareSums(block.names)

    def add_column(self, gradients: Gradients) -> None:
        """Add a column."""
        self._sums.add(gradients)

    def end_batch(self, gradients: Gradients) -> None:
        """Nothing is counted by batches."""

    def blocks(self, evidence: Evidence, num_samples: int) -> list[CurvatureBlock]:
        """The curvature of these parameters."""
        if isinstance(self._sums, OuterSums):
            return [self._sums.block(evidence, num_samples)]
        return list(self._sums.blocks(evidence, num_samples))
