"""The peers of the scoreboard: against plain loops where they are exact, and by their sign where they approximate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, hessian

from recipes.benchmarks.peers import captum, dattri
from recipes.benchmarks.peers.all import peers
from recipes.benchmarks.peers.asked import Peer, Trained, last_layer, word_embedding
from recipes.benchmarks.peers.kronfluence import with_conv2d
from recipes.models import TextCNN
from recipes.truths.samples import Samples

VOCABULARY, LENGTH, CLASSES, SAMPLES, QUERIES = 20, 6, 3, 40, 5
PEERS = {peer.name: peer for peer in peers()}
theirs = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs


def texts(count: int, seed: int) -> Samples:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, LENGTH), generator=draw)
    tokens[torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (count, 1), generator=draw)] = 0
    return Samples(tokens, torch.randint(0, CLASSES, (count,), generator=draw), padding=0)


def fitted(dtype: torch.dtype) -> Trained:
    torch.manual_seed(0)
    model = TextCNN(
        VOCABULARY,
        CLASSES,
        embedding_dim=4,
        channels=[5],
        kernel_size=3,
        embedding_std=1.0,
        dropout=0.0,
        optimizer="sgd",
    ).to(dtype)
    train, checkpoints, rates = texts(SAMPLES, 0), [], (0.3, 0.2, 0.1)
    for rate in rates:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(train.inputs), train.labels).backward()
            optimizer.step()
        checkpoints.append({name: value.clone() for name, value in model.state_dict().items()})
    return Trained(model.eval(), checkpoints, rates, train)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return fitted(torch.float64)


@pytest.fixture(scope="module")
def trained_float32() -> Trained:
    return fitted(torch.float32)


@pytest.fixture(scope="module")
def queries() -> Samples:
    return texts(QUERIES, 1)


def gradients(model: nn.Module, samples: Samples, layer: str = "") -> Tensor:
    """Gradients (N, P) of single samples' cross-entropies, one after the other."""
    parameters = [p for name, p in model.named_parameters() if name.startswith(layer)]
    rows = []
    for tokens, label in zip(samples.inputs, samples.labels, strict=True):
        loss = F.cross_entropy(model(tokens.unsqueeze(0)), label.unsqueeze(0))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def tracin(trained: Trained, queries: Samples, layer: str = "") -> Tensor:
    """Σ_c η_c ⟨∇ℓ(query; θ_c), ∇ℓ(sample; θ_c)⟩, (Q, N)."""
    model, total = trained.copy(), torch.zeros(())
    for weights, rate in zip(trained.checkpoints, trained.learning_rates, strict=True):
        model.load_state_dict(dict(weights))
        total = total + rate * gradients(model, queries, layer) @ gradients(model, trained.train, layer).t()
    return total


def library(peer: Peer) -> str:
    return peer.name.partition(",")[0].lower()


def test_a_positive_score_marks_a_proponent(trained, queries):
    """A small step against a training sample's gradient lowers the query's loss by its score at that checkpoint."""
    only_last = Trained(trained.model, trained.checkpoints[-1:], [1.0], trained.train)
    scores, step = tracin(only_last, queries), 1e-6
    before = F.cross_entropy(trained.model(queries.inputs), queries.labels, reduction="none")
    for i, row in enumerate(gradients(trained.model, trained.train)[:5]):
        moved = trained.copy()
        vector = torch.nn.utils.parameters_to_vector(moved.parameters())
        torch.nn.utils.vector_to_parameters(vector - step * row, moved.parameters())
        after = F.cross_entropy(moved(queries.inputs), queries.labels, reduction="none")
        torch.testing.assert_close((before - after) / step, scores[:, i], rtol=1e-3, atol=1e-4)


def test_layers_are_found_from_the_model(trained):
    assert word_embedding(trained.model) == "embedding"
    assert last_layer(trained.model) == "head"
    with pytest.raises(ValueError, match="type Embedding, found none in Linear"):
        word_embedding(nn.Linear(2, 2))


def test_every_checkpoint_needs_its_learning_rate(trained):
    with pytest.raises(ValueError, match="3 checkpoints and 2 learning rates"):
        Trained(trained.model, trained.checkpoints, [0.1, 0.1], trained.train)


