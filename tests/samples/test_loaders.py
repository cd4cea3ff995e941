"""Every kind of training loader: the tracker's ids are the truth inside the batch, the fit is unchanged."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_influence.samples import SampleTracker
from tests.samples.harness import (
    LOADER_WARNINGS,
    Model,
    Outcome,
    Positions,
    Recorder,
    Stream,
    fit,
    loader,
    trainer,
)

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LOADER_WARNINGS]


class Backwards(Sampler[list[int]]):
    """A batch sampler that owes nothing to torch's."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start + 2, start - 1, -1)) for start in reversed(range(0, self.length - 2, 3)))

    def __len__(self) -> int:
        return self.length // 3


class Bulk(Positions):
    """Reads many positions at once, as databases like it."""

    def __getitem__(self, positions: Any) -> Any:
        return default_collate([super(Bulk, self).__getitem__(position) for position in positions])


class Single(Positions):
    """Items are batches of one."""

    def __getitem__(self, position: int) -> Any:
        return default_collate([super().__getitem__(position)])


class Together(Positions):
    """Has a __getitems__ of its own that shows in the data, and returns something that is no list."""

    def __getitems__(self, positions: list[int]) -> tuple[Any, ...]:
        return tuple({**self[position], "together": len(positions)} for position in positions)


class Own(DataLoader[Any]):
    """Has another constructor, and a collate function that is a method and reads the loader's dataset."""

    def __init__(self, dataset: Positions, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, batch_size=batch_size, collate_fn=self.collate, **options)

    def collate(self, samples: list[Any]) -> Any:
        assert torch.equal(samples[0]["x"], self.dataset[samples[0]["position"]]["x"])
        return default_collate(samples)


class Iterating(DataLoader[Any]):
    def __iter__(self) -> Any:
        for batch in super().__iter__():
            yield {**batch, "seen": True}


