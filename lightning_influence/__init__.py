"""Which training samples made the model do this: influence for PyTorch Lightning, from callbacks to queries."""

from lightning_influence.afterwards import add_curvature, link_checkpoint
from lightning_influence.artifacts import ArtifactStore
from lightning_influence.attribution import Attribution, Ranking
from lightning_influence.callbacks import CurvatureSnapshot, GradientSnapshot, StageLinker
from lightning_influence.curvature import (
    EKFAC,
    KFAC,
    DataInf,
    Diagonal,
    LowRank,
    MatrixFree,
    ProjectedGram,
    Relative,
    Solver,
)
from lightning_influence.damping_choice import Removals
from lightning_influence.edits import How, ModelEdit
from lightning_influence.errors import (
    CaptureError,
    CurvatureError,
    InfluenceError,
    LossError,
    MetricError,
    QueryError,
    SampleIdError,
    StoreError,
    UnsupportedError,
)
from lightning_influence.estimators import (
    BM25,
    Attributor,
    EmbeddingCosine,
    Estimator,
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    InfluenceFunction,
    MultiStage,
    NearestFirst,
    ProjectedInfluenceFunction,
    Random,
    SecondOrderInfluenceFunction,
    Stage,
    Term,
    TfIdf,
    TracIn,
    TracInLast,
    TracInWE,
)
from lightning_influence.gradients import FactorProjection, RandomProjection, TargetParameters, gradient_rule
from lightning_influence.layer_comparison import LayerComparison, LayerResult, RemovalTruth, compare_layers
from lightning_influence.mixed import MixedAttribution
from lightning_influence.module import InfluenceModule
from lightning_influence.queries import WordContribution
from lightning_influence.stages import Proximity, SmallProximity, Source
from lightning_influence.targets import choose_target, record_target, recorded_target

__version__ = "0.1.0"

__all__ = [
    "BM25",
    "EKFAC",
    "KFAC",
    "ArtifactStore",
    "Attribution",
    "Attributor",
    "CaptureError",
    "CurvatureError",
    "CurvatureSnapshot",
    "DataInf",
    "Diagonal",
    "EmbeddingCosine",
    "Estimator",
    "FactorProjection",
    "FreezingInfluenceFunction",
    "GeneralizedInfluenceFunction",
    "GradientSnapshot",
    "How",
    "InfluenceError",
    "InfluenceFunction",
    "InfluenceModule",
    "LayerComparison",
    "LayerResult",
    "LossError",
    "LowRank",
    "MatrixFree",
    "MetricError",
    "MixedAttribution",
    "ModelEdit",
    "MultiStage",
    "NearestFirst",
    "ProjectedGram",
    "ProjectedInfluenceFunction",
    "Proximity",
    "QueryError",
    "Random",
    "RandomProjection",
    "Ranking",
    "Relative",
    "RemovalTruth",
    "Removals",
    "SampleIdError",
    "SecondOrderInfluenceFunction",
    "SmallProximity",
    "Solver",
    "Source",
    "Stage",
    "StageLinker",
    "StoreError",
    "TargetParameters",
    "Term",
    "TfIdf",
    "TracIn",
    "TracInLast",
    "TracInWE",
    "UnsupportedError",
    "WordContribution",
    "add_curvature",
    "choose_target",
    "compare_layers",
    "gradient_rule",
    "link_checkpoint",
    "record_target",
    "recorded_target",
]
