"""The similarity baselines against naive loops, and what they refuse."""

from __future__ import annotations

import copy
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence import InfluenceModule, QueryError
from lightning_influence.errors import UnsupportedError
from lightning_influence.estimators import BM25, EmbeddingCosine, Random, TfIdf
from tests.stores import (
    Classifier,
    Texts,
    all_names,
    batch_of,
    classifier,
    group,
    loader_of,
    quiet,
    replay_store,
    trajectory,
)

TRAIN, ASKED = Texts(), Texts(5, seed=1)
KNOWN = [text.tolist() for text in TRAIN.texts]
TEXTS = [text.tolist() for text in ASKED.texts]

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")


@pytest.fixture(scope="module")
def fit(tmp_path_factory: pytest.TempPathFactory):
    module = classifier()
    store = replay_store(
        tmp_path_factory.mktemp("similarity") / "store",
        module,
        TRAIN,
        trajectory(module, 2),
        lambda c: [group(all_names(module), 1.0)],
        parameters="word_embeddings",
    )
    return module, store


def scores(fit, attributor, batch=None) -> Tensor:
    influence = InfluenceModule(fit[0], fit[1], attributor, train_loader=loader_of(TRAIN))
    return influence.scores(batch_of(ASKED) if batch is None else batch)


def same(found: Tensor, truth: list[list[float]]) -> None:
    torch.testing.assert_close(found.double(), torch.tensor(truth, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def bm25(query: list[int], sample: list[int], k1: float, b: float) -> float:
    n, mean = len(KNOWN), sum(map(len, KNOWN)) / len(KNOWN)
    total = 0.0
    for token in query:
        df, tf = sum(token in text for text in KNOWN), sample.count(token)
        idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
        total += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(sample) / mean))
    return total


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 0.0)])
def test_bm25_by_its_formula(fit, k1, b):
    truth = [[bm25(query, sample, k1, b) for sample in KNOWN] for query in TEXTS]
    same(scores(fit, BM25(k1=k1, b=b)), truth)
    own = BM25(lambda batch: [[t for t in row.tolist() if t] for row in batch["tokens"]], k1=k1, b=b)
    same(scores(fit, own), truth)


def tf_idf(text: list[int]) -> dict[int, float]:
    df = {t: sum(t in other for other in KNOWN) for t in set(text)}
    weights = {t: n * (1 + math.log((1 + len(KNOWN)) / (1 + df[t]))) for t, n in Counter(text).items() if df[t]}
    norm = math.sqrt(sum(w * w for w in weights.values()))
    return {t: w / norm for t, w in weights.items()}


def test_tf_idf_by_its_formula(fit):
    vectors = [tf_idf(text) for text in KNOWN]
    truth = [[sum(w * v.get(t, 0.0) for t, w in tf_idf(q).items()) for v in vectors] for q in TEXTS]
    same(scores(fit, TfIdf()), truth)


def test_tf_idf_of_scikit_learn(fit):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    vectorizer = text.TfidfVectorizer(analyzer=lambda tokens: [str(t) for t in tokens])
    train = vectorizer.fit_transform(KNOWN)
    same(scores(fit, TfIdf()), (vectorizer.transform(TEXTS) @ train.T).toarray().tolist())


def test_cosine_of_features_at_the_final_weights(fit):
    module, store = fit
    final = copy.deepcopy(module).eval()
    final.load_state_dict(store.weights(store.checkpoints()[-1]))

    def cosines(features) -> Tensor:
        mine, theirs = features(batch_of(ASKED)["tokens"]), features(batch_of(TRAIN)["tokens"])
        return F.cosine_similarity(mine[:, None], theirs[None], dim=2).detach()

    def mean_of_words(tokens: Tensor) -> Tensor:
        return torch.stack([final.embedding(row[row != 0]).mean(0) for row in tokens])

    truth = cosines(final.features)
    assert torch.allclose(scores(fit, EmbeddingCosine()), truth, rtol=1e-10)
    own = EmbeddingCosine(lambda m, batch: m.features(batch["tokens"])[:, :2])
    truth = cosines(lambda tokens: final.features(tokens)[:, :2])
    assert torch.allclose(scores(fit, own), truth, rtol=1e-10)
    truth = cosines(lambda tokens: final.head(final.features(tokens)))
    assert torch.allclose(scores(fit, EmbeddingCosine("head")), truth, rtol=1e-10)
    assert torch.allclose(scores(fit, EmbeddingCosine("embedding")), cosines(mean_of_words), rtol=1e-10)


def test_random_scores_come_from_the_seed(fit):
    first, again, other = (scores(fit, Random(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(scores(fit, Random(0), batch_of(ASKED, [0, 1])), first[:2])


@pytest.mark.parametrize("attributor", [BM25(), TfIdf(), EmbeddingCosine(), Random(3)], ids=lambda a: type(a).__name__)
def test_baselines_answer_through_a_trainer_too(fit, attributor, monkeypatch):
    whole = scores(fit, attributor)
    influence = InfluenceModule(fit[0], fit[1], attributor, k=3, train_loader=loader_of(TRAIN))
    before = {name: value.clone() for name, value in fit[0].state_dict().items()}
    quiet().predict(influence, loader_of(ASKED, 2))
    best = whole.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(influence.attribution.proponents.scores, best.values[:, :3])
    assert all(torch.equal(before[name], value) for name, value in fit[0].state_dict().items())
    for refused in (influence.self_influence, lambda: influence.words(batch_of(ASKED), [[0]] * 5)):
        with pytest.raises(QueryError, match="bilinear"):
            refused()
    monkeypatch.setattr("lightning_influence.estimators.estimator._MOST_BYTES", 4 * len(TRAIN) * 2)
    torch.testing.assert_close(scores(fit, attributor), whole)


def test_queries_without_labels(fit):
    unlabelled = {"tokens": batch_of(ASKED)["tokens"]}
    for attributor in (BM25(), EmbeddingCosine(), EmbeddingCosine("hidden")):
        assert torch.equal(scores(fit, attributor, unlabelled), scores(fit, attributor))


@pytest.mark.parametrize("attributor", [BM25(), TfIdf(), EmbeddingCosine()], ids=lambda a: type(a).__name__)
def test_without_training_data(fit, attributor):
    with pytest.raises(QueryError, match="train_loader"):
        InfluenceModule(fit[0], fit[1], attributor).scores(batch_of(ASKED))
    with pytest.raises(UnsupportedError):
        InfluenceModule(fit[0], fit[1], attributor, train_loader=[batch_of(TRAIN)])


def test_features_and_tokens_that_make_no_sense(fit):
    with pytest.raises(QueryError, match="no layer 'decoder'"):
        scores(fit, EmbeddingCosine("decoder"))
    with pytest.raises(QueryError, match="one row of features"):
        scores(fit, EmbeddingCosine(lambda module, batch: batch["label"].double()))
    with pytest.raises(QueryError, match="does not know the tokens"):
        scores(fit, BM25(lambda batch: [[1, 2]]))


class NoWords(Classifier):
    def training_step(self, batch, batch_idx):
        return self.head(F.one_hot(batch["label"], 4).double()).sum()


def test_a_model_without_look_ups(tmp_path):
    module = classifier(kind=NoWords)
    store = replay_store(
        tmp_path / "s",
        module,
        TRAIN,
        [module.state_dict()],
        lambda c: [group(all_names(module), 1.0)],
        parameters="last_layer",
    )
    with pytest.raises(QueryError, match="no look-up"):
        scores((module, store), BM25())
