"""Which training samples made the model do this: influence for PyTorch Lightning, from callbacks to queries."""

from lightning_influence.artifacts import ArtifactStore
from lightning_influence.attribution import Attribution, Ranking
from lightning_influence.callbacks import GradientSnapshot
from lightning_influence.errors import (
    CaptureError,
    InfluenceError,
    LossError,
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
    Random,
    Stage,
    Term,
    TfIdf,
    TracIn,
    TracInLast,
    TracInWE,
)
from lightning_influence.gradients import gradient_rule
from lightning_influence.module import InfluenceModule
from lightning_influence.words import WordContribution

__version__ = "0.1.0"

__all__ = [
    "BM25",
    "ArtifactStore",
    "Attribution",
    "Attributor",
    "CaptureError",
    "EmbeddingCosine",
    "Estimator",
    "GradientSnapshot",
    "InfluenceError",
    "InfluenceModule",
    "LossError",
    "QueryError",
    "Random",
    "Ranking",
    "SampleIdError",
    "Stage",
    "StoreError",
    "Term",
    "TfIdf",
    "TracIn",
    "TracInLast",
    "TracInWE",
    "UnsupportedError",
    "WordContribution",
    "gradient_rule",
]
