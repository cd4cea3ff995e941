"""isolated() leaves nothing behind; a training set is walked by position, in order, on every kind of loader."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections import Counter, OrderedDict, defaultdict, deque
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    get_worker_info,
)

from lightning_influence.errors import CaptureError, SampleIdError, UnsupportedError
from lightning_influence.replay import TrainingData, isolated, open_files, walk
from lightning_influence.replay.remembered import Remembered
from lightning_influence.samples import fingerprint
from tests.callbacks.fits import WARNINGS, Classifier, Texts, loader, padded, seeded

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


class Box:
    def __init__(self) -> None:
        self.value, self.inner = 1, [1, 2]


def test_everything_that_can_change_in_place_comes_back() -> None:
    rng, numpy_rng, old_rng = random.Random(1), np.random.default_rng(1), np.random.RandomState(1)
    generator = torch.Generator().manual_seed(1)
    cycle: list[Any] = [1]
    cycle.append(cycle)
    value: dict[str, Any] = {
        "list": [1, [2]],
        "deque": deque([1, 2], maxlen=3),
        "set": {1},
        "counter": Counter("aab"),
        "ordered": OrderedDict(a=1, b=2),
        "default": defaultdict(list, a=[1]),
        "tensor": torch.ones(2),
        "tuple": ([1], torch.zeros(1)),
        "array": np.arange(3.0),
        "box": Box(),
        "cycle": cycle,
        "generators": (rng, numpy_rng, old_rng, generator),
    }
    inner, array, tensor = value["list"][1], value["array"], value["tensor"]
    memory = Remembered({__name__.split(".")[0]})
    memory.remember(value)
    draws = [rng.random(), numpy_rng.random(), old_rng.rand(), torch.rand((), generator=generator).item()]
    inner.append(3), value["list"].append(4), value["deque"].append(5), value["deque"].append(6)
    (
        value["set"].add(2),
        value["counter"].update("b"),
        value["ordered"].move_to_end("a"),
        value["default"]["z"].append(1),
    )
    value["tuple"][0].append(2), value["tuple"][1].add_(1), cycle.append(2)
    array += 1
    tensor.mul_(3)
    value["box"].value, value["box"].inner = 2, None
    value["new"] = 1
    value["array"] = None
    memory.restore()
    assert "new" not in value and value["array"] is array and value["list"][1] is inner
    assert (value["list"], value["set"], dict(value["counter"])) == ([1, [2]], {1}, {"a": 2, "b": 1})
    assert (list(value["deque"]), list(value["ordered"]), dict(value["default"])) == ([1, 2], ["a", "b"], {"a": [1]})
    assert array.tolist() == [0, 1, 2] and tensor.tolist() == [1, 1] and value["tuple"] == ([1], torch.zeros(1))
    assert (value["box"].value, value["box"].inner) == (1, [1, 2]) and len(cycle) == 2
    again = [rng.random(), numpy_rng.random(), old_rng.rand(), torch.rand((), generator=generator).item()]
    assert again == draws


def test_objects_of_other_packages_and_long_containers_are_left_alone() -> None:
    box, long = Box(), [torch.zeros(1) for _ in range(1001)]
    memory = Remembered()
    memory.remember({"box": box, "long": long})
    box.value = 2
    long[0].add_(1)
    long.append(torch.ones(1))
    memory.restore()
    assert box.value == 2 and len(long) == 1001 and float(long[0]) == 1.0


def test_inference_tensors_that_do_not_change_are_no_obstacle() -> None:
    with torch.inference_mode():
        frozen = torch.ones(2)
    memory = Remembered()
    memory.remember([frozen])
    with torch.inference_mode():
        frozen.add_(1)
    memory.restore()
    assert frozen.tolist() == [1, 1]


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.look_up = nn.Embedding(5, 3, max_norm=0.5)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("late", None)
        self.steps = 0

    def run(self) -> Tensor:
        self.steps += 1
        self.late = torch.ones(1)
        self.norm.train()
        self.norm.weight.requires_grad_(False)
        self.unheard = 1
        np.random.rand(), random.random(), torch.rand(1)
        return self.norm(self.look_up(torch.arange(5))).sum()


def test_isolated_restores_after_success_and_failure() -> None:
    for fails in (False, True):
        module = Module()
        module.look_up.eval()  # a user's mixture of modes
        before = {name: value.clone() for name, value in module.state_dict().items()}
        states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        try:
            with torch.inference_mode(), isolated(module) as losses:
                assert not module.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
                loss = module.run()
                module.log("loss", loss)
                module.manual_backward(loss)
                optimizer = module.optimizers()
                assert optimizer.param_groups[0]["lr"] == 0.0 and module.lr_schedulers().get_last_lr() == [0.0]
                optimizer.step(), optimizer.zero_grad(), module.toggle_optimizer(optimizer)
                with optimizer.toggle_model():
                    assert losses == [loss] and loss.requires_grad
                if fails:
                    raise RuntimeError("on purpose")
        except RuntimeError as error:
            assert fails and str(error) == "on purpose"
        assert module.training and module.norm.training and not module.look_up.training
        assert module.steps == 0 and module.late is None and not hasattr(module, "unheard")
        assert module.norm.weight.requires_grad and not {"log", "optimizers", "manual_backward"} & set(vars(module))
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
        assert (np.random.get_state()[1] == states[1]).all()


@pytest.mark.parametrize("how", ["in place", "data", "new data"])
def test_a_forward_that_changes_weights_is_an_error(how: str) -> None:
    module = seeded(Classifier)
    refusal = pytest.raises(CaptureError, match=r"(?s)'head\.weight' in place.*per_sample_loss")
    with refusal, isolated(module), torch.no_grad():
        if how == "in place":
            module.head.weight.mul_(0.5)
        elif how == "data":
            module.head.weight.data.mul_(0.5)
        else:
            module.head.weight.data = module.head.weight.data * 0.5
    assert module.training


def test_walk_is_in_dataset_order_whatever_the_loader_does() -> None:
    texts = Texts(11)
    loaders: list[DataLoader[Any]] = [
        loader(texts, batch_size=3),
        loader(texts, batch_size=3, num_workers=1),
        DataLoader(texts, collate_fn=padded, batch_sampler=BatchSampler(SequentialSampler(texts), 3, drop_last=True)),
    ]
    for each in loaders:
        data = TrainingData.of(each)
        assert (len(data), data.length, data.batch_size) == (11, 11, 3)
        found = list(walk(data, [range(0, 6), range(6, 11)], seeded(Classifier)))
        assert [list(ids) for ids, _ in found] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
        assert [batch["position"].tolist() for _, batch in found] == [list(ids) for ids, _ in found]
    subset = TrainingData.of(loader(Subset(texts, [7, 3]), batch_size=3))
    assert [b["position"].tolist() for _, b in walk(subset, [range(0, 2)], seeded(Classifier))] == [[7, 3]]


def test_a_fork_keeps_the_dataset_as_it_was() -> None:
    class Counts(Texts):
        reads = 0

        def __getitem__(self, position: int) -> Any:
            self.reads += 1
            return super().__getitem__(position)

    texts = Counts()
    data = TrainingData.of(loader(texts), forked=True)
    assert data.num_workers == 1
    state = torch.get_rng_state()
    assert len(list(data.batches([[0, 1], [2]]))) == 2
    assert texts.reads == 0 and torch.equal(torch.get_rng_state(), state)


def test_loaders_that_cannot_be_walked() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(())

    with pytest.raises(UnsupportedError, match="looked into"):
        TrainingData.of([1, 2])
    with pytest.raises(UnsupportedError, match=r"(?s)position of every sample.*Stream"):
        TrainingData.of(DataLoader(Stream()))
    with pytest.raises(UnsupportedError, match="collate"):
        TrainingData.of(DataLoader(Texts(), batch_size=None))
    with pytest.raises(UnsupportedError, match="collate"):
        TrainingData.of(DataLoader(Stream(), batch_size=None), streams=True)
    with pytest.raises(UnsupportedError, match="empty"):
        TrainingData.of(DataLoader(Stream()), streams=True).alone([0], [0])


def test_a_step_that_reads_its_optimizers_sees_them() -> None:
    """Rates may be read in the replayed step; what would change them is void."""
    from lightning.pytorch import Trainer

    seen: list[float] = []

    class Reads(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer, schedule = self.optimizers(), self.lr_schedulers()
            seen.append(
                optimizer.param_groups[0]["lr"] + schedule.get_last_lr()[0] + optimizer.optimizer.defaults["lr"]
            )
            return F.cross_entropy(self(batch["tokens"]), batch["label"])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.25)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]

    module = seeded(Reads)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = Trainer(max_steps=1, accelerator="cpu", enable_model_summary=False, **options)
    run.fit(module, loader())
    seen.clear()
    with isolated(module, run):
        module.training_step(padded([Texts()[0]]), 0)
        module.optimizers().param_groups[0]["lr"] = 5.0
        module.optimizers().step()
        module.lr_schedulers().step()
    assert seen == [0.75] and run.optimizers[0].param_groups[0]["lr"] == 0.25


def a_run() -> Any:
    from lightning.pytorch import Trainer

    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


@pytest.mark.parametrize("given", [True, False])
def test_the_trainer_is_isolated_too(given: bool) -> None:
    run, module = a_run(), seeded(Classifier)
    module.trainer = run
    run.notes = {"seen": [1]}
    loops, callbacks = run.fit_loop, list(run.callbacks)
    with isolated(module, run if given else None):
        module.trainer.should_stop = True
        module.trainer.steps_seen = 1
        module.trainer.notes["seen"].append(2)
        module.trainer.callbacks.clear()
    assert run.should_stop is False and not hasattr(run, "steps_seen") and run.notes == {"seen": [1]}
    assert run.fit_loop is loops and run.callbacks == callbacks


class Lines(Texts):
    """Labels are numbers in an open file, read through its buffer."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(40)
        path.write_bytes(b"".join(b"%05d" % (n * 4) for n in range(20000)))
        self.file = path.open(mode)
        self.fails_at = -1

    def __getitem__(self, position: int) -> Any:
        if position == self.fails_at:
            raise OSError("disk gone")
        self.file.seek(position * 2000)
        return {**super().__getitem__(position), "label": int(self.file.read(5))}


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("ends", ["at the end", "early", "with an error", "at once"])
@pytest.mark.parametrize("mode", ["rb", "rb+"])
def test_a_fork_leaves_open_files_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, ends: str, anew: bool
) -> None:
    if not anew:  # a system on which a file cannot be opened again by its number
        monkeypatch.setattr(open_files, "_ANEW", str(tmp_path / "nothing"))
    texts = Lines(tmp_path / "lines", mode)
    with texts.file:
        assert texts[1]["label"] == 400 * 4 and texts.file.tell() == 2005
        place = os.lseek(texts.file.fileno(), 0, os.SEEK_CUR)
        data = TrainingData.of(loader(texts, batch_size=2), forked=True)
        spans = [range(0, 40)]
        labels = [400 * 4 * position for position in range(40)]
        if ends == "at the end":
            found = [label for _, batch in walk(data, spans, seeded(Classifier)) for label in batch["label"].tolist()]
            assert found == labels
        elif ends == "early":
            with closing(walk(data, spans, seeded(Classifier))) as batches:  # type: ignore[type-var]
                assert next(batches)[1]["label"].tolist() == labels[:2]
        elif ends == "with an error":
            texts.fails_at = 20
            with pytest.raises(OSError, match="disk gone") as failure:
                list(walk(data, spans, seeded(Classifier)))
            assert failure.tb is not None and not multiprocessing.active_children()
        else:
            assert data.alone([0, 39], [1])[1]["label"].tolist() == [labels[0], labels[39]]
        assert not multiprocessing.active_children()
        assert os.lseek(texts.file.fileno(), 0, os.SEEK_CUR) == place
        assert texts.file.read(5) == b"%05d" % (401 * 4)  # goes on in its buffer
        assert texts[39]["label"] == labels[39]


