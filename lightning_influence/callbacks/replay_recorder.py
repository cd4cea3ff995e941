"""Replay: at a checkpoint the training set is walked at the weights of that moment, in eval mode and dataset order."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from tqdm.auto import tqdm

from lightning_influence.artifacts import Artifact, ArtifactStore, BackgroundWriter
from lightning_influence.callbacks.capture_plan import CapturePlan
from lightning_influence.errors import CaptureError, LossError
from lightning_influence.gradients import Gradients, cat, pack
from lightning_influence.objective import Objective, training_objective
from lightning_influence.replay import (
    Features,
    TrainingData,
    features_of,
    isolated,
    sample_gradients,
    shard_positions,
    walk,
)

_SHARD_BYTES = 64 << 20


def shard_size(bytes_per_sample: float, batch_size: int) -> int:
    """Samples of a shard: about 64 MiB of gradients, in whole batches."""
    batches = max(1, int(min(_SHARD_BYTES / max(1.0, bytes_per_sample), 16384) // batch_size))
    return batches * batch_size


def write_replay(
    store: ArtifactStore,
    plan: CapturePlan,
    data: TrainingData,
    module: LightningModule,
    trainer: Trainer,
    *,
    step: int,
    mark: int,
) -> list[Artifact]:
    """Write this rank's gradient shards of the present weights; they are not committed yet.

    Shards are spans of dataset positions, dealt out to the ranks in turn: files and values do not depend on how many
    processes wrote them.
    """
    spans = shard_positions(len(data), store.manifest.shard_size, trainer.global_rank, trainer.world_size)
    written: list[Artifact] = []
    # A failure must end the walk at once, not when the exception is forgotten: until then the module is isolated.
    with BackgroundWriter(max_pending=2) as writer, closing(_shards(plan, data, spans, module, trainer)) as shards:
        for span, gradients, records in shards:

            def write(span: range = span, g: Gradients = gradients, r: Mapping[str, Tensor] = records) -> None:
                written.append(store.write_gradients(step, mark, (span.start, span.stop), pack(g), r))

            writer.submit(write)
    return written


def _shards(
    plan: CapturePlan, data: TrainingData, spans: list[range], module: LightningModule, trainer: Trainer
) -> Generator[tuple[range, Gradients, Mapping[str, Tensor]], None, None]:
    """One shard's gradients and training-dynamics record at a time."""
    parts: list[Gradients] = []
    records: list[dict[str, Tensor]] = []
    remaining = iter(spans)
    span = next(remaining, None)
    bar = tqdm(total=sum(map(len, spans)), desc="per-sample gradients", unit="sample", delay=2.0, leave=False,
               disable=not trainer.is_global_zero or trainer.progress_bar_callback is None)  # fmt: skip
    watched = features_of(module) if plan.features else nullcontext(Features())
    with isolated(module, trainer) as manual_losses, bar, watched as features:
        for ids, batch in walk(data, spans, module, trainer):
            where = f"samples {ids.start} to {ids.stop - 1} of the training set"

            def objective(batch: Any = batch, count: int = len(ids)) -> Objective:
                features.seen.clear()  # a scaled backward that overflows runs again
                return training_objective(
                    module,
                    batch,
                    count,
                    per_sample_loss=plan.per_sample_loss,
                    reduction=plan.check.reduction,
                    manual_losses=manual_losses,
                )

            with _named(where):
                gradients, found = sample_gradients(module, plan.capture(), len(ids), objective, trainer)
                seen = {"features": features.rows(len(ids))} if plan.features else {}
            parts.append(plan.stored(gradients, where))
            records.append({k: v.cpu() for k, v in {**found.dynamics(), **seen}.items()})
            bar.update(len(ids))
            if span is not None and ids.stop == span.stop:
                yield span, cat(parts), _joined(records, [len(r) for r in _lengths(span, data.batch_size)])
                parts, records, span = [], [], next(remaining, None)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Say in which samples of the training set something was found."""
    try:
        yield
    except (CaptureError, LossError) as error:
        raise type(error)(
            f"{error.what}, in {where}", expected=error.expected, found=error.found, hint=error.hint
        ) from error


def _lengths(span: range, batch_size: int) -> list[range]:
    return [span[a : a + batch_size] for a in range(0, len(span), batch_size)]


def _joined(records: list[dict[str, Tensor]], sizes: list[int]) -> dict[str, Tensor]:
    """Records of several batches end to end, NaN where a batch has none."""
    names = {name for record in records for name in record}
    return {
        name: torch.cat([r.get(name, torch.full((n,), float("nan"))) for r, n in zip(records, sizes, strict=True)])
        for name in sorted(names)
    }
