"""How far parameters can have gone: a step counts where a gradient came, at the rate it really had, and once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_influence import ArtifactStore, StageLinker
from lightning_influence.callbacks.travel_record import TravelRecord
from lightning_influence.stages import step_length
from tests.callbacks.fits import WARNINGS
from tests.two_stages import Finetuned, begun, data, fit, network, stored

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
]
PRE, FINE = data(8, 3, 0), data(16, 2, 1)  # finetuning: 4 steps an epoch
ENCODER, HEAD = ("encoder.0.weight", "encoder.0.bias"), ("head.weight", "head.bias")


# -- the record alone -----------------------------------------------------------------------------------------------


class Scaler:
    """A gradient scaler of which only the scale is asked."""

    def __init__(self) -> None:
        self.scale = 1024.0

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.scale


class Run:
    """A Trainer's steps, without one."""

    def __init__(self, scaler: Any = None) -> None:
        self.module = nn.Linear(2, 1)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.module.parameters(), lr=0.5)
        self.trainer: Any = SimpleNamespace(global_step=0, precision_plugin=SimpleNamespace(scaler=scaler))
        self.record = TravelRecord()

    def before(self, *with_gradients: str) -> None:
        for name, p in self.module.named_parameters():
            p.grad = torch.zeros_like(p) if name in with_gradients else None
        self.record.before_step(self.trainer, self.module, self.optimizer)  # type: ignore[arg-type]

    def after(self) -> None:
        self.trainer.global_step += 1
        self.record.settle(self.trainer)


@pytest.mark.parametrize(
    ("group", "length"),
    [
        ({"lr": 0.1}, 0.1),
        ({"lr": 0.1, "momentum": 0.9}, 1.0),
        ({"lr": 0.1, "momentum": 0.9, "dampening": 0.5}, 0.5),
        ({"lr": 0.1, "dampening": 0.5}, 0.1),
        ({"lr": 0.1, "betas": (0.9, 0.999)}, 0.1),
        ({"lr": torch.tensor(0.25)}, 0.25),
    ],
)
def test_a_step_goes_as_far_as_its_momentum_takes_it(group, length):
    assert step_length(group) == pytest.approx(length, rel=1e-12)


def test_only_what_has_a_gradient_goes():
    run = Run()
    run.before("weight", "bias")
    run.after()
    run.optimizer.param_groups[0]["lr"] = 0.25
    run.before("bias")
    run.after()
    run.before()
    run.after()
    assert run.record.sums == {"weight": 0.5, "bias": 0.75}


def test_a_closure_that_runs_several_times_counts_once():
    run = Run()
    for _ in range(5):
        run.before("weight")
    run.after()
    run.after()  # nothing is pending
    assert run.record.sums == {"weight": 0.5}


def test_a_step_that_a_gradient_scaler_skips_does_not_count():
    scaler = Scaler()
    run = Run(scaler)
    run.before("weight")
    scaler.scale = 512.0  # lowered: the step was skipped
    run.after()
    assert run.record.sums == {}
    run.before("weight")
    run.after()
    assert run.record.sums == {"weight": 0.5}


def test_two_optimizers_in_one_batch_count_each():
    run = Run()
    run.before("weight")
    run.trainer.global_step += 1
    run.optimizer = torch.optim.SGD([run.module.bias], lr=0.125)
    run.before("weight", "bias")
    run.after()
    assert run.record.sums == {"weight": 0.5, "bias": 0.125}


def test_a_rate_of_zero_goes_nowhere_and_a_state_goes_on():
    run = Run()
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.before("weight")
    run.after()
    assert run.record.sums == {}
    other = TravelRecord()
    run.record.load_state_dict({"bias": 2})
    other.load_state_dict(run.record.state_dict())
    assert other.sums == {"bias": 2.0}


# -- in fits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    root = tmp_path_factory.mktemp("pretraining") / "pre"
    module = network(3, 0)
    stored(root, module, PRE)
    return root, module


@pytest.fixture
def finetuned(tmp_path: Any, pretraining: Any) -> Callable[..., Any]:
    """(module, callbacks, options of the fit) -> the link that a fit with StageLinker left."""

    def run(module: Any, *callbacks: Callback, dataset: Any = FINE, **options: Any) -> Any:
        fit(tmp_path, module, dataset, *callbacks, StageLinker(tmp_path / "fine", pretrain=pretraining[0]), **options)
        link = ArtifactStore.open(tmp_path / "fine").link
        assert link is not None and link.complete and link.moved_though_frozen == ()
        return link

    return run


class Thawing(Callback):
    """Flags are changed while everything is in one parameter group from the start."""

    def __init__(self, part: str, epochs: set[int]) -> None:
        self.part, self.epochs = part, epochs

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        getattr(pl_module, self.part).requires_grad_(trainer.current_epoch in self.epochs)


