"""Stages: how one training run continues another, and what that makes of the influence of the first one's samples."""

from lightning_influence.stages.lineage import ancestors, link_of, parent_of
from lightning_influence.stages.matching import Match, SharedNames, checksums, compared, matched
from lightning_influence.stages.pull_back import Answer, Link, Proximity, SmallProximity, Source, Trained, pulled_back
from lightning_influence.stages.travel import Held, goes_along_the_gradient, held_by_training, step_length

__all__ = [
    "Answer",
    "Held",
    "Link",
    "Match",
    "Proximity",
    "SharedNames",
    "SmallProximity",
    "Source",
    "Trained",
    "ancestors",
    "checksums",
    "compared",
    "goes_along_the_gradient",
    "held_by_training",
    "link_of",
    "matched",
    "parent_of",
    "pulled_back",
    "step_length",
]
