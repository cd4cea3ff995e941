"""Scoring without stored gradients: queries are prepared once, and the training data stream past them."""

from lightning_influence.streaming.prepared import Prepared, batches_of, prepare
from lightning_influence.streaming.score_file import read_scores
from lightning_influence.streaming.stream import TrainingStream

__all__ = ["Prepared", "TrainingStream", "batches_of", "prepare", "read_scores"]
