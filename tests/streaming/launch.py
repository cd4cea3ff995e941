"""Streams training data on two gloo processes, each rank writing what it knows afterwards (test_ddp.py)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_influence import CaptureError, InfluenceError, InfluenceModule, TracIn
from lightning_influence.streaming import stream
from tests.stores import quiet
from tests.streaming.models import SAMPLES, Case, close, table


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    case, options = Case("text", folder / f"store-{os.getpid()}"), {"strategy": "ddp", "devices": 2}
    trainer = quiet(**options)
    influence = case.influence(TracIn())
    stored = influence.scores(case.batch(case.asked))
    path, found = folder / "scores.safetensors", {}

    def asked() -> InfluenceModule:
        influence = case.influence(TracIn())
        influence.prepare(case.loader(case.asked))
        return influence

    influence = asked()
    trainer.predict(influence, case.loader(case.train, 4))
    close(table(influence), stored)
    quiet(**options, use_distributed_sampler=False).predict(influence, case.loader(case.train, 4))
    close(table(influence), stored)
    influence.k = 6
    influence.prepare(case.loader(case.asked), scores_file=path)
    quiet(**options, limit_predict_batches=1).predict(influence, case.loader(case.train, 3))
    found["not scored"] = int(influence.streamed_scores.isnan().any(0).sum())
    influence.k = SAMPLES
    influence.prepare(case.loader(case.asked), scores_file=path)
    quiet(**options).predict(influence, case.loader(case.train, 2))
    close(influence.streamed_scores.double(), stored, 1e-6)
    close(table(influence).double(), stored, 1e-6)

    rank, score = torch.distributed.get_rank(), stream.batch_scores

    def failing(*args: Any) -> Any:
        if rank == 1:
            raise CaptureError("refused on one rank", hint="none")
        return score(*args)

    stream.batch_scores = failing
    try:
        quiet(**options).predict(asked(), case.loader(case.train, 4))
    except InfluenceError as error:
        found["one rank"] = str(error)
    found["k"] = influence.attribution.proponents.sample_ids.shape[1]
    assert found["k"] == SAMPLES
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
