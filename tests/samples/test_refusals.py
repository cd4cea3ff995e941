"""Where positions cannot be known the tracker says so in time, and everything is as it was before."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.utils.data._utils.pin_memory as torch_pin
from lightning.pytorch import Callback
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher, _PrefetchDataFetcher
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, default_collate

from lightning_influence.errors import SampleIdError, UnsupportedError
from lightning_influence.samples import SampleTracker
from lightning_influence.samples.tagging import Gate, Tagged, track, untrack
from lightning_influence.samples.tracking import _check_size
from tests.samples.harness import LOADER_WARNINGS, Model, Positions, Recorder, Stream, loader, trainer
from tests.samples.test_loaders import Own

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LOADER_WARNINGS]


class Batches:
    def __iter__(self) -> Iterator[Any]:
        return iter(list(loader()))


class Batched(Positions):
    """Items are batches of three that nobody asked for by position."""

    def __getitem__(self, position: int) -> Any:
        return default_collate([super(Batched, self).__getitem__(3 * position + i) for i in range(3)])


class ByName(Positions):
    def __getitem__(self, name: Any) -> Any:
        return super().__getitem__(int(name))


class Blind(DataLoader[Any]):
    """Runs ahead and makes new batches, so that nothing tells which is which."""

    def __iter__(self) -> Any:
        batches = super().__iter__()
        waiting = next(batches)
        for batch in batches:
            yield dict(waiting)
            waiting = batch
        yield dict(waiting)


class Record:
    """A batch of some other kind."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __getitem__(self, key: str) -> Any:
        return default_collate(self.samples)[key]


def warm() -> DataLoader[Any]:
    started = loader(num_workers=1, persistent_workers=True)
    next(iter(started))
    return started


def doubled(samples: list[Any]) -> Any:
    return default_collate(samples + samples)


