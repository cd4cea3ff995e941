"""How good an attribution is: metrics in the manner of torchmetrics, plain tensors in and numbers out."""

from lightning_influence.metrics.cancellation import CancellationRatio, cancellation_ratio
from lightning_influence.metrics.ceiling import NoiseCeiling, noise_ceiling
from lightning_influence.metrics.checks import Ids
from lightning_influence.metrics.classes import ClassDetection, ClassesFound, class_detection
from lightning_influence.metrics.deletion import CaseDeletion, Deletion, case_deletion
from lightning_influence.metrics.intervals import Comparison, QueryMean, difference, query_mean, ratio
from lightning_influence.metrics.lds import (
    LDS,
    LinearDatamodelingScore,
    linear_datamodeling_score,
    mean_over_models,
)
from lightning_influence.metrics.leave_one_out import LeaveOneOut, LeaveOneOutCorrelation, leave_one_out_correlation
from lightning_influence.metrics.mislabel import MislabelDetection, MislabelsFound, RecallAt, mislabel_detection
from lightning_influence.metrics.noise import NoiseDetectionRate, NoiseFound, noise_detection_rate
from lightning_influence.metrics.ranks import spearman
from lightning_influence.metrics.retrieval import ProponentRetrieval, Retrieved, proponent_retrieval
from lightning_influence.metrics.same_class import SameClass, SameClassRate, same_class_rate
from lightning_influence.metrics.stability import RankStability, Stability, rank_stability

__all__ = [
    "LDS",
    "CancellationRatio",
    "CaseDeletion",
    "ClassDetection",
    "ClassesFound",
    "Comparison",
    "Deletion",
    "Ids",
    "LeaveOneOut",
    "LeaveOneOutCorrelation",
    "LinearDatamodelingScore",
    "MislabelDetection",
    "MislabelsFound",
    "NoiseCeiling",
    "NoiseDetectionRate",
    "NoiseFound",
    "ProponentRetrieval",
    "QueryMean",
    "RankStability",
    "RecallAt",
    "Retrieved",
    "SameClass",
    "SameClassRate",
    "Stability",
    "cancellation_ratio",
    "case_deletion",
    "class_detection",
    "difference",
    "leave_one_out_correlation",
    "linear_datamodeling_score",
    "mean_over_models",
    "mislabel_detection",
    "noise_ceiling",
    "noise_detection_rate",
    "proponent_retrieval",
    "query_mean",
    "rank_stability",
    "ratio",
    "same_class_rate",
    "spearman",
]