def test_a_copy_shares_no_weights_and_no_trainer(trained):
    model = TextCNN(VOCABULARY, CLASSES, embedding_dim=4, channels=[5])
    model._trainer = trainer = object()
    other = Trained(model, [model.state_dict()], [0.1], trained.train).copy()
    assert other._trainer is None
    assert model._trainer is trainer
    assert not other.training
    assert other.embedding.weight.data_ptr() != model.embedding.weight.data_ptr()
    torch.testing.assert_close(other.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_a_model_with_conv2d_computes_the_same(kernel_size, queries):
    model = TextCNN(VOCABULARY, CLASSES, embedding_dim=4, channels=[5, 6], kernel_size=kernel_size).double().eval()
    before = model(queries.inputs)
    torch.testing.assert_close(with_conv2d(model)(queries.inputs), before)
    assert not any(isinstance(layer, nn.Conv1d) for layer in model.modules())


def test_every_peer_has_a_name_of_its_own():
    assert len(PEERS) == len(peers())
    assert {library(peer) for peer in peers()} == {"captum", "dattri", "kronfluence", "trak"}


@theirs
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("Captum, TracInCPFast, last layer's weight", "head.weight"),
        ("Captum, TracInCP, embedding", "embedding"),
        ("Captum, TracInCP, all parameters", ""),
        ("dattri, TracIn, all parameters", ""),
    ],
)
@pytest.mark.parametrize("batch", [7, SAMPLES])
def test_tracin_is_the_plain_sum(name, layer, batch, trained, trained_float32, queries, tmp_path, monkeypatch):
    peer = PEERS[name]
    pytest.importorskip(library(peer))
    for room, size in ((captum, "BATCH"), (captum, "FAST_BATCH"), (dattri, "BATCH")):
        monkeypatch.setattr(room, size, batch)
    single = library(peer) == "dattri"  # its answer is float32
    asked, tolerance = (trained_float32, 1e-4) if single else (trained, 1e-9)
    (tmp_path / "scores").mkdir()
    (tmp_path / "self").mkdir()
    found = peer.scores(asked, queries, tmp_path / "scores")
    expected = tracin(trained, queries, layer).to(found.dtype)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
    assert peer.self_influence is not None
    own = peer.self_influence(asked, tmp_path / "self")
    diagonal = tracin(trained, trained.train, layer).diagonal().to(own.dtype)
    torch.testing.assert_close(own, diagonal, rtol=tolerance, atol=tolerance * float(diagonal.max()))


@theirs
def test_dattris_explicit_influence_function_has_the_exact_hessian(trained, trained_float32, queries, tmp_path):
    peer = PEERS["dattri, IF explicit, last layer"]
    pytest.importorskip("dattri")
    model, train = trained.model, trained.train
    names = ("head.weight", "head.bias")
    last = {name: model.state_dict()[name] for name in names}
    sizes = [value.numel() for value in last.values()]

    def loss(vector: Tensor) -> Tensor:
        pieces = dict(zip(names, vector.split(sizes), strict=True))
        weights = {name: pieces[name].view_as(last[name]) for name in names}
        return F.cross_entropy(functional_call(model, weights, (train.inputs,)), train.labels)

    matrix = hessian(loss)(torch.cat([value.flatten() for value in last.values()]))
    damped = matrix + dattri.REGULARIZATION * torch.eye(len(matrix), dtype=matrix.dtype)
    solved = torch.linalg.solve(damped, gradients(model, train, "head").t())  # (P, N)
    expected = (gradients(model, queries, "head") @ solved).float()
    found = peer.scores(trained_float32, queries, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert peer.self_influence is not None
    own = (gradients(model, train, "head") * solved.t()).sum(1).float()
    torch.testing.assert_close(peer.self_influence(trained_float32, tmp_path), own, rtol=1e-3, atol=1e-3)


@theirs
@pytest.mark.parametrize("name", PEERS)
def test_samples_speak_for_themselves(name, trained_float32, tmp_path):
    """With the training samples as queries: positive on the diagonal, and of a mind with the gradients' products."""
    peer, asked = PEERS[name], trained_float32
    pytest.importorskip(library(peer))
    before = {key: value.clone() for key, value in asked.model.state_dict().items()}
    (tmp_path / "scores").mkdir()
    (tmp_path / "self").mkdir()
    scores = peer.scores(asked, asked.train, tmp_path / "scores")
    assert scores.shape == (SAMPLES, SAMPLES)
    assert not scores.requires_grad
    assert scores.isfinite().all()
    assert scores.diagonal().mean() > 0
    assert scores.diagonal().mean() > scores.mean()
    plain = gradients(asked.model, asked.train)
    pair = torch.stack([scores.flatten(), (plain @ plain.t()).flatten()]).double()
    assert torch.corrcoef(pair)[0, 1] > 0.2
    if peer.self_influence is not None:
        own = peer.self_influence(asked, tmp_path / "self")
        assert own.shape == (SAMPLES,)
        torch.testing.assert_close(own.float(), scores.diagonal().float(), rtol=1e-3, atol=1e-3 * float(own.max()))
    for key, value in asked.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


@theirs
@pytest.mark.parametrize("name", PEERS)
def test_what_was_asked_before_changes_nothing(name, trained_float32, queries, tmp_path: Path):
    peer = PEERS[name]
    pytest.importorskip(library(peer))
    answers = []
    for turn in ("first", "second"):
        (tmp_path / turn).mkdir()
        answers.append(peer.scores(trained_float32, queries, tmp_path / turn))
        torch.rand(3)
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-4, atol=1e-6)