class Ahead(DataLoader[Any]):
    """Fetches one batch ahead and leaves out every third."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        waiting = next(batches)
        for i, batch in enumerate(batches):
            if i % 3:
                yield waiting
            waiting = batch
        yield waiting


class Aware(Positions):
    """Asks in its worker which dataset it is."""

    def __getitem__(self, position: int) -> Any:
        info = get_worker_info()
        assert info is None or isinstance(info.dataset, Aware)
        return super().__getitem__(position)


def mind_the_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None and info.id == worker and isinstance(info.dataset, Aware)


class Uneven(Positions):
    """The first batches take longest, so that workers overtake each other."""

    def __getitem__(self, position: int) -> Any:
        time.sleep(0.02 if position % 8 < 4 else 0.0)
        return super().__getitem__(position)


def subset() -> DataLoader[Any]:
    part = Subset(Positions(30), list(range(29, 7, -1)))
    return DataLoader(part, batch_size=4, shuffle=True, collate_fn=within_subset)


def within_subset(samples: list[Any]) -> Any:  # Subset position i shows sample 29 - i
    return default_collate([{**sample, "position": 29 - sample["position"]} for sample in samples])


def combined(mode: Any) -> CombinedLoader:
    return CombinedLoader({"a": loader(9, shuffle=True), "b": [loader(22, num_workers=1), loader(15)]}, mode)


def twice(mode: Any) -> CombinedLoader:
    both = loader(shuffle=True)
    return CombinedLoader([both, both], mode)


LOADERS: dict[str, Any] = {
    "sequential": lambda: loader(),
    "shuffle": lambda: loader(shuffle=True),
    "generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "one worker": lambda: loader(shuffle=True, num_workers=1),
    "two workers": lambda: loader(shuffle=True, num_workers=2),
    "prefetch": lambda: loader(shuffle=True, num_workers=2, prefetch_factor=4),
    "persistent": lambda: loader(shuffle=True, num_workers=2, persistent_workers=True),
    "worker init": lambda: DataLoader(Aware(22), 4, num_workers=1, worker_init_fn=mind_the_worker),
    "drop last": lambda: loader(shuffle=True, drop_last=True),
    "batch sampler": lambda: DataLoader(Positions(), batch_sampler=Backwards(22)),
    "batch sampler, workers": lambda: DataLoader(Positions(), batch_sampler=Backwards(22), num_workers=2),
    "weighted": lambda: DataLoader(Positions(), 4, sampler=WeightedRandomSampler(torch.ones(22).tolist(), 22)),
    "subset": subset,
    "no batches": lambda: DataLoader(Single(7), batch_size=None, shuffle=True),
    "bulk": lambda: DataLoader(
        Bulk(), batch_size=None, sampler=BatchSampler(RandomSampler(Positions()), 4, drop_last=False)
    ),
    "getitems": lambda: DataLoader(Together(), batch_size=4, shuffle=True, num_workers=1),
    "loader class": lambda: Own(Positions(), 4, shuffle=True),
    "loader class, workers": lambda: Own(Positions(), 4, shuffle=True, num_workers=1),
    "own iter": lambda: Iterating(Positions(), 4, shuffle=True, num_workers=1),
    "runs ahead": lambda: Ahead(Positions(), 3, shuffle=True),
    "list": lambda: [loader(9, shuffle=True), loader(22, shuffle=True)],
    "min_size": lambda: combined("min_size"),
    "max_size": lambda: combined("max_size"),
    "max_size_cycle": lambda: combined("max_size_cycle"),
    "same loader twice": lambda: twice("min_size"),
}


def same_with_and_without(make: Any, **options: Any) -> Outcome:
    tracked, plain = fit(make, SampleTracker(), **options), fit(make, None, **options)
    assert tracked.truth, "the fit had no batches"
    assert tracked.known == tracked.truth
    assert tracked.truth == plain.truth
    assert tracked.weights == plain.weights
    return tracked


@pytest.mark.parametrize("name", LOADERS)
def test_ids_are_the_truth_and_nothing_changes(name: str) -> None:
    outcome = same_with_and_without(LOADERS[name])
    if name in ("drop last", "no batches"):
        assert {len(row) for step in outcome.truth for row in step if row} == {4 if name == "drop last" else 1}
    if name == "max_size":
        assert any(row is None for step in outcome.known for row in step)


def test_spawned_workers() -> None:
    def spawned() -> Any:
        return Own(Positions(8), 4, shuffle=True, num_workers=1, multiprocessing_context="spawn")

    tracked = fit(spawned, SampleTracker(), max_epochs=1)
    plain = fit(lambda: Own(Positions(8), 4, shuffle=True, num_workers=1), None, max_epochs=1)
    assert tracked.known == tracked.truth == plain.truth
    assert tracked.weights == plain.weights


def test_batches_out_of_order() -> None:
    def overtaking() -> Any:
        return DataLoader(Uneven(44), batch_size=4, shuffle=False, num_workers=2, in_order=False)

    tracked = fit(overtaking, SampleTracker(), max_epochs=1)
    assert tracked.known == tracked.truth
    assert sorted(row for step in tracked.known for rows in step if rows for row in rows) == list(range(44))
    assert tracked.known != sorted(tracked.known), "this machine returned every batch in order: nothing was tested"


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"accumulate_grad_batches": 3},
        {"overfit_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
def test_trainer_options(options: dict[str, Any], workers: int) -> None:
    same_with_and_without(lambda: loader(shuffle=True, num_workers=workers), **options)


@pytest.mark.parametrize("sample_id", ["position", lambda batch: batch["position"].tolist()], ids=["key", "function"])
@pytest.mark.parametrize("workers", [0, 1])
def test_streams_with_sample_id(sample_id: Any, workers: int) -> None:
    def stream() -> Any:
        return DataLoader(Stream(), batch_size=4, num_workers=workers)  # no length: Lightning fetches ahead

    tracked, plain = fit(stream, SampleTracker(sample_id)), fit(stream, None)
    assert tracked.known == tracked.truth == plain.truth
    assert tracked.weights == plain.weights


def test_iterable_that_is_no_dataloader_with_sample_id() -> None:
    tracked = fit(lambda: {"a": Batches(), "b": loader(shuffle=True)}, SampleTracker("position"))
    assert tracked.known == tracked.truth and len(tracked.known[0]) == 2


class Batches:
    def __iter__(self) -> Any:
        return iter(list(loader()))


def test_collate_that_drops_samples_with_sample_id() -> None:
    def dropping() -> Any:
        return loader(collate_fn=lambda samples: default_collate(samples[::2]))

    tracked = fit(dropping, SampleTracker("position"))
    assert tracked.known == tracked.truth


def test_unlimited_loader_is_fetched_ahead() -> None:
    class Endless(DataLoader[Any]):
        def __len__(self) -> int:
            raise TypeError("nobody knows")

    same_with_and_without(lambda: Endless(Positions(), batch_size=4, shuffle=True), limit_train_batches=4)


def test_steps_that_nobody_asks_about() -> None:
    assert (outcome := fit(lambda: loader(shuffle=True), SampleTracker(), every=3)).known == outcome.truth
    assert len(outcome.known) == 4


def test_batches_that_are_none_are_skipped() -> None:
    def sometimes() -> Any:
        return loader(collate_fn=lambda samples: None if samples[0]["position"] == 8 else default_collate(samples))

    with pytest.warns(UserWarning, match="yielded None"):
        outcome = fit(sometimes, SampleTracker())
    assert outcome.known == outcome.truth and len(outcome.known) == 10


def test_two_fits_with_one_trainer() -> None:
    def fits(tracker: SampleTracker | None) -> Outcome:
        torch.manual_seed(7)
        recorder, data = Recorder(tracker), loader(shuffle=True, num_workers=1, persistent_workers=True)
        model, runner = Model(), trainer(recorder)
        runner.fit(model, data)
        runner.fit_loop.max_epochs = 4
        runner.fit(model, data)
        return recorder.outcome

    tracked, plain = fits(SampleTracker()), fits(None)
    assert tracked.known == tracked.truth == plain.truth
    assert tracked.weights == plain.weights
    assert len(tracked.known) == 4 * 6


def test_two_trackers_on_one_trainer() -> None:
    torch.manual_seed(7)
    first, second, third = (Recorder(SampleTracker(by)) for by in (None, None, "position"))
    data = loader(shuffle=True)
    trainer(first, second, third).fit(Model(), data)
    assert first.outcome.known == second.outcome.known == third.outcome.known == first.outcome.truth
    assert type(data) is DataLoader


@pytest.mark.parametrize("first", [True, False])
def test_learning_rate_finder(first: bool, tmp_path: Any) -> None:
    def fits(tracker: SampleTracker | None) -> Outcome:
        torch.manual_seed(7)
        recorder = Recorder(tracker)
        finder = LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
        callbacks = [finder, recorder] if first else [recorder, finder]
        trainer(*callbacks, default_root_dir=tmp_path).fit(Model(), loader(shuffle=True))
        return recorder.outcome

    tracked, plain = fits(SampleTracker()), fits(None)
    assert tracked.known == tracked.truth == plain.truth
    assert tracked.weights == plain.weights


@pytest.mark.parametrize("first", [True, False])
def test_batch_size_finder(first: bool, tmp_path: Any) -> None:
    class Sized(Model):
        def train_dataloader(self) -> Any:
            return loader(64, batch_size=self.batch_size, shuffle=True)

    def fits(tracker: SampleTracker | None) -> Outcome:
        torch.manual_seed(7)
        recorder = Recorder(tracker)
        finder = BatchSizeFinder(steps_per_trial=2, max_trials=3)
        callbacks = [finder, recorder] if first else [recorder, finder]
        trainer(*callbacks, default_root_dir=tmp_path).fit(Sized())
        return recorder.outcome

    tracked, plain = fits(SampleTracker()), fits(None)
    assert tracked.known == tracked.truth == plain.truth
    assert tracked.weights == plain.weights
    assert len(tracked.known[-1][0] or []) > 4


def test_somebody_else_reads_the_loader_during_the_fit() -> None:
    class Peeking(Recorder):
        def on_train_batch_end(self, runner: Any, *args: Any) -> None:
            assert "x" in next(iter(runner.train_dataloader))  # as a callback that re-estimates batch norm would

    torch.manual_seed(7)
    peeking = Peeking(SampleTracker())
    trainer(peeking).fit(Model(), loader(shuffle=True))
    assert peeking.outcome.known == peeking.outcome.truth
    assert len(peeking.outcome.known) == 12


def test_order_of_a_sequential_loader_is_by_position() -> None:
    outcome = fit(lambda: DataLoader(Positions(10), 4, sampler=SequentialSampler(Positions(10))), SampleTracker())
    assert outcome.known == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]] * 2
