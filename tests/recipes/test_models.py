"""The example classifiers: padding changes nothing, they learn, and they come back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from recipes.data import Corpus, TextDataModule
from recipes.models import TextClassifier, TextCNN, TextTransformer

SMALL: dict[type[TextClassifier], dict[str, Any]] = {
    TextCNN: {"embedding_dim": 8, "channels": [6, 5], "kernel_size": 3, "dropout": 0.1, "embedding_std": 1.0},
    TextTransformer: {"embedding_dim": 8, "num_heads": 2, "feedforward_dim": 12, "max_tokens": 20},
}


@pytest.fixture(params=list(SMALL), ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[TextClassifier]:
    return request.param


def build(kind: type[TextClassifier], **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    return kind(vocabulary_size=30, num_classes=3, **(SMALL[kind] | options))  # type: ignore[call-arg]


class Colours:
    """Texts whose class is one of their words."""

    def load(self) -> Corpus:
        words = ("red", "green", "blue")
        texts = tuple(f"{'very ' * (number % 4)}{words[number % 3]} thing {number}" for number in range(120))
        labels = tuple(number % 3 for number in range(120))
        return Corpus(words, texts[:90], labels[:90], texts[90:], labels[90:])


def trainer(folder: Path, **options: Any) -> L.Trainer:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(default_root_dir=folder, **(settings | options))


def test_padding_changes_nothing(kind: type[TextClassifier]) -> None:
    model = build(kind).double().eval()
    for seed, length in enumerate((1, 2, 5)):
        generator = torch.Generator().manual_seed(seed)
        alone = torch.randint(1, 30, (1, length), generator=generator)
        padded = torch.nn.functional.pad(alone, (0, 9))
        other = torch.randint(1, 30, (1, length + 9), generator=generator)
        batch = torch.cat([padded, other])
        torch.testing.assert_close(model(batch)[:1], model(alone), rtol=1e-10, atol=1e-12)


def test_padding_gets_no_gradient(kind: type[TextClassifier]) -> None:
    model = build(kind)
    tokens = torch.tensor([[4, 5, 0, 0], [4, 6, 7, 8]])
    model(tokens).sum().backward()
    gradient = model.embedding.weight.grad
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert all(gradient[word].abs().sum() > 0 for word in (4, 5, 6, 7, 8))


def test_word_order_matters(kind: type[TextClassifier]) -> None:
    model = build(kind).eval()
    assert not torch.allclose(model(torch.tensor([[4, 5, 6]])), model(torch.tensor([[6, 5, 4]])))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_it_learns(kind: type[TextClassifier], optimizer: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    data = TextDataModule(Colours(), batch_size=16)
    data.setup()
    rate = {"sgd": 5e-2, "adam": 1e-2, "adamw": 1e-2}[optimizer]
    model = kind(len(data.vocabulary), 3, optimizer=optimizer, learning_rate=rate, **SMALL[kind])  # type: ignore[call-arg, arg-type]
    fit = trainer(tmp_path, max_epochs=20, enable_checkpointing=False)
    fit.fit(model, datamodule=data)
    assert fit.callback_metrics["train_accuracy"] > 0.9
    [metrics] = fit.test(model, datamodule=data, verbose=False)
    assert metrics["test_accuracy"] > 0.9
    logits = torch.cat(fit.predict(model, datamodule=data))
    labels = torch.tensor(data.test_labels)
    assert (logits.argmax(1) == labels).double().mean() == pytest.approx(metrics["test_accuracy"], abs=1e-6)


def test_it_comes_back_from_a_checkpoint(kind: type[TextClassifier], tmp_path: Path) -> None:
    data = TextDataModule(Colours(), batch_size=30)
    data.setup()
    model = kind(len(data.vocabulary), 3, **SMALL[kind])  # type: ignore[call-arg]
    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    fit.fit(model, datamodule=data)
    fit.save_checkpoint(tmp_path / "model.ckpt")
    again = kind.load_from_checkpoint(tmp_path / "model.ckpt")
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(model.eval()(tokens), again.eval()(tokens))
    assert again.hparams == model.hparams
    assert again.hparams["embedding_dim"] == 8 and again.hparams["vocabulary_size"] == len(data.vocabulary)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="odd kernel size"):
        TextCNN(10, 2, kernel_size=4)
    with pytest.raises(ValueError, match="at least one convolution"):
        TextCNN(10, 2, channels=())
    with pytest.raises(ValueError, match="found 'lbfgs'"):
        TextCNN(10, 2, optimizer="lbfgs")  # type: ignore[arg-type]
    model = build(TextTransformer)
    with pytest.raises(ValueError, match="at most 20 tokens, found 21"):
        model(torch.ones(1, 21, dtype=torch.int64))


def test_hyperparameters_are_plain_values() -> None:
    configured = OmegaConf.create({"channels": [6, 5]})
    assert type(TextCNN(10, 2, channels=configured.channels).hparams["channels"]) is list
