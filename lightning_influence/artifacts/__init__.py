"""What lies on disk: the store of weights, per-sample gradients and what was recorded beside them."""

from lightning_influence.artifacts.manifest import UNBOUNDED, Manifest, ParameterSpec
from lightning_influence.artifacts.records import Artifact, Checkpoint, ParameterGroup, StepRange
from lightning_influence.artifacts.shard import Shard
from lightning_influence.artifacts.stage_link import StageLink
from lightning_influence.artifacts.store import ArtifactStore
from lightning_influence.artifacts.writer import BackgroundWriter

__all__ = [
    "UNBOUNDED",
    "Artifact",
    "ArtifactStore",
    "BackgroundWriter",
    "Checkpoint",
    "Manifest",
    "ParameterGroup",
    "ParameterSpec",
    "Shard",
    "StageLink",
    "StepRange",
]
