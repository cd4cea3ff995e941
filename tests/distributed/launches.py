"""Fits on two gloo processes, one after the other in one pair of processes, each rank writing what it did."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from lightning_influence import CurvatureSnapshot, GradientSnapshot, StageLinker, link_checkpoint
from lightning_influence.callbacks import replay_recorder
from lightning_influence.curvature import Diagonal
from lightning_influence.errors import InfluenceError
from tests.distributed.model import Classifier, Watch, loader, trainer

SMALL = 1 << 10


class SmallShards(Callback):
    """So few samples are several shards, in spawned processes too."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        replay_recorder._SHARD_BYTES = SMALL


def snapshot(folder: str, name: str, mode: str) -> GradientSnapshot:
    """The folder of the store differs between ranks, as a time stamp would."""
    rank = os.environ.get("LOCAL_RANK", "0")
    store = f"{folder}/{name}" if rank == "0" else f"{folder}/{name}-of-rank-{rank}"
    return GradientSnapshot(store, ["word_embeddings", "last_layer"], mode=mode)


def fit(folder: str, strategy: str, what: str) -> None:
    """`what` is "plain", a mode, or "resumed": in flight, in two fits of an epoch each."""
    name, mode = f"{strategy}-{what}", what.replace("resumed", "in_flight")
    options: dict[str, Any] = {"strategy": strategy, "devices": 2, "accumulate_grad_batches": 2}
    ends = [1, 2] if what == "resumed" else [2]
    path = f"{folder}/{name}.ckpt"
    for end in ends:
        torch.manual_seed(7)
        ours = [] if what == "plain" else [snapshot(folder, name, mode)]
        runner = trainer(Watch(f"{folder}/{name}-{end}"), SmallShards(), *ours, **options, max_epochs=end)
        model = Classifier(spare="unused" in strategy)
        runner.fit(model, loader(shuffle=True), ckpt_path=path if end > ends[0] else None, weights_only=False)
        if what == "resumed":
            runner.save_checkpoint(path)


def curvature(folder: str, what: str) -> None:
    """In double precision: `what` is "plain", or gradients and curvatures in one store, by replay or in flight."""
    store = snapshot(folder, what, "replay").store
    ours: dict[str, list[Callback]] = {
        "plain": [],
        "curvature": [
            CurvatureSnapshot(store, labels="sampled", seed=5, at_steps=[4]),
            GradientSnapshot(store, "head.*", dtype="float64", every_n_epochs=2),
            CurvatureSnapshot(store, Diagonal(), at_most=21, batch_size=3, every_n_epochs=1),
        ],
        "curvature_in_flight": [
            GradientSnapshot(store, "*", mode="in_flight", dtype="float64"),
            CurvatureSnapshot(store, Diagonal(), mode="in_flight"),
        ],
    }
    torch.manual_seed(7)
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2, "precision": "64-true"}
    runner = trainer(Watch(f"{folder}/{what}"), *ours[what], **options)
    runner.fit(Classifier(), loader(shuffle=True))


def stages(folder: str, what: str) -> None:
    """A finetuning run that begins at the embedding of a store: "alone", "beside" a curvature, or without a "link"."""
    pretrained = Classifier()
    torch.manual_seed(3)
    with torch.no_grad():
        pretrained.embedding.weight.normal_()
    if os.environ.get("LOCAL_RANK", "0") == "0" and not Path(folder, "pretraining").exists():
        link_checkpoint(pretrained, f"{folder}/pretraining", loader(), statistics=None)
    store = snapshot(folder, what, "replay").store
    linker = StageLinker(store, pretrain=f"{folder}/pretraining", fresh="head.*")
    ours: dict[str, list[Callback]] = {"link": [], "alone": [linker], "beside": [linker, CurvatureSnapshot(store)]}
    torch.manual_seed(7)
    module = Classifier()
    module.embedding.load_state_dict(pretrained.embedding.state_dict())
    trainer(Watch(f"{folder}/{what}"), *ours[what], strategy="ddp", devices=2).fit(module, loader(shuffle=True))


def refusals(folder: str) -> None:
    """Both ranks end, rank zero with the library's own error, where it finds a folder that is not empty."""
    Path(folder, "full").mkdir(exist_ok=True)
    Path(folder, "full", "notes.txt").write_text("mine")
    try:
        trainer(GradientSnapshot(f"{folder}/full"), strategy="ddp", devices=2).fit(Classifier(), loader())
    except (InfluenceError, RuntimeError) as error:
        Path(f"{folder}/refused-rank{os.environ.get('LOCAL_RANK', '0')}.txt").write_text(repr(error))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for launch in sys.argv[2:]:
        strategy, _, what = launch.partition(":")
        if what == "refusals":
            refusals(sys.argv[1])
        elif strategy == "curvature":
            curvature(sys.argv[1], what)
        elif strategy == "stages":
            stages(sys.argv[1], what)
        else:
            fit(sys.argv[1], strategy, what)
