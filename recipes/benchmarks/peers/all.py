"""Every peer that is asked, in the order of the scoreboard."""

from __future__ import annotations

from recipes.benchmarks.peers import captum, dattri, kronfluence, trak
from recipes.benchmarks.peers.asked import Peer


def peers() -> list[Peer]:
    """The peers; none of their libraries is imported before it is asked."""
    return [*kronfluence.peers(), *captum.peers(), *trak.peers(), *dattri.peers()]
