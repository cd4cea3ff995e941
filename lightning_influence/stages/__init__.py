"""Stages: how one training run continues another, and what that makes of the influence of the first one's samples."""

from lightning_influence.stages.lineage import ancestors, link_of, parent_of
from lightning_influence.stages.matching import Match, SharedNames, checksum, compared, matched
from lightning_influence.stages.pull_back import Answer, Link, Proximity, SmallProximity, Source, Trained, pulled_back
from lightning_influence.stages.travel import Held, held_by_training, travelled

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
    "checksum",
    "compared",
    "held_by_training",
    "link_of",
    "matched",
    "parent_of",
    "pulled_back",
    "travelled",
]