@pytest.mark.parametrize(("optimizer", "length"), [("sgd", 0.1 / (1 - 0.5)), ("Adam", 0.01)])
def test_frozen_for_four_of_five_epochs_goes_for_one(finetuned, pretraining, optimizer, length):
    module = begun(pretraining[1], optimizer=optimizer)
    link = finetuned(module, Thawing("encoder", {4}), epochs=5)
    far = {**dict.fromkeys(ENCODER, 4 * length), **dict.fromkeys(HEAD, 20 * length)}
    assert link.travel == pytest.approx(far, rel=1e-12) and link.frozen == ()


def test_a_new_head_that_is_frozen_on_the_way_was_trained(finetuned, pretraining):
    link = finetuned(begun(pretraining[1]), Thawing("head", {0}), epochs=3)
    assert link.frozen == ()
    assert link.travel == pytest.approx({**dict.fromkeys(ENCODER, 2.4), **dict.fromkeys(HEAD, 0.8)}, rel=1e-12)


def test_accumulated_batches_make_one_step(finetuned, pretraining):
    link = finetuned(begun(pretraining[1]), accumulate_grad_batches=2)
    assert link.travel == pytest.approx(dict.fromkeys((*ENCODER, *HEAD), 4 * 0.2), rel=1e-12)


def test_a_group_of_rate_zero_is_frozen(finetuned, pretraining):
    class Apart(Finetuned):
        def configure_optimizers(self) -> Any:
            groups = [{"params": list(self.encoder.parameters()), "lr": 0.0}, {"params": list(self.head.parameters())}]
            return torch.optim.SGD(groups, lr=0.1)

    link = finetuned(begun(pretraining[1], Apart))
    assert link.frozen == ENCODER and link.travel == pytest.approx(dict.fromkeys(HEAD, 0.8), rel=1e-12)


def test_a_schedule_sums_the_rates_that_were_used(finetuned, pretraining):
    class Scheduled(Finetuned):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    link = finetuned(begun(pretraining[1], Scheduled), epochs=3)
    assert link.travel == pytest.approx(dict.fromkeys((*ENCODER, *HEAD), 4 * 0.1 * 1.75), rel=1e-12)


class Summed(Finetuned):
    """The loss of a batch is the sum of its samples': a step goes B times as far along the mean gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], reduction="sum")


@pytest.mark.parametrize("sampler", [False, True], ids=["batch_size", "batch_sampler"])
def test_a_summed_loss_goes_further_by_its_batch_size(finetuned, pretraining, sampler):
    module = begun(pretraining[1], Summed, lr=0.01, momentum=0.0)
    batches = DataLoader(FINE, batch_sampler=BatchSampler(SequentialSampler(FINE), 4, False)) if sampler else FINE
    link = finetuned(module, dataset=batches)
    assert link.travel == pytest.approx(dict.fromkeys((*ENCODER, *HEAD), 8 * 0.01 * 4), rel=1e-12)


class Two(Finetuned):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()
        return loss

    def configure_optimizers(self) -> Any:
        encoder, head = self.encoder.parameters(), self.head.parameters()
        return [torch.optim.SGD(encoder, lr=0.01, momentum=0.9), torch.optim.Adam(head, lr=0.02)]


def test_each_optimizer_takes_its_own_steps(finetuned, pretraining):
    link = finetuned(begun(pretraining[1], Two))
    far = {**dict.fromkeys(ENCODER, 8 * 0.1), **dict.fromkeys(HEAD, 8 * 0.02)}
    assert link.travel == pytest.approx(far, rel=1e-12)
    assert link.optimizers == ("SGD", "Adam") and link.preconditioned == HEAD


def test_steps_that_overflow_do_not_count_in_a_fit(finetuned, pretraining):
    class Overflows(Finetuned):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = cross_entropy(self(batch[0]), batch[1])
            return loss * 1e38 * 1e38 if self.training and batch_idx == 1 else loss

    module = begun(pretraining[1], Overflows, momentum=0.0).float()
    x, y = FINE.tensors
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[call-arg]
    link = finetuned(
        module,
        dataset=torch.utils.data.TensorDataset(x.float(), y),
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    assert link.travel == pytest.approx(dict.fromkeys((*ENCODER, *HEAD), 6 * 0.1), rel=1e-12)


def test_an_optimizer_of_several_closures_says_nothing_of_how_far(finetuned, pretraining):
    link = finetuned(begun(pretraining[1], optimizer="lbfgs"))
    assert dict(link.travel) == {} and link.optimizers == ("LBFGS",) and link.frozen == ()
