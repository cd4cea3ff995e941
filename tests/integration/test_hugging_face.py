"""Hugging Face models inside a LightningModule: fitted with the callback and queried, against the slow truth."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor

pytest.importorskip("transformers")

from lightning_influence import (
    ArtifactStore,
    CaptureError,
    GradientSnapshot,
    InfluenceModule,
    LossError,
    TracIn,
    TracInWE,
)
from tests.callbacks.fits import WARNINGS, state_hash, trainer
from tests.integration.hugging_face import (
    PIECES,
    QUESTIONS,
    SENTENCES,
    Adapted,
    Encoder,
    LanguageModel,
    TwoTexts,
    batch_of,
    language_batch,
    loader_of,
    texts,
    tokenizer,
)
from tests.reference import tracin, tracin_we
from tests.stores import quiet

pytestmark = [pytest.mark.filterwarnings(each) for each in WARNINGS]

STEPS = len(SENTENCES) // 4  # optimizer steps of an epoch


def fitted(root: Path, make: Any, *snapshots: GradientSnapshot, samples: Any = None, **loading: Any) -> Any:
    """Two epochs of a float64 model; (module, trainer)."""
    seed_everything(5, verbose=False)
    module = make().double()
    seed_everything(1, verbose=False)
    run = trainer(root, *snapshots)
    run.fit(module, loader_of(texts() if samples is None else samples, shuffle=True, **loading))
    return module, run


def snapshot(root: Path, parameters: Any = "word_embeddings", **options: Any) -> GradientSnapshot:
    return GradientSnapshot(root, parameters, dtype="float64", **options)


def loss_of_one(module: Any, batch: Any) -> Tensor:
    module.eval()
    return module.training_step(batch, 0)


def quietly(module: Any) -> Any:
    """The module for the reference, which has no Trainer to log to."""
    module.log = lambda *args, **kwargs: None
    return module


def checkpoints(store: ArtifactStore, names: Any) -> Any:
    """(weights, rates) by hand: SGD at one rate, so many steps an epoch."""
    rate = store.manifest.hyper_parameters["rate"]
    return [(store.weights(c), dict.fromkeys(names, rate * STEPS)) for c in store.checkpoints()]


def alone(samples: Any) -> list[Any]:
    return [batch_of([sample]) for sample in samples]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, ArtifactStore]:
    root = tmp_path_factory.mktemp("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, _ = fitted(root, Encoder, snapshot(root / "store"))
    return module, ArtifactStore.open(root / "store")


WORDS = "model.bert.embeddings.word_embeddings.weight"


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
@pytest.mark.parametrize("make", [Encoder, Adapted, LanguageModel])
def test_training_is_bit_identical(tmp_path, mode, make):
    collate = {"collate_fn": language_batch} if make is LanguageModel else {}
    _, plain = fitted(tmp_path / "plain", make, **collate)
    _, watched = fitted(tmp_path / "watched", make, snapshot(tmp_path / "store", mode=mode), **collate)
    assert state_hash(plain) == state_hash(watched)


@pytest.mark.parametrize(("kind", "attention"), [("bert", "sdpa"), ("bert", "eager"), ("distilbert", "sdpa")])
def test_scores_are_those_of_single_texts(tmp_path, kind, attention):
    """Dropout in the fit, padding in the batches; the truth has neither."""
    module, _ = fitted(tmp_path, lambda: Encoder(kind, attention), snapshot(tmp_path / "store"))
    store = ArtifactStore.open(tmp_path / "store")
    name = f"model.{kind}.embeddings.word_embeddings.weight"
    assert store.manifest.selected == (name,)  # neither positions nor token types
    asked = texts(QUESTIONS)
    scores = InfluenceModule(Encoder, store, TracInWE()).scores(batch_of(asked))
    truth = tracin(quietly(module), loss_of_one, checkpoints(store, [name]), alone(texts()), alone(asked))
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-16)


def test_asked_by_a_trainer_the_words_are_whole(bert):
    module, store = bert
    encode = tokenizer()
    influence = InfluenceModule(module, store, TracInWE(exclude_tokens=encode.all_special_ids), k=3)
    asked = texts(QUESTIONS)
    quiet().predict(influence, loader_of(asked, batch_size=2))
    found = influence.attribution.proponents
    truth = tracin_we(
        quietly(module),
        loss_of_one,
        [(state, rates[WORDS]) for state, rates in checkpoints(store, [WORDS])],
        alone(texts()),
        alone(asked),
        lambda batch: batch["input_ids"][0].tolist(),
        WORDS,
        exclude=encode.all_special_ids,
    )
    words = influence.words(batch_of(asked), found.sample_ids, decode=encode.convert_ids_to_tokens)
    for q, (row, pairs) in enumerate(zip(found.sample_ids.tolist(), words, strict=True)):
        for z, score, contributions in zip(row, found.scores[q].tolist(), pairs, strict=True):
            assert sum(c.score for c in contributions) == pytest.approx(score, rel=1e-10)
            assert score == pytest.approx(sum(truth[q][z].values()), rel=1e-10)
            for c in contributions:
                together = [truth[q][z].get((token, token), 0.0) for token in c.tokens]
                if c.word == "playing":
                    assert encode.convert_ids_to_tokens(list(c.tokens)) == ["play", "##ing"]
                if not any("##" in PIECES[token] for token in c.tokens):
                    assert c.score == pytest.approx(sum(together), rel=1e-10)
            assert not {"[CLS]", "[SEP]", "##ing", "##s"} & {c.word for c in contributions}
    everything = influence.words(batch_of(asked), torch.arange(12).repeat(3, 1), encode.convert_ids_to_tokens)
    assert "playing" in {c.word for pair in everything[0] for c in pair}
    assert {"dogs", "barked", "walked"} <= {c.word for pair in everything[1] for c in pair}


def test_queries_without_labels(bert):
    """As if their label were the class that the fitted model predicts, at every checkpoint."""
    module, store = bert
    asked = texts(QUESTIONS, labelled=False)
    influence = InfluenceModule(module, store, TracInWE(), measurement="predicted_class", k=2)
    scores = influence.scores(batch_of(asked))
    module.load_state_dict(store.weights(store.checkpoints()[-1]))
    module.eval()
    with torch.no_grad():
        said = [int(module.predict_step(batch_of([query])).argmax()) for query in asked]
    given = [query | {"label": label} for query, label in zip(asked, said, strict=True)]
    labelled = tracin(quietly(module), loss_of_one, checkpoints(store, [WORDS]), alone(texts()), alone(given))
    torch.testing.assert_close(scores, labelled, rtol=1e-10, atol=1e-16)
    quiet().predict(influence, loader_of(asked, batch_size=2))
    assert torch.equal(influence.attribution.proponents.sample_ids, scores.sort(1, descending=True).indices[:, :2])


class Plain(Encoder):
    """Without a `predict_step`, as the documentation of Lightning has it: `forward` takes the batch by names."""

    predict_step = LightningModule.predict_step


def test_queries_without_labels_of_a_module_that_only_trains(bert):
    _, store = bert
    batch = batch_of(texts(QUESTIONS, labelled=False))
    scores = [
        InfluenceModule(kind, store, TracInWE(), measurement="predicted_class").scores(batch)
        for kind in (Plain, Encoder)
    ]
    assert torch.equal(*scores)
    with pytest.raises(LossError, match="no loss") as refused:
        InfluenceModule(Plain, store, TracInWE()).scores(batch)
    assert "predicted_class" in str(refused.value)


def test_pairs_of_texts_in_one_sequence(tmp_path):
    pairs = texts(SENTENCES, SENTENCES[::-1])
    module, _ = fitted(tmp_path, Encoder, snapshot(tmp_path / "store"), samples=pairs)
    store = ArtifactStore.open(tmp_path / "store")
    asked = texts(QUESTIONS, QUESTIONS[::-1])
    assert max(asked[1]["token_type_ids"]) == 1
    influence = InfluenceModule(module, store, TracInWE(exclude_tokens=range(4)), k=12)
    truth = tracin_we(
        quietly(module),
        loss_of_one,
        [(state, rates[WORDS]) for state, rates in checkpoints(store, [WORDS])],
        alone(pairs),
        alone(asked),
        lambda batch: batch["input_ids"][0].tolist(),
        WORDS,
        exclude=range(4),
    )
    scores = influence.scores(batch_of(asked))
    expected = torch.tensor([[sum(found.values()) for found in row] for row in truth], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=1e-16)
    ids = torch.tensor([[0, 5]] * 3)
    words = influence.words(batch_of(asked), ids, decode=tokenizer().convert_ids_to_tokens)
    for q, row in enumerate(words):
        for z, contributions in zip((0, 5), row, strict=True):
            assert sum(c.score for c in contributions) == pytest.approx(float(scores[q, z]), rel=1e-10)


def two_texts(samples: Any) -> dict[str, Any]:
    first = batch_of([{k: v for k, v in premise.items() if k != "label"} for premise, _ in samples])
    second = batch_of([{k: v for k, v in hypothesis.items() if k != "label"} for _, hypothesis in samples])
    labels = torch.tensor([premise["label"] for premise, _ in samples])
    return {"premise": dict(first), "hypothesis": dict(second), "labels": labels}


def test_pairs_of_texts_apart(tmp_path):
    pairs = list(zip(texts(), texts(SENTENCES[::-1]), strict=True))
    module, _ = fitted(tmp_path, TwoTexts, snapshot(tmp_path / "store"), samples=pairs, collate_fn=two_texts)
    store = ArtifactStore.open(tmp_path / "store")
    asked = list(zip(texts(QUESTIONS), texts(QUESTIONS[1:] + QUESTIONS[:1]), strict=True))
    influence = InfluenceModule(TwoTexts, store, TracInWE(), k=2)
    scores = influence.scores(two_texts(asked))
    truth = tracin(
        quietly(module),
        loss_of_one,
        checkpoints(store, [WORDS]),
        [two_texts([pair]) for pair in pairs],
        [two_texts([pair]) for pair in asked],
    )
    torch.testing.assert_close(scores, truth, rtol=1e-10, atol=1e-16)
    found = influence.query(two_texts(asked), k=12).proponents
    words = influence.words(two_texts(asked), found.sample_ids, decode=tokenizer().convert_ids_to_tokens)
    assert {"playing", "dogs"} <= {c.word for pair in words[0] for c in pair}  # one of each text
    sums = torch.tensor([[sum(c.score for c in pair) for pair in row] for row in words], dtype=torch.float64)
    torch.testing.assert_close(sums, found.scores, rtol=1e-10, atol=1e-16)


def test_positions_that_are_asked_for_are_refused_before_training(tmp_path):
    """They are looked up once for the whole batch: no row belongs to one sample."""
    with pytest.raises(CaptureError, match="position_embeddings") as refused:
        fitted(tmp_path, Encoder, snapshot(tmp_path / "store", "*position_embeddings*"))
    assert "HINT" in str(refused.value)


# A frozen base

LOW_RANK = "*.attention.self.*.down.weight"


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapted, ArtifactStore]:
    root = tmp_path_factory.mktemp("adapted")
    chosen = ["word_embeddings", "*.down.weight", "*.up.weight", "model.classifier.*"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, _ = fitted(root, lambda: Adapted(request.param), snapshot(root / "store", chosen))
    return module, ArtifactStore.open(root / "store")


def test_the_frozen_base_is_stored_once(adapted):
    module, store = adapted
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    (file,) = store.artifacts("frozen")
    different = {p.detach().numpy().tobytes(): p.nbytes for p in frozen.values()}  # the same content is there once
    assert sum(different.values()) <= file.bytes < sum(different.values()) + 3000
    own = [a.bytes for a in store.artifacts("weights")]
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert len(own) == 2 and all(trained <= size < trained + 3000 for size in own) and sum(own) < file.bytes
    last = store.weights(store.checkpoints()[-1])
    assert set(last) == set(module.state_dict())
    assert all(torch.equal(last[name], value) for name, value in module.state_dict().items())
    assert store.verify() == []


def test_words_of_a_frozen_base(adapted):
    module, store = adapted
    assert not module.get_parameter(WORDS).requires_grad
    influence = InfluenceModule(Adapted, store, TracInWE(), k=3)
    asked = texts(QUESTIONS)
    truth = tracin(quietly(module), loss_of_one, checkpoints(store, [WORDS]), alone(texts()), alone(asked))
    torch.testing.assert_close(influence.scores(batch_of(asked)), truth, rtol=1e-10, atol=1e-16)
    quiet().predict(influence, loader_of(asked, batch_size=2))
    assert torch.equal(influence.attribution.proponents.sample_ids, truth.sort(1, descending=True).indices[:, :3])
    assert all(not p.requires_grad for name, p in influence.user.named_parameters() if name == WORDS)


@pytest.mark.parametrize("chosen", [LOW_RANK, "*.up.weight", "model.classifier.*"])
def test_tracin_on_what_was_trained(adapted, chosen):
    module, store = adapted
    influence = InfluenceModule(module, store, TracIn(chosen), k=3)
    names = influence.estimator.names(influence.stage)
    assert len(names) == (2 if "classifier" in chosen else 4)
    asked = texts(QUESTIONS)
    truth = tracin(quietly(module), loss_of_one, checkpoints(store, names), alone(texts()), alone(asked))
    torch.testing.assert_close(influence.scores(batch_of(asked)), truth, rtol=1e-10, atol=1e-16)


# A language model whose head is tied to its embeddings

TIED = "model.transformer.wte.weight"


def losses_of_looking_up(module: Any, batch: Any) -> Tensor:
    """The loss of one text, in which only the look-ups of the tied weight have a gradient."""
    module.eval()
    words = module.get_parameter(TIED)
    hidden = module.model.transformer(
        inputs_embeds=torch.nn.functional.embedding(batch["input_ids"], words),
        attention_mask=batch["attention_mask"],
    ).last_hidden_state
    logits = (hidden @ words.detach().T).float()  # as the library of the model does
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_tied_language_model(tmp_path, attention):
    """Batches divide by all their tokens: rows are brought back to the loss of the text alone."""
    module, _ = fitted(
        tmp_path, lambda: LanguageModel(attention), snapshot(tmp_path / "store"), collate_fn=language_batch
    )
    store = ArtifactStore.open(tmp_path / "store")
    assert store.manifest.selected == (TIED,)
    assert store.manifest.settings["look_ups"] == [TIED]  # the tied head is left out, and the store says so
    ones, asked = ([language_batch([s]) for s in texts(some)] for some in (SENTENCES, QUESTIONS))
    influence = InfluenceModule(LanguageModel, store, TracInWE(), k=2)
    scores = influence.scores(language_batch(texts(QUESTIONS)))
    truth = tracin(module, losses_of_looking_up, checkpoints(store, [TIED]), ones, asked)
    near = {"rtol": 1e-5, "atol": 1e-6 * float(truth.abs().max())}
    torch.testing.assert_close(scores, truth, **near)
    apart = torch.cat([influence.scores(batch) for batch in asked])  # each query in a batch of its own
    torch.testing.assert_close(scores, apart, **near)
    ids = influence.query(language_batch(texts(QUESTIONS))).proponents.sample_ids
    words = influence.words(language_batch(texts(QUESTIONS)), ids, decode=tokenizer().convert_ids_to_tokens)
    sums = torch.tensor([[sum(c.score for c in pair) for pair in row] for row in words], dtype=torch.float64)
    torch.testing.assert_close(sums, scores.gather(1, ids), rtol=1e-10, atol=1e-16)
