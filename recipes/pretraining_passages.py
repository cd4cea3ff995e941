"""Which pretraining passages, and which of their words, made the finetuned model say this?

A small language model is pretrained on passages, its encoder finetuned to classify texts, and the finetuned model's
predictions are traced back through the link to the passages: influence functions with EK-FAC at both runs rank them,
TracIn-WE behind the same link says which words carry it.

python recipes/pretraining_passages.py                                                # docstrings, some minutes
python recipes/pretraining_passages.py setting=pretraining_passages_reviews data_root=/path/to/data
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_influence import (
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MultiStage,
    SmallProximity,
    StageLinker,
    TracInWE,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `recipes` is found however this is started
from recipes.data.corpus import Corpus
from recipes.data.text_data_module import EncodedTexts, Sample, collate
from recipes.data.vocabulary import Vocabulary
from recipes.language.models import LanguageModel, TextTask

SHARED = ("encoder.words.weight", "encoder.mix.weight", "encoder.mix.bias")


class Passages(Dataset[Sample]):
    """Passages as samples ``{"tokens": (T,)}``, cut to a length."""

    def __init__(self, texts: list[str], vocabulary: Vocabulary, max_tokens: int) -> None:
        self.tokens = [torch.tensor(vocabulary.encode(text, max_tokens)) for text in texts]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Sample:
        return {"tokens": self.tokens[index], "label": torch.tensor(0)}


def fitted(module: LightningModule, data: DataLoader[Any], epochs: int, folder: Path, *callbacks: Any) -> None:
    """An ordinary fit on the CPU."""
    Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=list(callbacks), enable_progress_bar=False,
    ).fit(module, data)  # fmt: skip


def shortened(text: str, words: int = 32) -> str:
    """The beginning of a passage, on one line and safe in a table."""
    parts = text.replace("|", "/").split()
    return " ".join(parts[:words]) + (" …" if len(parts) > words else "")


def chosen_queries(module: TextTask, texts: EncodedTexts, count: int) -> list[int]:
    """Held-out texts that the model classifies rightly: of each class in turn the one that it is surest of."""
    surest: dict[int, tuple[float, int]] = {}
    with torch.no_grad():
        for position in range(len(texts)):
            sample, label = texts[position], int(texts.labels[position])
            p = module(sample["tokens"][None]).softmax(1)[0]
            if int(p.argmax()) == label:
                surest[label] = max(surest.get(label, (0.0, position)), (float(p[label]), position))
    return [position for _, position in (surest[label] for label in sorted(surest))][:count]


def told(
    text: str, label: str, passages: list[str], scores: Tensor, best: list[int], words: list[list[Any]]
) -> list[str]:
    """One query as a piece of the report."""
    head = ("| score | passage | words that carry it |", "|---|---|---|")
    lines = [f"> {shortened(text, 60)}", "", f"Predicted and right: **{label}**.", "", *head]
    for sample, carried in zip(best, words, strict=True):
        named = ", ".join(f"{w.word} ({w.score:+.2g})" for w in carried[:5]) or "no word in common"
        lines.append(f"| {float(scores[sample]):+.3g} | {shortened(passages[sample])} | {named} |")
    return [*lines, ""]


def report(config: DictConfig) -> str:
    """Both fits, all questions, and the page that answers them."""
    seed_everything(config.seed, workers=True, verbose=False)
    torch.set_num_threads(1)
    passages: list[str] = instantiate(config.passages).load()
    corpus: Corpus = instantiate(config.task).load()
    vocabulary = Vocabulary.build([*passages, *corpus.train_texts], config.vocabulary_size, config.min_count)
    store, began = Path(config.store), time.perf_counter()

    def loader(dataset: Dataset[Sample], shuffle: bool = True) -> DataLoader[Any]:
        return DataLoader(dataset, config.batch_size, shuffle=shuffle, collate_fn=collate)

    read = Passages(passages, vocabulary, config.max_tokens)
    language = LanguageModel(len(vocabulary), config.width, config.context)
    fitted(
        language, loader(read), config.pretraining_epochs, store,
        GradientSnapshot(store / "pretraining", SHARED, every_n_epochs=config.pretraining_epochs),
        CurvatureSnapshot(store / "pretraining", "ekfac", parameters=SHARED),
    )  # fmt: skip
    task = TextTask(len(vocabulary), len(corpus.label_names), config.width, config.context)
    task.encoder.load_state_dict(language.encoder.state_dict())
    training = EncodedTexts(corpus.train_texts, corpus.train_labels, vocabulary, config.max_tokens)
    fitted(
        task, loader(training), config.finetuning_epochs, store,
        CurvatureSnapshot(store / "finetuning", "ekfac"),
        StageLinker(store / "finetuning", pretrain=store / "pretraining"),
    )  # fmt: skip
    task.eval()
    held_out = EncodedTexts(corpus.test_texts, corpus.test_labels, vocabulary, config.max_tokens)
    with torch.no_grad():
        right = [int(task(b["tokens"]).argmax(1).eq(b["label"]).sum()) for b in loader(held_out, False)]
    queries = chosen_queries(task, held_out, config.queries)
    batch = collate([held_out[position] for position in queries])
    ranked = InfluenceModule(task, store / "finetuning", MultiStage(InfluenceFunction("ekfac")))
    by_words = InfluenceModule(task, store / "finetuning", MultiStage(TracInWE(), SmallProximity(), module=language))
    scores = ranked.scores(batch)
    best = scores.topk(config.k, dim=1).indices
    words = by_words.words(batch, best, decode=vocabulary.decode)
    lines = [
        f"# Pretraining passages behind a prediction: {config.title}",
        "",
        f"`{config.command}`",
        "",
        f"{len(passages)} passages, a vocabulary of {len(vocabulary)} words, {len(corpus.train_texts)} texts to "
        f"finetune on; accuracy on {len(held_out)} held-out texts {sum(right) / len(held_out):.3f}; "
        f"{(time.perf_counter() - began) / 60:.1f} minutes. Passages are ranked by "
        "`MultiStage(InfluenceFunction('ekfac'))`, words by `MultiStage(TracInWE(), SmallProximity())`; the encoder "
        "was tuned. Positive: without the passage, the loss of the prediction would rise.",
        "",
    ]
    for row, position in enumerate(queries):
        text, label = str(corpus.test_texts[position]), corpus.label_names[corpus.test_labels[position]]
        lines += told(text, label, passages, scores[row], best[row].tolist(), words[row])
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path="../configs", config_name="pretraining_passages")
def main(config: DictConfig) -> None:
    """Answer, print and write the page."""
    page = report(config)
    path = Path(config.results).with_suffix(".md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