def test_files_that_others_write_or_exchange_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "_ANEW", str(tmp_path / "nothing"))
    paths = [tmp_path / name for name in ("log", "notes", "closed", "other", "read")]
    for path in paths:
        path.write_bytes(b"0123456789")
    log = os.open(paths[0], os.O_WRONLY)
    notes = os.open(paths[1], os.O_RDWR)
    closed, read = os.open(paths[2], os.O_RDONLY), os.open(paths[4], os.O_RDONLY)
    with open_files.places_kept():
        os.write(log, b"abc")
        os.write(notes, b"abcdefghijklmnop")
        os.read(read, 4)
        other = os.open(paths[3], os.O_RDONLY)
        os.dup2(other, closed)
        os.read(closed, 5)
    assert [os.lseek(number, 0, os.SEEK_CUR) for number in (log, notes, closed, read)] == [3, 16, 5, 0]
    for number in (log, notes, closed, other, read):
        os.close(number)


class Counting(Texts):
    def __init__(self) -> None:
        super().__init__()
        self.reads, self.seen = 0, [0]

    def __getitem__(self, position: int) -> Any:
        self.reads += 1
        self.seen.append(position)
        return {**super().__getitem__(position), "reads": self.reads}


@pytest.mark.parametrize("how", ["forked", "worker", "subset", "no fork", "daemon"])
def test_a_fingerprint_is_taken_where_it_disturbs_nothing(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = Counting()
    if how == "no fork":
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    elif how == "daemon":  # such a process may have no children
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    dataset: Any = Subset(texts, range(9)) if how in ("subset", "no fork") else texts
    data = TrainingData.of(loader(dataset, num_workers=int(how == "worker")), forked=True)
    assert data.num_workers == int(how not in ("no fork", "daemon"))
    fresh = Counting()
    expected = fingerprint(Subset(fresh, range(9)) if dataset is not texts else fresh)
    assert data.fingerprint() == expected and fresh.reads == 24
    assert len(list(data.batches([[0, 1], [2]]))) == 2
    assert texts.reads == 0 and texts.seen == [0] and not multiprocessing.active_children()


def test_a_fingerprint_in_a_worker_fails_and_starts_as_it_should() -> None:
    class Keyed(Texts):
        def __getitem__(self, position: int) -> Any:
            raise KeyError(position)

    class Opened(Texts):
        offset: int

        def __getitem__(self, position: int) -> Any:
            return self.offset + position

    def opens(worker: int) -> None:
        info: Any = get_worker_info()
        info.dataset.offset = 5

    with pytest.raises(SampleIdError, match=r"Keyed cannot be read by position.\n  expected: .*\n  found: KeyError"):
        TrainingData.of(loader(Keyed()), forked=True).fingerprint()
    opened = Opened()
    found = TrainingData.of(loader(opened, num_workers=1, worker_init_fn=opens)).fingerprint()
    opened.offset = 5
    assert found == fingerprint(opened)
    assert TrainingData.of(DataLoader([], batch_size=2), forked=True).fingerprint() == fingerprint([])  # type: ignore[arg-type]


def test_tensors_are_read_in_process_and_user_code_in_a_worker():
    tensors = TensorDataset(torch.arange(6.0))
    for dataset in (tensors, Subset(tensors, [1, 3]), ConcatDataset([tensors, Subset(tensors, [0])])):
        assert TrainingData.of(DataLoader(dataset, batch_size=2), forked=True).num_workers == 0
    own = type("Own", (TensorDataset,), {})(torch.arange(6.0))
    for other in (
        DataLoader(own, batch_size=2),
        DataLoader(Subset(own, [0]), batch_size=2),
        DataLoader(tensors, batch_size=2, collate_fn=lambda samples: samples),
    ):
        assert TrainingData.of(other, forked=True).num_workers == 1
