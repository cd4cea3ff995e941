"""A curvature estimated from a few samples, so that what cannot work fails before the long walk and not after it."""

from __future__ import annotations

from dataclasses import replace

from lightning_influence.curvature.curvature import CurvatureStatistics
from lightning_influence.curvature.evidence import TrainingEvidence
from lightning_influence.objective import Labels


def rehearse(statistics: CurvatureStatistics, evidence: TrainingEvidence) -> tuple[int, Labels | None]:
    """Bytes that the curvature needs in a store, and over which labels it is taken, from two samples of each process.

    Raises:
        CurvatureError, CaptureError, LossError: what the whole estimate would raise.
    """
    processes = 1 if evidence.trainer is None else evidence.trainer.world_size
    few = min(evidence.num_samples, 2 * processes)
    small = replace(evidence, at_most=few, batch_size=-(-few // processes))
    tensors, _ = statistics.collect(small).state()
    return sum(tensor.nbytes for tensor in tensors.values()), small.labels
