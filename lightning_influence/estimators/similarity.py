"""Similarity baselines: they know nothing of training, and an estimator that does not beat them says nothing new."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import Attributor, Queries, ScoreBlock, Stage
from lightning_influence.estimators.tokens import token_look_ups, token_sequences
from lightning_influence.gradients import Rows, select
from lightning_influence.objective.training import run_training_step
from lightning_influence.replay import TrainingData, isolated, walk

Features: TypeAlias = Callable[[LightningModule, Any], Tensor]
Tokens: TypeAlias = Callable[[Any], Sequence[Sequence[int]]]

_UNLABELLED = (KeyError, TypeError, ValueError, IndexError, AttributeError)


class EmbeddingCosine(Attributor):
    """Cosine of the features of query and sample at the final weights: score(q, z) = f(q) . f(z) / (|f(q)| |f(z)|).

    Args:
        features: (module, batch) -> (N, D); or the name of a layer, whose output is taken; `None` takes the input of
            the last linear layer. Positions are averaged, (N, T, D) becomes (N, D), without those that the word
            embedding knows as padding.

    Raises:
        QueryError: no training data; no such layer; features that are not one row a sample.
    """

    def __init__(self, features: str | Features | None = None) -> None:
        self._features = features

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """Cosines with the features of the whole training set, as many queries at a time as a gigabyte allows."""
        data = training_data(stage, "EmbeddingCosine")
        with stage.at(stage.checkpoints[-1]) as module, isolated(module), torch.no_grad():
            asked = [self._directions(module, b, n) for b, n in zip(queries.batches, queries.sizes, strict=True)]
            known = [self._directions(module, b, len(ids)) for ids, b in walk(data, [range(len(data))], module)]
        query, train = torch.cat(asked), torch.cat(known)  # (Q, D), (N, D)
        for rows in queries.slices(len(data)):
            yield ScoreBlock(rows, torch.arange(len(data)), query[rows] @ train.T)

    def _directions(self, module: LightningModule, batch: Any, num_samples: int) -> Tensor:
        with token_look_ups(module) as seen:
            found = (
                self._features(module, batch) if callable(self._features) else _at_layer(module, batch, self._features)
            )
        while isinstance(found, (tuple, list)) and found:
            found = found[0]
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != num_samples:
            raise QueryError(
                "EmbeddingCosine needs one row of features for each sample",
                expected=f"a tensor of shape ({num_samples}, D) or ({num_samples}, T, D)",
                found=f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__,
                hint="name another layer, or pass features=(module, batch) -> (N, D)",
            )
        rows = found.to(torch.promote_types(found.dtype, torch.float32))
        if rows.ndim > 2:
            found_ids = (look_up.ids for look_up in seen if look_up.ids.shape == rows.shape[:2])
            present = next((ids >= 0 for ids in found_ids), torch.ones(rows.shape[:2]))
            present = present.to(rows).view(*rows.shape[:2], *[1] * (rows.ndim - 2))
            rows = (rows * present).flatten(1, -2).sum(1)  # up to a factor, which the cosine does not see, the mean
        return nn.functional.normalize(rows, dim=1)


class _Lexical(Attributor):
    """Scores from the tokens that query and sample share, by an inverted index of the training set.

    Args:
        tokens: batch -> the token ids of each sample; `None` takes those that go through the word embeddings, padding
            left out.

    Raises:
        QueryError: no training data; no tokens.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self._tokens = tokens

    @abstractmethod
    def weights(self, train: Rows, queries: Rows) -> tuple[Rows, Rows]:
        """From counts (values (M, 1)) to the weights of which the score is the inner product."""

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """Scores against the whole training set, as many queries at a time as a gigabyte allows."""
        data = training_data(stage, type(self).__name__)
        with stage.at(stage.checkpoints[-1]) as module, isolated(module), torch.no_grad():
            asked = [t for b, n in zip(queries.batches, queries.sizes, strict=True) for t in self._read(module, b, n)]
            known = [t for ids, b in walk(data, [range(len(data))], module) for t in self._read(module, b, len(ids))]
        num_words = 1 + max((t for text in (*asked, *known) for t in text), default=0)
        train, query = self.weights(_counts(known, num_words), _counts(asked, num_words))
        for rows in queries.slices(len(data)):
            scores = train.inner(query.select(torch.arange(rows.start, rows.stop)))
            yield ScoreBlock(rows, torch.arange(len(data)), scores)

    def _read(self, module: LightningModule, batch: Any, num_samples: int) -> list[list[int]]:
        if self._tokens is not None:
            found = [[int(t) for t in text] for text in self._tokens(batch)]
        else:
            with token_look_ups(module) as seen:
                _forward(module, batch, lambda: bool(seen))
            found = token_sequences(seen, num_samples)
        if len(found) != num_samples or (self._tokens is None and not any(found)):
            raise QueryError(
                f"{type(self).__name__} does not know the tokens of a batch",
                expected=f"{num_samples} lists of token ids",
                found=f"{len(found)} lists" if len(found) != num_samples else "no look-up of shape (N, T)",
                hint="pass tokens=batch -> list of lists of ids",
            )
        return found


