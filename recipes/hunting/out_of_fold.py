"""The simple baseline: how little a logistic regression believes a label that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FOLDS = 5


def of_texts(texts: Sequence[str], labels: Tensor, seed: int) -> Tensor:
    """One minus the out-of-fold probability of each given label, (N,): tf-idf of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    return _doubt(make_pipeline(words, LogisticRegression(C=1.0, max_iter=200)), list(texts), labels, seed)


def of_images(inputs: Tensor, labels: Tensor, seed: int) -> Tensor:
    """One minus the out-of-fold probability of each given label, (N,): the pixels as they are."""
    from sklearn.linear_model import LogisticRegression

    return _doubt(LogisticRegression(C=0.01, max_iter=60), inputs.flatten(1).numpy(), labels, seed)


def _doubt(classifier: Any, samples: Any, labels: Tensor, seed: int) -> Tensor:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # pixels: as good as converged
        believed = cross_val_predict(classifier, samples, labels.numpy(), cv=folds, method="predict_proba")
    columns = torch.unique(labels, return_inverse=True)[1]  # of the classes that occur, in ascending order
    return 1 - torch.from_numpy(believed).gather(1, columns.unsqueeze(1)).squeeze(1)
