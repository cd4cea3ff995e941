"""Which layer's gradients should be trusted here: one run's scores layer by layer, judged by what is cheap to know."""

from lightning_influence.layer_comparison.comparing import compare_layers
from lightning_influence.layer_comparison.removal_truth import RemovalTruth
from lightning_influence.layer_comparison.results import JudgedScores, LayerComparison, LayerResult, ShortTrainings

__all__ = ["JudgedScores", "LayerComparison", "LayerResult", "RemovalTruth", "ShortTrainings", "compare_layers"]
