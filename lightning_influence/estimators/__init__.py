"""Estimators, each of which says what enters the one bilinear form, and baselines with the same interface."""

from lightning_influence.estimators.estimator import Attributor, Estimator, Queries, ScoreBlock, Stage, Term
from lightning_influence.estimators.generalized import (
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    ProjectedInfluenceFunction,
    SecondOrderInfluenceFunction,
)
from lightning_influence.estimators.influence_function import InfluenceFunction
from lightning_influence.estimators.multi_stage import MultiStage
from lightning_influence.estimators.nearest import NearestFirst
from lightning_influence.estimators.similarity import BM25, EmbeddingCosine, Random, TfIdf
from lightning_influence.estimators.tracin import TracIn, TracInLast
from lightning_influence.estimators.tracin_we import TracInWE

__all__ = [
    "BM25",
    "Attributor",
    "EmbeddingCosine",
    "Estimator",
    "FreezingInfluenceFunction",
    "GeneralizedInfluenceFunction",
    "InfluenceFunction",
    "MultiStage",
    "NearestFirst",
    "ProjectedInfluenceFunction",
    "Queries",
    "Random",
    "ScoreBlock",
    "SecondOrderInfluenceFunction",
    "Stage",
    "Term",
    "TfIdf",
    "TracIn",
    "TracInLast",
    "TracInWE",
]
