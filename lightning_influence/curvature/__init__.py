"""Curvature at trained weights: how it is estimated from a training set, multiplied with vectors, inverted and kept."""

from lightning_influence.curvature.block_diagonal import BlockDiagonal, CurvatureBlock
from lightning_influence.curvature.curvature import Accumulator, Curvature, CurvatureStatistics, Evidence, OnePass
from lightning_influence.curvature.damping import Absolute, Damping, Relative, as_damping
from lightning_influence.curvature.data_inf import DataInf, DataInfCurvature
from lightning_influence.curvature.dense import Dense
from lightning_influence.curvature.diagonal import Diagonal
from lightning_influence.curvature.evidence import Stationarity, TrainingEvidence
from lightning_influence.curvature.kronecker import EKFAC, KFAC
from lightning_influence.curvature.low_rank import LowRank, LowRankCurvature
from lightning_influence.curvature.matrix_free import MatrixFree, MatrixFreeCurvature
from lightning_influence.curvature.operators import LossOperator
from lightning_influence.curvature.partial_inverse import (
    Answer,
    Freezing,
    Generalized,
    PartialInverse,
    Projected,
    SecondOrder,
    Solver,
    Whole,
)
from lightning_influence.curvature.projected import ProjectedCurvature, ProjectedGram
from lightning_influence.curvature.recording import (
    RecordedCurvature,
    is_decoupled,
    recorded_curvature,
    refuse_labels,
    statistics_of,
    weight_decay,
    weight_decay_at,
    write_curvature,
)
from lightning_influence.curvature.stored import StoredEvidence, stored_projection

__all__ = [
    "EKFAC",
    "KFAC",
    "Absolute",
    "Accumulator",
    "Answer",
    "BlockDiagonal",
    "Curvature",
    "CurvatureBlock",
    "CurvatureStatistics",
    "Damping",
    "DataInf",
    "DataInfCurvature",
    "Dense",
    "Diagonal",
    "Evidence",
    "Freezing",
    "Generalized",
    "LossOperator",
    "LowRank",
    "LowRankCurvature",
    "MatrixFree",
    "MatrixFreeCurvature",
    "OnePass",
    "PartialInverse",
    "Projected",
    "ProjectedCurvature",
    "ProjectedGram",
    "RecordedCurvature",
    "Relative",
    "SecondOrder",
    "Solver",
    "Stationarity",
    "StoredEvidence",
    "TrainingEvidence",
    "Whole",
    "as_damping",
    "is_decoupled",
    "recorded_curvature",
    "refuse_labels",
    "statistics_of",
    "stored_projection",
    "weight_decay",
    "weight_decay_at",
    "write_curvature",
]
