"""In flight: sums of the training's own gradients, each at the weights of its step, against sums made by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import CurvatureSnapshot, GradientSnapshot
from lightning_influence.curvature import EKFAC, KFAC, Dense, Diagonal, recorded_curvature
from lightning_influence.errors import CaptureError, CurvatureError, InfluenceError, UnsupportedError
from lightning_influence.gradients import Dense as Vectors
from tests.callbacks.curvature_fits import Still, batches, curvatures, everything, vectors
from tests.callbacks.fits import WARNINGS, Classifier, LanguageModel, Texts, fit, loader, padded, seeded, state_hash
from tests.callbacks.test_gradient_scaler import scaled
from tests.callbacks.test_resume import Fails, assert_equal, checkpoints
from tests.reference import per_sample_gradients

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]
EXACT = {"rtol": 1e-9, "atol": 1e-13}


class Plain(Still):
    def __init__(self, loss: str = "mean") -> None:
        super().__init__("plain", loss)


class Diary(Callback):
    """The weights before every batch, the batch, and the optimizer steps before it."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, dict[str, Tensor], Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        self.batches.append((trainer.global_step, state, batch))


def run(root: Path, *callbacks: Callback, make: Any = Plain, data: Any = None, **options: Any) -> Trainer:
    settings = {"precision": "64-true", **options}
    return fit(root, seeded(make), None, *callbacks, data=batches() if data is None else data, **settings)


def at(module: LightningModule, state: Mapping[str, Tensor]) -> Any:
    model = copy.deepcopy(module).double()
    model.load_state_dict(dict(state))
    return model


def squares(module: LightningModule, taken: list[Any], samples: Any, loss: Any = None) -> tuple[dict[str, Tensor], int]:
    """Σ over samples of the square of the gradient of the sample alone, at the weights of its step; and how many."""
    total: dict[str, Tensor] = {}
    count = 0
    for _, state, batch in taken:
        alone = samples(batch)
        rows = per_sample_gradients(at(module, state), loss or (lambda m, b: m.loss(b)), alone)
        total = {name: total.get(name, torch.zeros(())) + row.square().sum(0) for name, row in rows.items()}
        count += len(alone)
    return total, count


def pairs(batch: Any) -> list[Any]:
    x, y = batch
    return [(x[i : i + 1].double(), y[i : i + 1]) for i in range(len(y))]


@pytest.mark.parametrize("loss", ["mean", "sum", "own"])
@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_diagonal(tmp_path: Path, loss: str, every: int, accumulate: int) -> None:
    diary = Diary()
    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight", every_n_batches=every)
    module = run(
        tmp_path, snapshot, diary, make=lambda: Plain(loss), accumulate_grad_batches=accumulate
    ).lightning_module
    taken = diary.batches[::every]
    total, count = squares(module, taken, pairs)
    (file,) = curvatures(snapshot.artifacts).values()
    found = snapshot.artifacts.curvature(file)
    for number, name in enumerate(file.meta["parameters"]):
        torch.testing.assert_close(found[f"{number}.diagonal"], total[str(name)] / count, **EXACT)
    steps = [step for step, _, batch in taken for _ in batch[1]]
    last = diary.batches[-1][0] + 1
    assert (file.meta["mode"], file.meta["labels"], file.meta["num_samples"]) == ("in_flight", "observed", count)
    assert file.meta["staleness"]["mean_steps"] == pytest.approx(last - sum(steps) / count)
    assert file.meta["staleness"]["max_steps"] == last and file.step == last