CASES: dict[str, tuple[Any, SampleTracker, str]] = {
    "stream": (lambda: DataLoader(Stream(), 4), SampleTracker(), "no known position"),
    "one stream of two": (lambda: [loader(), DataLoader(Stream(), 4)], SampleTracker(), "no known position"),
    "no DataLoader": (Batches, SampleTracker(), "Batches does not tell which samples"),
    "drops samples": (
        lambda: loader(collate_fn=lambda samples: default_collate(samples[1:])),
        SampleTracker(),
        "does not have as many samples",
    ),
    "adds samples": (lambda: loader(collate_fn=doubled), SampleTracker(), "does not have as many samples"),
    "items are batches": (
        lambda: DataLoader(Batched(7), batch_size=None),
        SampleTracker(),
        "does not have as many samples",
    ),
    "names": (
        lambda: DataLoader(ByName(3), batch_size=3, sampler=["0", "1", "2"]),
        SampleTracker(),
        "sampler that yields str",
    ),
    "negative": (lambda: DataLoader(Positions(3), 3, sampler=[0, -1, 1]), SampleTracker(), "yields -1"),
    "blind": (lambda: Blind(Positions(), batch_size=4), SampleTracker(), "its own __iter__"),
    "started before": (warm, SampleTracker(), "started before the fit"),
    "no such key": (loader, SampleTracker("uid"), "found: the keys ['x', 'position', 'label']"),
    "no dictionary": (lambda: loader(collate_fn=Record), SampleTracker("uid"), "found: a Record"),
    "no integers": (loader, SampleTracker(lambda batch: batch["x"][:, 0]), "did not give dataset positions"),
    "no numbers": (loader, SampleTracker(lambda batch: ["a"] * 4), "did not give dataset positions"),
    "negative ids": (
        loader,
        SampleTracker(lambda batch: batch["position"] - 1),
        "did not give dataset positions",
    ),
    "too few ids": (loader, SampleTracker(lambda batch: [1, 2, 3]), "does not have as many samples"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_what_to_do_about_it(name: str) -> None:
    make, tracker, words = CASES[name]
    data, recorder, model = make(), Recorder(tracker), Model()
    classes = [type(each) for each in (data if isinstance(data, list) else [data])]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    runner = trainer(recorder)
    with pytest.raises(SampleIdError) as refusal:
        runner.fit(model, data)
    message = str(refusal.value)
    assert words in message
    assert all(part in message for part in ("\n  expected: ", "\n  found: ", "\n  HINT: "))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "a step was taken"
    assert [type(each) for each in (data if isinstance(data, list) else [data])] == classes
    assert "dataloader" not in vars(runner.fit_loop._data_source)
    assert str(pickle.loads(pickle.dumps(refusal.value))) == message
    assert not any(name.startswith("__pl") for name in vars(loader())), "Lightning still rewrites DataLoader"


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument in the `training_step`")
def test_training_step_that_takes_the_iterator() -> None:
    class Greedy(Model):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, _, _ = next(dataloader_iter)
            return self.linear(batch["x"]).sum()

    for sample_id in (None, "position"):
        with pytest.raises(SampleIdError, match=r"HINT: .*training_step\(self, batch, batch_idx\)"):
            trainer(Recorder(SampleTracker(sample_id))).fit(Greedy(), loader())


def test_transfer_hook_that_changes_the_number_of_samples() -> None:
    class Augmenting(Model):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {key: torch.cat([value, value]) for key, value in batch.items()}

    with pytest.raises(SampleIdError, match="transfer hook"):
        trainer(Recorder(SampleTracker())).fit(Augmenting(), loader())


def test_pop_at_the_wrong_time() -> None:
    with pytest.raises(SampleIdError, match=r"HINT: call attach\(trainer\)"):
        SampleTracker().pop({})
    with pytest.raises(SampleIdError, match="neither a key nor a function"):
        SampleTracker(3)  # type: ignore[arg-type]

    class Twice(Recorder):
        def on_train_batch_end(self, runner: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            assert self.tracker is not None
            self.tracker.pop(batch)

    with pytest.raises(SampleIdError, match="No training batch was fetched"):
        trainer(Twice(SampleTracker())).fit(Model(), loader())


@pytest.mark.parametrize("crash", [False, True])
def test_everything_is_restored(crash: bool) -> None:
    class Look(Callback):
        def on_train_batch_end(self, runner: Any, module: Any, *args: Any) -> None:
            assert mine.dataset is data and mine.collate_fn is default_collate and mine.worker_init_fn is None
            assert isinstance(mine, DataLoader) and type(mine).__name__ == "DataLoader"
            mine.collate_fn = default_collate  # plain assignment goes on working
            with pytest.raises(ValueError, match="should not be set"):
                mine.dataset = data
            other = copy.copy(mine)
            assert type(other) is DataLoader and not any("influence" in name for name in vars(other))
            assert type(copy.deepcopy(both)) is CombinedLoader
            if crash:
                raise KeyboardInterrupt

    data = Positions()
    mine = DataLoader(data, batch_size=4)
    both = CombinedLoader([mine, loader()], "min_size")
    before = set(vars(mine)), set(vars(both))
    runner, tracker = trainer(Recorder(SampleTracker()), Look()), SampleTracker()
    if crash:
        with pytest.raises(SystemExit):
            runner.fit(Model(), both)
    else:
        runner.fit(Model(), both)
    tracker.detach(runner)  # of a tracker that was never attached: nothing happens
    assert type(mine) is DataLoader and type(both) is CombinedLoader
    assert (set(vars(mine)), set(vars(both))) == before
    assert "dataloader" not in vars(runner.fit_loop._data_source)


def test_batches_go_on_after_detaching_in_the_middle() -> None:
    class Leaving(Recorder):
        def on_train_batch_end(self, runner: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 1 and self.tracker is not None:
                self.tracker.detach(runner)
                self.tracker = None

    leaving = Leaving(SampleTracker())
    trainer(leaving).fit(Model(), loader(num_workers=1, persistent_workers=True))
    assert len(leaving.outcome.truth) == 12 and len(leaving.outcome.known) == 2


@pytest.mark.parametrize("size", [3, 4])
def test_batches_whose_size_counts(size: int) -> None:
    ids, b = torch.arange(size), size
    for batch in (
        torch.zeros(b, 5),
        [torch.zeros(b, 5), torch.zeros(b)],
        {"ids": torch.zeros(7, b), "y": torch.zeros(b), "lengths": [2] * b},  # time first
        (torch.zeros(40), torch.zeros(b), torch.zeros(b)),  # flat words with offsets, as for EmbeddingBag
        (("a",) * b, ("b",) * b),  # pairs of texts
        ["a"] * b,
        [(torch.zeros(5), 1)] * b,  # a collate function that leaves the samples alone
        (tuple(torch.zeros(9, 9) for _ in range(b)), tuple({"boxes": torch.zeros(2)} for _ in range(b))),
        object(),  # nothing to count: the capture of gradients will find out
    ):
        _check_size(ids, batch)
    for batch in (
        torch.zeros(b - 1, 5),
        [torch.zeros(b + 2, 5), torch.zeros(b + 2)],
        {"x": torch.zeros(b - 1, 5), "text": ["a"] * (b - 1)},
        ["a"] * (b + 1),
        tuple([torch.zeros(b - 1, 5)] + [torch.zeros(b - 1)] * (b - 1)),  # as many parts as positions
    ):
        with pytest.raises(SampleIdError, match="as many samples"):
            _check_size(ids, batch)


class Pinnable:
    def __init__(self, samples: list[Any], pinned: bool = False) -> None:
        self.samples, self.pinned = samples, pinned

    def pin_memory(self) -> Pinnable:
        return Pinnable(self.samples, pinned=True)


def test_pinning_reaches_the_batch_behind_the_tag() -> None:
    tagged = torch_pin.pin_memory(Tagged(Pinnable([1]), (1,)))
    assert isinstance(tagged, Tagged) and tagged.batch.pinned and tagged.positions == (1,)


@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_loader_keeps_its_positions(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="none"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    data, gate = loader(10, collate_fn=Pinnable, pin_memory=True, num_workers=workers), Gate()
    track(data, gate)
    gate.is_open = True
    seen = []
    for batch in data:
        assert isinstance(batch, Pinnable) and batch.pinned
        seen.append((gate.take(data, batch), [sample["position"] for sample in batch.samples]))
    assert [list(positions or ()) for positions, _ in seen] == [truth for _, truth in seen]
    assert seen[-1][0] == (8, 9)


def test_gate_is_closed_to_strangers() -> None:
    data, gate = Own(Positions(), 4), Gate()
    track(data, gate)
    assert len(list(data)) == 6 and not gate.deliveries
    with gate:
        batch = next(iter(data))
    assert gate.take(data, batch) == (0, 1, 2, 3)
    assert gate.take(data, batch) is None and gate.take(data, batch) is None
    untrack(data)
    assert type(data) is Own


def test_loader_with_a_dataset_property() -> None:
    class Lazy(DataLoader[Any]):
        made = Positions(6)

        @property
        def dataset(self) -> Any:
            return self.made

        @dataset.setter
        def dataset(self, value: Any) -> None:
            assert isinstance(value, Positions)

    data, gate = Lazy(Positions(6), batch_size=4), Gate()
    track(data, gate)
    with gate:
        batch = next(iter(data))
    assert gate.take(data, batch) == (0, 1, 2, 3) and data.dataset is Lazy.made


# The seams: each of these fails when a release moves what the tracker holds on to.


def test_seam_lightning_asks_a_source_for_its_loaders() -> None:
    runner = trainer()
    assert callable(runner.fit_loop._data_source.dataloader)
    del runner.fit_loop._data_source
    with pytest.raises(UnsupportedError, match=r"_data_source.*\n.*found: lightning .*\n.*HINT"):
        SampleTracker().attach(runner)


def test_seam_lightning_wraps_plain_loaders_as_we_do() -> None:
    runner = trainer(max_epochs=1)
    runner.fit(Model(), [loader(9), loader()])
    assert runner.fit_loop._combined_loader is not None
    assert runner.fit_loop._combined_loader._mode == "max_size_cycle"


def test_seam_fetchers_show_what_is_fetched_ahead() -> None:
    assert _PrefetchDataFetcher().batches == []
    taking = _DataLoaderIterDataFetcher()
    taking.setup(CombinedLoader(loader()))
    assert hasattr(iter(taking), "iterator_wrapper")


def test_seam_torch_builds_iterators_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    data = loader()
    track(data, Gate())
    assert type(next(iter(data))) is dict
    monkeypatch.delattr(DataLoader, "_get_iterator")
    with pytest.raises(UnsupportedError, match=r"_get_iterator"):
        next(iter(data))
