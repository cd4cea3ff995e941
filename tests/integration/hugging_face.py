"""Small Hugging Face models with random weights, a made-up WordPiece vocabulary, and sentences in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "##ing", "##ed", "##s", ".", ","),
    *("the", "a", "cat", "dog", "bird", "child", "play", "walk", "sing", "bark", "jump", "is", "was", "in", "on"),
    *("park", "house", "roof", "street", "happy", "old", "small", "loud", "and", "not"),
)
SENTENCES = (
    "the cat is playing in the park",
    "a dog barked loud in the street",
    "the old bird sings on the roof .",
    "child and dog walked",
    "the small cat jumped on the roof",
    "a happy child is singing and playing , not walking",
    "the dogs bark",
    "the bird was not happy in the house",
    "old cats play",
    "a loud street , a small house and a park .",
    "the child walks on the street",
    "the dog is jumping and barking and jumping",
)
QUESTIONS = ("a cat was playing", "the old dogs barked and walked in the park", "birds sing")
CLASSES = 3


def tokenizer() -> PreTrainedTokenizerFast:
    ids = {piece: place for place, piece in enumerate(PIECES)}
    made = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def texts(
    sentences: Sequence[str] = SENTENCES, seconds: Sequence[str] | None = None, *, labelled: bool = True
) -> list[dict[str, Any]]:
    """Encoded sentences (or pairs) of their own lengths, as `datasets` gives them."""
    encode = tokenizer()
    samples = []
    for place, sentence in enumerate(sentences):
        sample = dict(encode(sentence, None if seconds is None else seconds[place]))
        samples.append(sample | {"label": place % CLASSES} if labelled else sample)
    return samples


def batch_of(samples: Sequence[Mapping[str, Any]]) -> Any:
    """Padded to the longest, as `DataCollatorWithPadding` does: a BatchEncoding, with `labels`."""
    return DataCollatorWithPadding(tokenizer())([dict(sample) for sample in samples])


def loader_of(samples: Sequence[Any], **options: Any) -> DataLoader[Any]:
    return DataLoader(list(samples), **{"batch_size": 4, "collate_fn": batch_of, **options})  # type: ignore[arg-type]


class Encoder(LightningModule):
    """A sequence classifier as the Lightning documentation writes it."""

    def __init__(self, kind: str = "bert", attention: str = "sdpa", rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        size: dict[str, Any] = {"vocab_size": len(PIECES), "max_position_embeddings": 32, "num_labels": CLASSES}
        if kind == "bert":
            self.model: Any = BertForSequenceClassification(
                BertConfig(
                    **size,
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=24,
                    attn_implementation=attention,
                )
            )
        else:
            self.model = DistilBertForSequenceClassification(
                DistilBertConfig(**size, dim=16, n_layers=2, n_heads=2, hidden_dim=24, attn_implementation=attention)
            )

    def forward(self, **inputs: Tensor) -> Any:
        if self.hparams["kind"] != "bert":
            inputs.pop("token_type_ids", None)
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self(**batch)[0]
        self.log("train_loss", loss, on_step=True)
        return loss

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        logits: Tensor = self(**batch).logits
        return logits

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.hparams["rate"])


class LowRank(nn.Module):
    """A frozen linear layer with a trained product of two thin ones added."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.base(x) + self.up(self.down(x))
        return total


class Adapted(Encoder):
    """The base is frozen; low-rank additions to the attention, and the head, are trained."""

    def __init__(self, attention: str = "sdpa", rate: float = 0.3) -> None:
        super().__init__("bert", attention, rate)
        self.save_hyperparameters()
        self.model.bert.requires_grad_(False)
        for layer in self.model.bert.encoder.layer:
            layer.attention.self.query = LowRank(layer.attention.self.query)
            layer.attention.self.value = LowRank(layer.attention.self.value)


class TwoTexts(Encoder):
    """Premise and hypothesis go through the encoder apart, and the head sees their difference."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = (self.model.bert(**batch[name]).pooler_output for name in ("premise", "hypothesis"))
        return nn.functional.cross_entropy(self.model.classifier(first - second), batch["labels"])


class LanguageModel(LightningModule):
    """GPT-2 with its head tied to its word embeddings; the loss is a mean over the tokens of the batch."""

    def __init__(self, attention: str = "sdpa", rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        self.model: Any = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(PIECES),
                n_positions=32,
                n_embd=16,
                n_layer=2,
                n_head=2,
                attn_implementation=attention,
                **special,
            )
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["rate"])


def language_batch(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Padded token ids, and labels with -100 in place of the padding."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(sample["input_ids"]) for sample in samples], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}
