"""What a store must hold at the end: what the diaries of its fit say, and what that of an undisturbed fit holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_influence import ArtifactStore
from lightning_influence.artifacts import Shard, StepRange
from lightning_influence.gradients import unpack
from recipes.crashes.fits import SAMPLES, Case, Diarist, Sentences, digest


@dataclass
class Outcome:
    """What happened to one case."""

    case: str
    kills: dict[str, int] = field(default_factory=dict)
    refused: int = 0  # starts on a folder with data and no Lightning checkpoint
    untidy: int = 0  # stores with an unfinished or unlisted file at a restart
    problems: list[str] = field(default_factory=list)
    same: bool | None = None  # as an uninterrupted fit
    records: int = 0


def examine(case: Case, whole: Path, broken: Path, outcome: Outcome) -> None:
    """Compare the store with the diaries of its fit, and with the store of the uninterrupted fit."""
    store, undisturbed = (ArtifactStore.open(each / "store") for each in (broken, whole))
    pages = lineage(broken, case.ranks)
    outcome.problems += store.verify() + undisturbed.verify()
    outcome.problems += [f"diary: {p}" for p in beside_diary(case, store, pages)]
    outcome.problems += [f"undisturbed: {p}" for p in beside_diary(case, undisturbed, lineage(whole, case.ranks))]
    differences = list(unequal(content(case, store), content(case, undisturbed)))
    outcome.same = not differences
    if case.same_order:
        outcome.problems += [f"not as uninterrupted: {each}" for each in differences[:3]]
    outcome.records = sum(shard.num_samples for shard in _shards(case, store))


def _shards(case: Case, store: ArtifactStore) -> list[Shard]:
    if case.mode == "in_flight":
        return list(store.shards(StepRange(0, 1 << 40)))
    return [shard for checkpoint in store.checkpoints() for shard in store.shards(checkpoint)]


def lineage(folder: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """By rank, the steps that led to the final weights: a resumed fit takes back what came after its checkpoint."""
    pages: list[list[dict[str, Any]]] = []
    for rank in range(ranks):
        page: list[dict[str, Any]] = []
        for path in sorted(folder.glob(f"diary-*-rank{rank}.jsonl")):
            for line in path.read_bytes().split(b"\n")[:-1]:
                entry = json.loads(line)
                assert entry["batch"] <= len(page) + 1, f"{path}: a gap before batch {entry['batch']}"
                page = [*page[: entry["batch"] - 1], entry]
        pages.append(page)
    return pages


def beside_diary(case: Case, store: ArtifactStore, pages: list[list[dict[str, Any]]]) -> Iterator[str]:
    """Where a store says something else than the diaries of its fit, or than autograd at its weights."""
    entries, model = pages[0], Diarist()
    expected = [entry["batch"] for entry in entries if entry["last"]]  # of its epoch
    if case.mode == "in_flight":
        expected = [0, *expected]
    found = [checkpoint.step for checkpoint in store.checkpoints()]
    if found != expected or any(c.mark != c.step for c in store.checkpoints()):
        yield f"checkpoints at {found}, not {expected}"
    before = 0
    for checkpoint in store.checkpoints():
        step, (group,) = checkpoint.step, checkpoint.groups
        total = 0.0
        for entry in entries[before:step]:
            total += entry["rate"]
        if step and (group.learning_rate, group.learning_rate_sum) != (entries[step - 1]["rate"], total):
            yield f"step {step}: rate {group.learning_rate}, sum {group.learning_rate_sum}, not {total}"
        if step and digest(store.weights(checkpoint)) != entries[step - 1]["weights"]:
            yield f"step {step}: other weights"
        before = step
        model.load_state_dict(store.weights(checkpoint))
        if case.mode == "replay":
            rows = replayed(store, store.shards(checkpoint))
            samples = dict(enumerate(range(0, SAMPLES, 7)))
            if rows["ids"].tolist() != list(range(SAMPLES)):
                yield f"step {step}: not every sample once"
            rows = {name: rows[name][::7] for name in rows}
            yield from (f"step {step}: {p}" for p in _beside_autograd(model, rows, samples))
        for rank, page in enumerate(pages if case.mode == "in_flight" else []):
            rows, after = in_flight(store, rank), page[step : step + 1]
            at = sum(len(entry["ids"]) for entry in page[:step])
            samples = {at + k: i for entry in after for k, i in enumerate(entry["ids"])}
            yield from (f"rank {rank}, step {step + 1}: {p}" for p in _beside_autograd(model, rows, samples))
    for rank, page in enumerate(pages if case.mode == "in_flight" else []):
        rows = in_flight(store, rank)
        if not len(rows["ids"]):
            yield f"rank {rank}: no records"
            continue
        said = (rows["ids"].tolist(), rows["step"].tolist(), rows["rates"][:, 0].tolist(), rows["batch_size"].tolist())
        used = [(i, e["batch"], e["rate"], len(e["ids"]) * case.ranks) for e in page for i in e["ids"]]
        if list(zip(*said, strict=True)) != used:
            yield f"rank {rank}: {len(said[0])} records, not the {len(used)} that were used"


def _beside_autograd(model: Diarist, rows: dict[str, Tensor], samples: dict[int, int]) -> Iterator[str]:
    data = Sentences()
    for row, i in samples.items():
        loss = F.cross_entropy(model(data[i]["words"][None]), data[i]["label"][None])
        for (name, _), gradient in zip(
            model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            if not torch.allclose(rows[name][row], gradient, rtol=1e-4, atol=1e-6):
                yield f"{name} of sample {i} is not its gradient"


def in_flight(store: ArtifactStore, rank: int) -> dict[str, Tensor]:
    """The records of one rank, end to end in the order of their batches."""
    chunks = sorted((a for a in store.artifacts("in_flight") if a.rank == rank), key=lambda a: a.mark)
    return replayed(store, tuple(Shard(store._file(a.path), (0, SAMPLES)) for a in chunks))


def replayed(store: ArtifactStore, shards: tuple[Shard, ...]) -> dict[str, Tensor]:
    """Ids, records and dense gradients of shards, end to end."""
    names = ["ids", *(n for n, _ in Diarist().named_parameters()), *(shards[0].records if shards else ())]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for shard in shards:
        dense = {name: block.dense() for name, block in unpack(shard.tensors).items()}
        for name, value in {"ids": shard.sample_ids, **dense, **shard.records}.items():
            parts[name].append(value)
    return {name: torch.cat(part) if part else torch.zeros(0) for name, part in parts.items()}


def content(case: Case, store: ArtifactStore) -> dict[str, Any]:
    """Everything that a store holds, apart from how it is cut into files."""
    whole: dict[str, Any] = {"checkpoints": [c.to_json() for c in store.checkpoints()]}
    for checkpoint in store.checkpoints():
        whole[f"weights {checkpoint.step}"] = store.weights(checkpoint)
        if checkpoint.step:
            whole[f"denominators {checkpoint.step}"] = store.preconditioner(checkpoint)
        if case.mode == "replay":
            whole[f"gradients {checkpoint.step}"] = replayed(store, store.shards(checkpoint))
    if case.mode == "in_flight":
        whole |= {f"records of rank {rank}": in_flight(store, rank) for rank in range(case.ranks)}
    return whole


def unequal(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested contents differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted({*a, *b}):
            yield from unequal(a.get(name), b.get(name), f"{where}{' / ' if where else ''}{name}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif isinstance(a, Tensor) or isinstance(b, Tensor) or a != b:
        yield where
