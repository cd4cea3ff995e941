"""A fit that goes on from the middle of an epoch: ids stay right, and batches are those of the untracked fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_influence.samples import SampleTracker
from tests.samples.harness import LOADER_WARNINGS, Model, Outcome, Positions, Recorder, loader, trainer

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in LOADER_WARNINGS),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]
EPOCH, STOP = 6, 3  # batches


class Resumable(DataLoader[Any]):
    """The least that Lightning takes for a loader that can resume: it counts its batches and skips as many."""

    served = skip = 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["served"]

    def __iter__(self) -> Any:
        batches, self.served = super().__iter__(), 0
        for batch in batches:
            self.served += 1
            if self.served > self.skip:
                yield batch
        self.skip = 0


class Counting(Positions):
    """A dataset with a state of its own, which stateful loaders save through the dataset they are shown."""

    reads = 0

    def __getitem__(self, position: int) -> Any:
        self.reads += 1
        return super().__getitem__(position)

    def state_dict(self) -> dict[str, int]:
        return {"reads": self.reads}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.reads = state["reads"]


class Save(Callback):
    """Saves after batch STOP of the second epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, runner: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if runner.current_epoch == 1 and index == STOP - 1:
            runner.save_checkpoint(self.path)


def resumed(make: Callable[[], Any], track: bool, path: Path) -> tuple[Outcome, Outcome]:
    whole, rest = (Recorder(SampleTracker() if track else None) for _ in range(2))
    torch.manual_seed(7)
    trainer(whole, Save(path)).fit(Model(), make())
    trainer(rest).fit(Model(), make(), ckpt_path=path)
    return whole.outcome, rest.outcome


def check(make: Callable[[], Any], tmp_path: Path) -> tuple[Outcome, Outcome]:
    tracked, plain = (resumed(make, track, tmp_path / f"{track}.ckpt") for track in (True, False))
    for ours, theirs in zip(tracked, plain, strict=True):
        assert ours.known == ours.truth == theirs.truth
        assert ours.weights == theirs.weights
    return tracked


@pytest.mark.parametrize("workers", [0, 1])
def test_plain_loader_starts_its_epoch_again(workers: int, tmp_path: Path) -> None:
    _, rest = check(lambda: loader(shuffle=True, num_workers=workers), tmp_path)
    assert EPOCH - STOP <= len(rest.known) < EPOCH, "Lightning takes what is left of the epoch from its start"


@pytest.mark.parametrize("workers", [0, 1])
def test_resumable_loader_goes_on(workers: int, tmp_path: Path) -> None:
    order = torch.randperm(22, generator=torch.Generator().manual_seed(5)).tolist()
    whole, rest = check(lambda: Resumable(Positions(), 4, sampler=order, num_workers=workers), tmp_path)
    assert rest.known == whole.known[EPOCH + STOP :]
    assert rest.weights == whole.weights


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own, on new torch
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Positions, Counting])
def test_stateful_data_loader_goes_on(data: type[Positions], workers: int, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    whole, rest = check(lambda: stateful(data(), batch_size=4, shuffle=True, num_workers=workers), tmp_path)
    assert rest.known == whole.known[EPOCH + STOP :]
    assert rest.weights == whole.weights


def test_state_of_a_dataset_is_found_behind_the_tags() -> None:
    from typing import Protocol, runtime_checkable

    from lightning_influence.samples.tagging import _tagging

    @runtime_checkable
    class Stateful(Protocol):
        def state_dict(self) -> Any: ...
        def load_state_dict(self, state: Any) -> None: ...

    stateful, plain = _tagging(Counting()), _tagging(Positions())
    assert isinstance(stateful, Stateful) and not isinstance(plain, Stateful)
    stateful.load_state_dict({"reads": 3})
    assert stateful.state_dict() == {"reads": 3} and stateful.length == 22
