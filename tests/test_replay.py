"""isolated() leaves nothing behind; a training set is walked by position, in order, on every kind of loader."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset

from lightning_influence.errors import CaptureError, UnsupportedError
from lightning_influence.replay import TrainingData, isolated, walk
from lightning_influence.replay.remembered import Remembered
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
