"""Two gloo processes, of which one may see nothing, each writing what it computes (test_two_processes.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from lightning_influence.metrics import CancellationRatio, CaseDeletion, LinearDatamodelingScore, MislabelDetection
from tests.metrics.merging import numbers


def results(rank: int, world: int, shared: bool) -> dict[str, list[float]]:
    """What the metrics say after this rank's part of the batches; not shared, rank 0 has all of them."""

    def mine(number: int) -> bool:
        return number % world == rank if shared else rank == 0

    generator = torch.Generator().manual_seed(0)
    scores, measurements = torch.randn(5, 40, generator=generator), torch.randn(30, 2, 5, generator=generator)
    subsets = torch.rand(30, 40, generator=generator) < 0.5
    before, proponents, opponents = (torch.rand(5, *shape, generator=generator) for shape in ((), (3,), (3,)))
    suspicion, flags = torch.rand(5, generator=generator), torch.tensor([True, False, True, False, False])
    shapes = {"head.weight": (2, 3), "head.bias": (2,)}
    rows = {name: torch.randn(5, *shape, generator=generator) for name, shape in shapes.items()}
    lds, mislabels = LinearDatamodelingScore(subsets, resamples=300), MislabelDetection()
    deletion = CaseDeletion((1, 2, 3), resamples=300)
    cancellation = CancellationRatio(shapes)
    for number, part in enumerate((slice(2), slice(2, 3), slice(3, 5))):
        if mine(number):
            lds.update(scores[part], measurements[:, :, part])
            deletion.update(before[part], proponents[part], opponents[part])
            mislabels.update(suspicion[part], flags[part])
            cancellation.update({name: values[part] for name, values in rows.items()})
    metrics = {"lds": lds, "deletion": deletion, "mislabels": mislabels, "cancellation": cancellation}
    for metric in metrics.values():
        metric._update_count = 1  # a process that saw nothing would be warned of it
    return {name: numbers(metric.compute()) for name, metric in metrics.items()}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {"shared": results(rank, 2, True), "all on one": results(rank, 2, False)}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    multiprocessing.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")