def test_kfac_is_made_of_the_covariances_of_each_step(tmp_path: Path) -> None:
    diary, snapshot = Diary(), CurvatureSnapshot(tmp_path / "store", KFAC(), mode="in_flight")
    module = run(tmp_path, snapshot, diary).lightning_module
    found = recorded_curvature(snapshot.artifacts).curvature
    for layer in ("first", "head"):
        inputs, outputs, count = torch.zeros(()), torch.zeros(()), 0
        for _, state, batch in diary.batches:
            model = at(module, state)
            seen: dict[str, Tensor] = {}
            model.get_submodule(layer).register_forward_hook(
                lambda m, args, out, seen=seen: seen.update(a=args[0], o=out)
            )
            for sample in pairs(batch):
                loss = model.loss(sample)
                (g,) = torch.autograd.grad(loss, seen["o"])
                a = torch.cat([seen["a"].detach(), torch.ones(1, 1)], 1)
                inputs, outputs, count = inputs + a.T @ a, outputs + g.T @ g, count + 1
        v = torch.randn(2, outputs.shape[0], inputs.shape[0], dtype=torch.float64)
        product = found.matvec({f"{layer}.weight": Vectors(v[..., :-1]), f"{layer}.bias": Vectors(v[..., -1])})
        expected = (outputs / count) @ v @ (inputs / count)
        torch.testing.assert_close(product[f"{layer}.weight"].dense(), expected[..., :-1], **EXACT)
        torch.testing.assert_close(product[f"{layer}.bias"].dense(), expected[..., -1], **EXACT)


@pytest.mark.parametrize("make", [LanguageModel, lambda: Classifier(loss="weights")])
def test_samples_of_different_weight(tmp_path: Path, make: Any) -> None:
    """A mean over tokens, and class weights: every sample counts as if it were alone."""
    diary = Diary()
    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", parameters="hidden.*", mode="in_flight")
    module = run(tmp_path, snapshot, diary, make=make, data=loader(), max_epochs=1).lightning_module
    texts = Texts()
    total, count = squares(module, diary.batches, lambda b: [padded([texts[int(i)]]) for i in b["position"]])
    found = snapshot.artifacts.curvature(*curvatures(snapshot.artifacts).values())
    torch.testing.assert_close(found["0.diagonal"], total["hidden.weight"] / count, **EXACT)


def test_sums_begin_anew_with_every_snapshot(tmp_path: Path) -> None:
    diary = Diary()
    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight", every_n_epochs=1, at_steps=[6])
    module = run(tmp_path, snapshot, diary).lightning_module
    files = curvatures(snapshot.artifacts)
    assert list(files) == [(4, "diagonal"), (6, "diagonal"), (8, "diagonal")]
    for (step, _), (start, stop) in zip(files, [(0, 4), (4, 6), (6, 8)], strict=True):
        total, count = squares(module, diary.batches[start:stop], pairs)
        file = files[step, "diagonal"]
        found = snapshot.artifacts.curvature(file)
        torch.testing.assert_close(found["0.diagonal"], total["first.weight"] / count, **EXACT)
        assert file.meta["num_samples"] == count and file.meta["staleness"]["max_steps"] == stop - start


@pytest.mark.parametrize("accumulate", [1, 2])
def test_under_a_gradient_scaler(tmp_path: Path, accumulate: int) -> None:
    """Gradients are unscaled, in a wider type than they came in; a batch that overflows is left out."""

    class Module(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch) * 1e-7
            return loss * 1e38 * 1e38 if self.training and batch_idx == 1 else loss

    diary, snapshot = Diary(), CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight")
    options: dict[str, Any] = {"precision": None, "plugins": scaled(2.0**20), "max_epochs": 1}
    module = run(tmp_path, snapshot, diary, make=Module, accumulate_grad_batches=accumulate, **options).lightning_module
    taken = [batch for number, batch in enumerate(diary.batches) if number != 1]
    total, count = squares(module, taken, pairs, lambda m, b: m.loss(b) * 1e-7)
    (file,) = curvatures(snapshot.artifacts).values()
    assert file.meta["num_samples"] == count == 9
    found = snapshot.artifacts.curvature(file)
    for number, name in enumerate(file.meta["parameters"]):
        expected = total[str(name)] / count
        assert float((found[f"{number}.diagonal"] - expected).norm() / expected.norm()) < 0.02, name


