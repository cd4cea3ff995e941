"""Lightning callbacks that write the artifacts of a training run and leave the training itself bit-identical."""

from lightning_influence.callbacks.curvature_snapshot import CurvatureSnapshot
from lightning_influence.callbacks.gradient_snapshot import GradientSnapshot

__all__ = ["CurvatureSnapshot", "GradientSnapshot"]
