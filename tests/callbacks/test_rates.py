"""Learning rates as the steps used them, and the denominators of Adam-like optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from lightning_influence import ArtifactStore, GradientSnapshot
from lightning_influence.callbacks.optimizer_record import denominators
from tests.callbacks.fits import WARNINGS, Classifier, Texts, fit, loader, seeded, stored

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


class Scheduled(Classifier):
    """Two groups, a schedule by epoch or by step."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": list(self.words.parameters()), "lr": 0.5, "momentum": 0.9},
            {"params": [*self.hidden.parameters(), *self.head.parameters()], "lr": 0.1},
        ]
        optimizer = torch.optim.SGD(groups)
        if self.schedule == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.4, 0.2], total_steps=30)
        return [optimizer], [{"scheduler": one_cycle, "interval": "step"}]


class Spy(Callback):
    """Rates of every real step, seen by wrapping `optimizer.step` itself."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        optimizer.register_step_pre_hook(lambda o, *_: self.rates.append([g["lr"] for g in o.param_groups]))


@pytest.mark.parametrize("schedule", ["step", "one_cycle"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rates_are_those_of_the_steps(tmp_path: Path, schedule: str, accumulate: int) -> None:
    spy, snapshot = Spy(), GradientSnapshot(tmp_path / "store", "last_layer", every_n_epochs=2)
    module = seeded(lambda: Scheduled(schedule))
    fit(tmp_path, module, snapshot, spy, max_epochs=4, accumulate_grad_batches=accumulate)
    after = 0
    for checkpoint in ArtifactStore.open(tmp_path / "store").checkpoints():
        words, rest = checkpoint.groups
        used = spy.rates[after : checkpoint.step]
        assert [words.learning_rate, rest.learning_rate] == used[-1]
        assert [words.learning_rate_sum, rest.learning_rate_sum] == [sum(column) for column in zip(*used, strict=True)]
        assert words.parameters == ("words.weight",) and rest.parameters[-1] == "head.bias"
        assert (words.index, rest.index, words.options["momentum"]) == (0, 1, pytest.approx(0.9, abs=0.1))
        assert checkpoint.learning_rate("head.bias") == rest.learning_rate_sum
        after = checkpoint.step
    assert after == len(spy.rates)


def test_in_flight_records_carry_the_rate_of_their_own_step(tmp_path: Path) -> None:
    spy, snapshot = Spy(), GradientSnapshot(tmp_path / "store", "last_layer", mode="in_flight")
    fit(tmp_path, seeded(lambda: Scheduled("one_cycle")), snapshot, spy, accumulate_grad_batches=2)
    shards = [s for a in snapshot.artifacts.checkpoints()[:1] for s in snapshot.artifacts.shards(_all_steps(a.step))]
    for shard in shards:
        for step, rates in zip(shard.records["step"].tolist(), shard.records["rates"].tolist(), strict=True):
            assert rates == spy.rates[step - 1]


def _all_steps(after: int) -> Any:
    from lightning_influence.artifacts import StepRange

    return StepRange(after, 1 << 40)


def _adam(v: Tensor, step: int, beta: float, eps: float) -> Tensor:
    return (v / (1 - beta**step)).sqrt() + eps


OPTIMIZERS: dict[str, Any] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.9), eps=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.02, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.7),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=0.02, alpha=0.7, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_denominator_is_what_the_optimizer_divides_by(tmp_path: Path, name: str) -> None:
    """update = lr * m / (sqrt(v_hat) + eps): read off one more step with a known gradient."""

    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS[name](self.parameters())

    snapshot = GradientSnapshot(tmp_path / "store", "last_layer")
    run = fit(tmp_path, seeded(Module), snapshot, precision="64-true", max_epochs=1)
    store, module = ArtifactStore.open(tmp_path / "store"), run.lightning_module
    found = store.preconditioner(store.checkpoints()[-1])
    assert set(found) == {n for n, _ in module.named_parameters()}
    optimizer = run.optimizers[0]
    group = optimizer.param_groups[0]
    parameter, saved = module.head.weight, found["head.weight"]
    state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[parameter].items()}
    group["weight_decay"] = 0.0
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    gradient = parameter.grad = torch.randn(parameter.shape, dtype=torch.float64) * 1e-9  # too small to change v
    before = parameter.detach().clone()
    optimizer.step()
    update = before - parameter.detach()
    if "betas" in group:
        (b1, b2), t = group["betas"], float(state["step"]) + 1
        numerator = (b1 * state["exp_avg"] + (1 - b1) * gradient) / (1 - b1**t)
        v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        v_next = torch.maximum(v, b2 * state["exp_avg_sq"]) if name == "amsgrad" else b2 * v
        torch.testing.assert_close(
            update, group["lr"] * numerator / _adam(v_next, int(t), b2, group["eps"]), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(saved, _adam(v, int(t) - 1, b2, group["eps"]), rtol=1e-10, atol=0)
    elif name == "Adagrad":
        torch.testing.assert_close(update, group["lr"] * gradient / saved, rtol=1e-4, atol=0)
    else:
        v, mean = 0.7 * state["square_avg"], 0.7 * state.get("grad_avg", torch.zeros(()))
        following = (v - mean.square()).sqrt() + group["eps"]
        torch.testing.assert_close(update, group["lr"] * gradient / following, rtol=1e-4, atol=0)
        mean = state.get("grad_avg", torch.zeros(()))
        expected = (state["square_avg"] - mean.square()).sqrt() + group["eps"]
        torch.testing.assert_close(saved, expected, rtol=1e-10, atol=0)


def test_no_denominator_where_the_update_has_another_form(tmp_path: Path) -> None:
    for make in (lambda p: torch.optim.Adadelta(p), lambda p: torch.optim.Adamax(p), lambda p: torch.optim.SGD(p, 0.1)):

        class Module(Classifier):
            def configure_optimizers(self, make: Any = make) -> Any:
                return make(self.parameters())

        run = fit(tmp_path, seeded(Module), None, max_epochs=1)
        assert denominators(run.optimizers, run.lightning_module) == {}


def test_lbfgs_counts_a_step_once(tmp_path: Path) -> None:
    class Module(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.25, max_iter=3)

    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", mode="in_flight")
    fit(tmp_path, seeded(Module), snapshot, max_epochs=1)
    last = snapshot.artifacts.checkpoints()[-1]
    assert last.groups[0].learning_rate_sum == 0.25 * 4
    (shard,) = snapshot.artifacts.shards(_all_steps(0))
    assert sorted(shard.sample_ids.tolist()) == list(range(13))


def test_every_n_steps_and_uneven_accumulation(tmp_path: Path) -> None:
    snapshot = GradientSnapshot(tmp_path / "store", "last_layer", every_n_steps=3)
    fit(tmp_path, seeded(Classifier), snapshot, max_epochs=4, accumulate_grad_batches=3)
    assert [c.step for c in snapshot.artifacts.checkpoints()] == [3, 6]
    assert stored(snapshot.artifacts, "head.bias").shape == (len(Texts()), 3)
    assert loader().batch_size == 4
