"""Which position of the training set each sample of a batch has, by what a dataset is recognised again."""

from __future__ import annotations

from lightning_influence.samples.identity import fingerprint
from lightning_influence.samples.tracking import SampleId, SampleTracker

__all__ = ["SampleId", "SampleTracker", "fingerprint"]
