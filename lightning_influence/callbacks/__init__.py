"""Lightning callbacks that write the artifacts of a training run and leave the training itself bit-identical."""

from lightning_influence.callbacks.curvature_snapshot import CurvatureSnapshot
from lightning_influence.callbacks.gradient_snapshot import GradientSnapshot
from lightning_influence.callbacks.stage_linker import StageLinker

__all__ = ["CurvatureSnapshot", "GradientSnapshot", "StageLinker"]
