"""Per-sample gradients: selecting parameters, capturing their gradients, and the blocks that hold them."""

from lightning_influence.gradients.blocks import Dense, GradientBlock, Gradients, accumulation_dtype
from lightning_influence.gradients.by_parameter import cat, inner, pack, unpack
from lightning_influence.gradients.capture import GradientCapture
from lightning_influence.gradients.factored import Factored
from lightning_influence.gradients.low_rank import LowRankGradients
from lightning_influence.gradients.projection import FactorProjection, Projection, RandomProjection
from lightning_influence.gradients.rows import Rows
from lightning_influence.gradients.rules import LayerCall, gradient_rule
from lightning_influence.gradients.selection import Selection, meant, select, word_embeddings
from lightning_influence.gradients.target import LayerShare, TargetParameters, chosen_units

__all__ = [
    "Dense",
    "FactorProjection",
    "Factored",
    "GradientBlock",
    "GradientCapture",
    "Gradients",
    "LayerCall",
    "LayerShare",
    "LowRankGradients",
    "Projection",
    "RandomProjection",
    "Rows",
    "Selection",
    "TargetParameters",
    "accumulation_dtype",
    "cat",
    "chosen_units",
    "gradient_rule",
    "inner",
    "meant",
    "pack",
    "select",
    "unpack",
    "word_embeddings",
]