def test_an_overflow_without_a_scaler_is_an_error(tmp_path: Path) -> None:
    class Module(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if self.global_step == 5 else 1.0)

    snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight", every_n_epochs=1)
    with pytest.raises(CaptureError, match=r"(?s)optimizer step 5.*NaN or infinite gradients of 'first.weight'.*HINT"):
        run(tmp_path, snapshot, make=Module)
    assert list(curvatures(snapshot.artifacts)) == [(4, "diagonal")] and snapshot.artifacts.verify() == []


def test_layers_that_stop_taking_part(tmp_path: Path) -> None:
    class Module(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if not self.training or self.global_step < 2 else self.head(torch.ones(len(x), 5))

    module = seeded(Module)
    snapshot = CurvatureSnapshot(tmp_path / "store", "kfac", mode="in_flight")
    with pytest.raises(CaptureError, match=r"(?s)optimizer step 2.*nothing for first.weight, first.bias.*HINT"):
        run(tmp_path, snapshot, make=lambda: module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_nothing_added_is_an_error_of_ours(tmp_path: Path) -> None:
    """Batches 0 and 3 are taken; the snapshot at step 2 has one more batch than the one before, which is not."""
    for statistics in ("diagonal", "kfac"):
        settings: dict[str, Any] = {"mode": "in_flight", "every_n_batches": 3, "at_steps": [1, 2]}
        snapshot = CurvatureSnapshot(tmp_path / statistics, statistics, **settings)
        with pytest.raises(
            CurvatureError, match=r"(?s)no training batch was added.*optimizer step 2.*every_n_batches=3"
        ):
            run(tmp_path, snapshot)
        assert list(curvatures(snapshot.artifacts)) == [(1, statistics)] and snapshot.artifacts.verify() == []


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")  # Lightning says so once in a process
def test_skipped_batches_leave_nothing(tmp_path: Path) -> None:
    """training_step returns None; on_train_batch_start ends an epoch early."""

    class Skips(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.trainer.current_epoch == 1 and batch_idx == 2 else None

    module, snapshot = (
        seeded(Skips),
        CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight", every_n_epochs=1),
    )
    run(tmp_path, snapshot, make=lambda: module, data=batches(shuffle=False))
    found = {step: file.meta["num_samples"] for (step, _), file in curvatures(snapshot.artifacts).items()}
    assert list(found.values()) == [4 + 4 + 1, 4]
    assert not any(part._forward_hooks for part in module.modules())


def test_lbfgs_counts_a_batch_once(tmp_path: Path) -> None:
    class Module(Plain):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.25, max_iter=3)

    diary, snapshot = Diary(), CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight")
    module = run(tmp_path, snapshot, diary, make=Module, max_epochs=1).lightning_module
    total, count = squares(module, diary.batches, pairs)
    found = snapshot.artifacts.curvature(*curvatures(snapshot.artifacts).values())
    torch.testing.assert_close(found["0.diagonal"], total["first.weight"] / count, **EXACT)


class Odd(Plain):
    """A batch in which no tensor but the first part's says how many samples there are."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch["x"][0]), batch["y"].view(-1)[: len(batch["x"][0])])


def odd(samples: list[Any]) -> dict[str, Any]:
    """Sizes 7, 1 and "samples": Lightning's own guess would be 7."""
    x, y = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"edges": torch.zeros(7, 2), "x": [x], "y": y.view(1, -1), "names": {"of": ["a"] * 3}}


def test_batches_that_hide_their_size(tmp_path: Path) -> None:
    made = [
        CurvatureSnapshot(tmp_path / "odd", "kfac", mode="in_flight"),
        CurvatureSnapshot(tmp_path / "plain", "kfac", mode="in_flight"),
    ]
    run(tmp_path, made[0], make=Odd, data=batches(collate_fn=odd))
    run(tmp_path, made[1])
    assert_equal(everything(tmp_path / "odd"), everything(tmp_path / "plain"))


def test_a_collate_function_that_drops_samples_is_refused(tmp_path: Path) -> None:
    data = batches(collate_fn=lambda samples: torch.utils.data.default_collate(samples[1:] or samples))
    snapshot, diary = CurvatureSnapshot(tmp_path / "store", "kfac", mode="in_flight"), Diary()
    with pytest.raises(InfluenceError, match="sample"):
        run(tmp_path, snapshot, diary, data=data)
    assert all(step == 0 for step, *_ in diary.batches)


@pytest.mark.parametrize(
    ("statistics", "settings", "match"),
    [
        (EKFAC(), {}, "EKFAC cannot be summed in flight"),
        (Dense("fisher"), {}, "Dense cannot be summed"),
        ("kfac", {"labels": "exact"}, "labels has no effect"),
        ("kfac", {"at_most": 5}, "at_most has no effect"),
        ("kfac", {"batch_size": 5}, "batch_size has no effect"),
        ("kfac", {"dataloader": DataLoader(vectors())}, "dataloader has no effect"),
        ("kfac", {"per_sample_loss": lambda module, batch: batch}, "per_sample_loss has no effect"),
    ],
)
def test_settings_without_effect_are_refused(statistics: Any, settings: Any, match: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s){match}.*HINT"):
        CurvatureSnapshot(statistics=statistics, mode="in_flight", **settings)
    CurvatureSnapshot(statistics="kfac", mode="in_flight", labels="observed")


def test_beside_gradients_in_flight_both_are_what_they_are_alone(tmp_path: Path) -> None:
    """Two captures on the same layers, with two function modes each: neither sees the other, nor the replays."""

    def go(name: str, *which: str) -> Path:
        root = tmp_path / name
        known: dict[str, Callback] = {
            "gradients": GradientSnapshot(root, ["words.weight", "next.*"], mode="in_flight"),
            "kfac": CurvatureSnapshot(root, "kfac", parameters=used, mode="in_flight", every_n_batches=2),
            "replay": CurvatureSnapshot(root, Diagonal(), parameters=used, at_steps=[3]),
        }
        trained = run(
            tmp_path, *(known[each] for each in which), make=LanguageModel, data=loader(), precision="32-true"
        )
        assert state_hash(trained) == plain
        return root

    used = ["words.*", "hidden.*", "next.*"]
    plain = state_hash(run(tmp_path, make=LanguageModel, data=loader(), precision="32-true"))
    kfac, gradients = everything(go("kfac", "kfac")), everything(go("gradients", "gradients"))
    for order in (("gradients", "kfac", "replay"), ("replay", "kfac", "gradients")):
        both = everything(go(" ".join(order), *order))
        for key, value in {**kfac, **gradients}.items():
            if isinstance(value, Tensor) and not key.startswith("8 moment"):
                assert torch.equal(both[key], value), key
        assert "3 diagonal" in both


def test_mixing_in_train_mode_is_told(tmp_path: Path) -> None:
    class Centred(Plain):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return z - z.mean(0) if self.training else z

    with pytest.warns(UserWarning, match="CurvatureSnapshot.*mixes the samples"):
        run(tmp_path, CurvatureSnapshot(tmp_path / "store", "kfac", mode="in_flight"), make=Centred, max_epochs=1)


def test_a_resumed_fit_sums_from_where_it_goes_on_and_says_so(tmp_path: Path) -> None:
    def go(**options: Any) -> CurvatureSnapshot:
        snapshot = CurvatureSnapshot(tmp_path / "store", "diagonal", mode="in_flight")
        others = [*options.pop("others", ()), checkpoints(tmp_path / "lightning", every_n_epochs=1)]
        run(tmp_path, snapshot, *others, enable_checkpointing=True, max_epochs=3, **options)
        return snapshot

    with pytest.raises(RuntimeError, match="on purpose"):
        go(others=[Fails(9, RuntimeError("on purpose"))])
    (file,) = curvatures(go(ckpt_path=tmp_path / "lightning" / "epoch=1-step=8.ckpt").artifacts).values()
    assert (file.step, file.meta["num_samples"], file.meta["staleness"]["max_steps"]) == (12, 13, 4.0)