class TfIdf(_Lexical):
    """Cosine of tf-idf vectors of tokens.

        tf-idf(w, x) = count(w, x) (1 + ln((1 + N) / (1 + df(w))))

    with N training samples, df(w) of which contain w (the smoothed form, as in scikit-learn; Salton and Buckley 1988);
    words that no training sample contains are passed over.

    Args:
        tokens: batch -> the token ids of each sample; `None` takes those that go through the word embeddings.
    """

    def weights(self, train: Rows, queries: Rows) -> tuple[Rows, Rows]:
        """Vectors of length 1."""
        df = _document_frequency(train)
        idf = 1 + ((1 + train.num_samples) / (1 + df)).log()
        known = queries.without_words((df[:, 0] == 0).nonzero())
        return _unit(train.multiplied(idf)), _unit(known.multiplied(idf))


class BM25(_Lexical):
    """Okapi BM25 of tokens (Robertson and Zaragoza 2009), with the idf that is never negative.

        score(q, z) = sum over tokens t of q, repeats counted, of
                      ln(1 + (N - df(t) + 0.5) / (df(t) + 0.5)) tf (k1 + 1) / (tf + k1 (1 - b + b |z| / mean |z|))

    Args:
        tokens: batch -> the token ids of each sample; `None` takes those that go through the word embeddings.
        k1: how slowly repeats of a word in a sample saturate.
        b: how much long samples are discounted, 0 to 1.
    """

    def __init__(self, tokens: Tokens | None = None, *, k1: float = 1.5, b: float = 0.75) -> None:
        super().__init__(tokens)
        self._k1, self._b = k1, b

    def weights(self, train: Rows, queries: Rows) -> tuple[Rows, Rows]:
        """Saturated and discounted counts times idf; counts of the query."""
        df = _document_frequency(train)
        idf = (1 + (train.num_samples - df + 0.5) / (df + 0.5)).log()
        lengths = torch.zeros(train.num_samples, dtype=torch.float64)
        lengths.index_add_(0, train.owners, train.values[:, 0])
        discount = 1 - self._b + self._b * lengths / lengths.mean()
        counts = train.values[:, 0]
        saturated = counts * (self._k1 + 1) / (counts + self._k1 * discount[train.owners])
        rows = Rows(train.words, train.owners, saturated[:, None], train.num_samples, train.num_words)
        return rows.multiplied(idf), queries


class Random(Attributor):
    """Scores drawn from a standard normal distribution: what every table must beat.

    Args:
        seed: equal seeds give equal scores, query by query in the order in which they are asked.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def score_blocks(self, stage: Stage, queries: Queries) -> Iterator[ScoreBlock]:
        """Independent draws for every pair."""
        length, generator = stage.store.manifest.dataset_length, torch.Generator().manual_seed(self._seed)
        for rows in queries.slices(length):
            scores = [torch.randn(length, generator=generator) for _ in range(rows.start, rows.stop)]
            yield ScoreBlock(rows, torch.arange(length), torch.stack(scores))


def training_data(stage: Stage, attributor: str) -> TrainingData:
    """The training set of a stage, to be walked.

    Raises:
        QueryError: the stage has none.
    """
    if stage.train_loader is None:
        raise QueryError(
            f"{attributor} looks at the training samples themselves",
            expected="the loader of the fit",
            found="none",
            hint="pass it: InfluenceModule(..., train_loader=loader)",
        )
    return TrainingData.of(stage.train_loader)


def _forward(module: LightningModule, batch: Any, enough: Callable[[], bool]) -> None:
    """Send a batch through the model by `training_step`, or by `predict_step` where it has no labels."""
    try:
        run_training_step(module, batch)
    except _UNLABELLED:
        if not enough():
            module.predict_step(batch, 0)


def _at_layer(module: LightningModule, batch: Any, name: str | None) -> Any:
    """Output of the layer `name` for a batch, or the input of the last linear layer, at its last call."""
    found: list[Any] = []
    if name is None:
        layer = next(iter(select(module, "last_layer").layers))
        handle = layer.register_forward_pre_hook(lambda _, args: found.append(args))
    else:
        layers = dict(module.named_modules())
        if name not in layers:
            raise QueryError(
                f"the model has no layer '{name}'",
                expected="a name from module.named_modules()",
                found=", ".join(list(layers)[1:6]),
                hint="name another layer, or pass features=(module, batch) -> (N, D)",
            )
        handle = layers[name].register_forward_hook(lambda _, args, output: found.append(output))
    try:
        _forward(module, batch, lambda: bool(found))
    finally:
        handle.remove()
    return found[-1] if found else None


def _counts(texts: Sequence[Sequence[int]], num_words: int) -> Rows:
    """How often each word stands in each text: rows with one value, (M, 1) float64."""
    words = torch.tensor([t for text in texts for t in text], dtype=torch.int64)
    owners = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(text) for text in texts], dtype=torch.int64))
    ones = torch.ones(len(words), 1, dtype=torch.float64)
    return Rows.from_pairs(words, owners, ones, num_samples=len(texts), num_words=num_words)


def _document_frequency(rows: Rows) -> Tensor:
    """In how many texts each word stands, (V, 1)."""
    return torch.bincount(rows.words, minlength=rows.num_words)[:, None].double()


def _unit(rows: Rows) -> Rows:
    """Every text's vector divided by its length; an empty text stays zero."""
    norm = rows.norm()
    return rows.scaled(torch.where(norm > 0, 1 / norm, torch.zeros_like(norm)))
