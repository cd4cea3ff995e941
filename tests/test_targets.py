"""choose_target: every rule beside an obvious computation, no trace left in the model, and K kept in a store."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_influence.targets
from lightning_influence import ArtifactStore
from lightning_influence.cli import main
from lightning_influence.errors import CaptureError, InfluenceError, LossError, StoreError, UnsupportedError
from lightning_influence.gradients import TargetParameters, chosen_units
from lightning_influence.targets import RULES, choose_target, record_target, recorded_target, recorded_targets
from tests.callbacks.fits import WARNINGS, LanguageModel, loader
from tests.stores import Texts, classifier, group, loader_of, manifest_of, replay_store, trajectory

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

ON_DATA = [rule for rule in RULES if "puts" in rule or "gradients" in rule]


class Net(LightningModule):
    """A convolution, a Linear at every position, and a head, with changes in place, views and side effects between."""

    def __init__(self, loss: str = "mean") -> None:
        super().__init__()
        self.loss, self.calls = loss, 0
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)
        self.mix, self.drop, self.head = nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(self.conv(x).relu_()).flatten(2).transpose(1, 2)  # (N, T, 3)
        return self.head(self.drop(self.mix(seen).tanh_().mean(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        z, y = self(batch[0]), batch[1]
        match self.loss:
            case "mean" | "sum":
                return F.cross_entropy(z, y, reduction=self.loss)
            case "rows":
                return -z.log_softmax(1).gather(1, y[:, None]).mean()
        raise ValueError(self.loss)


def net(loss: str = "mean") -> Any:
    seed_everything(3, verbose=False)
    module = Net(loss).double()
    module.norm.running_mean.normal_()
    return module


def images(length: int = 11) -> TensorDataset:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(length, 1, 4, 3, generator=draw, dtype=torch.float64)
    return TensorDataset(x, torch.randint(0, 3, (length,), generator=draw))


def batches(batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(images(), batch_size=batch_size, shuffle=True)


def obvious(module: Any, gradients: bool, positions: Any = range(11)) -> dict[str, Tensor]:
    """Mean sizes of outputs or gradients by layer, one sample after the other, nothing in place."""
    model = copy.deepcopy(module).eval()
    sizes: dict[str, list[Tensor]] = {"conv": [], "mix": [], "head": []}
    for x, y in [images()[i] for i in positions]:
        conv = model.conv(x[None])
        mix = model.mix(model.norm(conv.relu()).flatten(2).transpose(1, 2))
        head = model.head(mix.tanh().mean(1))
        outputs = {"conv": conv, "mix": mix, "head": head}
        found = torch.autograd.grad(F.cross_entropy(head, y[None]), [*outputs.values()])
        for (name, output), gradient in zip(outputs.items(), found, strict=True):
            rows = (gradient if gradients else output)[0].detach().abs()
            sizes[name].append(rows.flatten(1).T if name == "conv" else rows.reshape(-1, rows.shape[-1]))
    return {name: torch.cat(rows).mean(0) for name, rows in sizes.items()}


def same(target: TargetParameters, other: TargetParameters) -> bool:
    return target.names == other.names and all(torch.equal(target.masks[n], other.masks[n]) for n in target.names)


def importance(monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> dict[str, Tensor]:
    """What choose_target hands on to chosen_units."""
    kept: dict[str, Tensor] = {}

    def keep(module: Any, ratio: Any, importance: Any, origin: Any) -> TargetParameters:
        kept.update({name: importance(name) for name in ("conv", "mix", "head")})
        return chosen_units(module, ratio, kept, origin)

    with monkeypatch.context() as patch:
        patch.setattr(lightning_influence.targets, "chosen_units", keep)
        choose_target(*args, **{"ratio": 0.3, **settings})
    return kept


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11])
@pytest.mark.parametrize("rule", ON_DATA)
def test_means_over_samples_and_positions(rule: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    expected = obvious(module, "gradients" in rule)
    sign = -1 if "lowest" in rule else 1
    found = importance(monkeypatch, module, batches(), rule=rule, batch_size=batch_size)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], sign * values, rtol=1e-12, atol=0)
    target = choose_target(module, batches(batch_size), rule=rule, ratio=0.3)
    assert same(target, chosen_units(module, 0.3, {name: sign * v for name, v in expected.items()}, {}))
    assert target.origin == {"rule": rule, "ratio": 0.3, "seed": None, "num_samples": 11}


@pytest.mark.parametrize("loss", ["sum", "rows"])
@pytest.mark.parametrize("batch_size", [3, 11])
def test_losses_of_other_forms(loss: str, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = net(loss)
    found = importance(monkeypatch, module, batches(batch_size), rule="highest_gradients")
    for name, values in obvious(module, True).items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=0)


def test_some_samples_and_a_loss_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    module, chosen = net(), torch.tensor([7, 2, 9])
    found = importance(monkeypatch, module, batches(2), rule="highest_outputs", sample_ids=chosen)
    for name, values in obvious(module, False, chosen.tolist()).items():
        torch.testing.assert_close(found[name], values, rtol=1e-12, atol=0)
    assert choose_target(module, batches(), ratio=0.3, sample_ids=chosen).origin["num_samples"] == 3

    def twice(module: Any, batch: Any) -> Tensor:
        return 2 * F.cross_entropy(module(batch[0]), batch[1], reduction="none")

    found = importance(monkeypatch, module, batches(), rule="highest_gradients", per_sample_loss=twice)
    for name, values in obvious(module, True).items():
        torch.testing.assert_close(found[name], 2 * values, rtol=1e-12, atol=0)


def test_frozen_layers_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net()
    expected = chosen_units(module, 0.3, obvious(module, True), {})
    for frozen, kept in (("conv", "mix"), ("head", "mix")):
        module = net()
        getattr(module, frozen).requires_grad_(False)
        target = choose_target(module, batches(), rule="highest_gradients", ratio=0.3)
        assert torch.equal(target.masks[f"{kept}.weight"], expected.masks[f"{kept}.weight"])
        assert not any(name.startswith(frozen) for name in target.names)
        assert not getattr(module, frozen).weight.requires_grad


def test_random_rows_go_by_the_seed() -> None:
    module = net()
    target = choose_target(module, rule="random", seed=4, ratio=0.4)
    assert same(target, choose_target(module, batches(), rule="random", seed=4, ratio=0.4))
    assert not same(target, choose_target(module, rule="random", seed=5, ratio=0.4))
    assert target.origin == {"rule": "random", "ratio": 0.4, "seed": 4, "num_samples": None}
    assert [(s.layer, s.selected, s.whole_rows) for s in target.shares()] == [
        ("conv", 6, 1),  # of 15 in rows of 5
        ("mix", 9, 2),  # of 24 in rows of 4
        ("head", 8, 1),  # of 21 in rows of 7
    ]
    several = [choose_target(module, rule="random", seed=seed, ratio=0.2) for seed in range(40)]
    rows = {int(target.masks["mix.bias"].nonzero()) for target in several}
    assert len(rows) == 6  # each is the first for some seed


def test_the_largest_weights() -> None:
    module = net()
    module.head.bias.data[1] = 50.0
    target = choose_target(module, rule="largest_weights", ratio=0.34)  # 7 of 21
    assert target.masks["head.weight"].int().tolist() == [[0] * 6, [1] * 6, [0] * 6]
    assert target.masks["head.bias"].tolist() == [False, True, False]
    norms = (module.mix.weight.square().sum(1) + module.mix.bias.square()).sqrt()
    assert torch.equal(target.masks["mix.bias"].nonzero()[:, 0].sort()[0], norms.topk(2).indices.sort()[0])
    module.head.bias.requires_grad_(False)
    norms = {n: getattr(module, n).weight.detach().flatten(1).norm(dim=1) for n in ("conv", "mix", "head")}
    bare = chosen_units(module, 0.34, norms, {}).masks["head.weight"]
    assert torch.equal(choose_target(module, rule="largest_weights", ratio=0.34).masks["head.weight"], bare)


@pytest.mark.parametrize("rule", RULES)
def test_no_trace_is_left(rule: str) -> None:
    module = net().train()
    module.mix.eval()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    attributes = sorted(vars(module))
    first = choose_target(module, batches(), rule=rule, ratio=0.3)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in module.parameters())
    assert modes == [part.training for part in module.modules()]
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate() and attributes == sorted(vars(module)) and module.calls == 0
    assert not any(part._forward_hooks or part._forward_hooks_with_kwargs for part in module.modules())
    assert same(first, choose_target(module, batches(2), rule=rule, ratio=0.3))


class Attends(LightningModule):
    """A transformer layer, whose attention never calls its output projection as a module."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.block, self.head = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].expand(-1, 4, -1, -1)[..., 0].transpose(1, 2)  # (N, 4, 4)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return F.cross_entropy(self.head(x.mean(1)), batch[1])


@pytest.mark.parametrize("rule", ["highest_outputs", "highest_gradients"])
def test_attention_answers_for_its_output_projection(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(0, verbose=False)
    module = Attends().double()
    kept: list[Tensor] = []
    handle = module.block.self_attn.register_forward_hook(lambda *args: kept.append(args[2][0]))
    loss = module.eval().training_step(images()[:], 0) * 11
    handle.remove()
    values = torch.autograd.grad(loss, kept)[0] if "gradients" in rule else kept[0]
    expected = values.detach().abs().mean((0, 1))
    target = choose_target(module, batches(), rule=rule, ratio=0.25)  # one row of four with its bias
    assert target.masks["block.self_attn.out_proj.bias"].nonzero().flatten().tolist() == [int(expected.argmax())]
    assert {share.layer for share in target.shares()} == {
        "block.self_attn.out_proj",
        "block.linear1",
        "block.linear2",
        "head",
    }
    module.checkpointed = True  # the layer runs again in the backward
    assert same(target, choose_target(module, batches(), rule=rule, ratio=0.25))


def test_a_view_that_is_changed_in_place() -> None:
    class InPlace(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0][:, 0, :, :1] + torch.arange(4.0)
            seen, _ = self.attention(x, x, x)
            return F.cross_entropy(self.head(self.changed(seen).mean(1)), batch[1])

        def changed(self, seen: Tensor) -> Tensor:
            return seen.tanh_()

    class Apart(InPlace):
        def changed(self, seen: Tensor) -> Tensor:
            return seen.clone().tanh_()

    seed_everything(0, verbose=False)
    module, other = InPlace().double(), Apart().double()
    other.load_state_dict(module.state_dict())
    target = choose_target(module, batches(), rule="highest_gradients", ratio=0.3)
    assert same(target, choose_target(other, batches(), rule="highest_gradients", ratio=0.3))


def test_several_calls_and_calls_without_a_graph() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.conv(100 * x)
            return super().forward(x) + super().forward(2 * x)

    seed_everything(3, verbose=False)
    module = Twice().double()
    x = images()[:][0]
    calls = [module.conv(each).abs().mean((0, 2, 3)) for each in (100 * x, x, 2 * x)]
    target = choose_target(module, batches(), ratio=0.34)  # 5 of 15
    assert target.masks["conv.bias"].nonzero().flatten().tolist() == [int(sum(calls).argmax())]
    assert choose_target(module, batches(), rule="highest_gradients", ratio=0.34).size


@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_padding_has_no_gradient(batch_size: int) -> None:
    seed_everything(0, verbose=False)
    module = LanguageModel()
    module.head.requires_grad_(False)
    target = choose_target(module, loader(batch_size=batch_size), rule="highest_gradients", ratio=0.3)
    assert same(target, choose_target(module, loader(batch_size=2), rule="highest_gradients", ratio=0.3))


def test_layers_that_take_no_part() -> None:
    seed_everything(0, verbose=False)
    module = LanguageModel()
    for rule in ON_DATA:
        with pytest.raises(CaptureError, match=r"(?s)layer 'head' has no.*none in 13 samples.*HINT: freeze"):
            choose_target(module, loader(), rule=rule, ratio=0.3)
    assert choose_target(module, rule="random", ratio=0.3).masks["head.weight"].any()

    class Aside(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            self.head(torch.ones_like(x[0, 0, 0, 0]).expand(6))
            return z.detach() + 0 * self.conv.bias.sum()

    with pytest.raises(CaptureError, match=r"(?s)layer 'conv' has no gradient.*the loss depends on"):
        choose_target(Aside().double(), batches(), rule="highest_gradients", ratio=0.3)
    assert choose_target(Aside().double(), batches(), ratio=0.3).size


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(images())


@pytest.mark.parametrize(
    ("kind", "match", "settings"),
    [
        (CaptureError, "unknown rule.*'highest_outputs'.*'random'.*'best'", {"rule": "best"}),
        (CaptureError, r"ratio.*out of range.*HINT.*TargetParameters.everything\(module\)", {"ratio": 1}),
        (CaptureError, "ratio.*out of range", {"ratio": 0.0, "rule": "random"}),
        (CaptureError, "selects nothing in layer 'conv'.*HINT: pass ratio=0.0667 or more", {"ratio": 0.05}),
        (CaptureError, "cannot be examined.*11.*from 3 to 11", {"sample_ids": [3, 11]}),
        (CaptureError, "cannot be examined.*from -1 to 3", {"sample_ids": [3, -1]}),
        (CaptureError, "cannot be examined.*0 positions", {"sample_ids": []}),
        (CaptureError, "cannot be examined.*batch_size=0", {"batch_size": 0}),
        (
            UnsupportedError,
            "expected: one DataLoader.*NoneType.*HINT: pass `dataloader=DataLoader",
            {"dataloader": None},
        ),
        (UnsupportedError, "no positions", {"dataloader": DataLoader(Stream(), batch_size=2)}),
        (LossError, "per_sample_loss must return", {"per_sample_loss": lambda m, b: m(b[0])}),
    ],
)
def test_refusals(kind: type[InfluenceError], match: str, settings: dict[str, Any]) -> None:
    module = net()
    with pytest.raises(kind, match=f"(?s){match}.*HINT" if "HINT" not in match else f"(?s){match}"):
        choose_target(module, **{"dataloader": batches(), "ratio": 0.3, **settings})
    assert not any(part._forward_hooks for part in module.modules()) and module.calls == 0


def test_the_ratio_is_looked_at_before_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_influence.targets, "_mean_sizes", None)
    with pytest.raises(CaptureError, match="selects nothing"):
        choose_target(net(), batches(), ratio=0.01)


def test_outputs_that_are_nan() -> None:
    module = net()
    module.mix.bias.data[2] = float("nan")
    with pytest.raises(CaptureError, match=r"(?s)layer 'mix' is NaN.*HINT"):
        choose_target(module, batches(), ratio=0.3)


# in a store


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    module = classifier()
    names = [name for name, _ in module.named_parameters()]
    return replay_store(tmp_path / "store", module, Texts(), trajectory(module, 2), lambda c: [group(names, 0.5)])


def test_a_round_trip(store: ArtifactStore, capsys: pytest.CaptureFixture[str]) -> None:
    module = classifier()
    assert recorded_targets(store) == ()
    chosen = choose_target(module, loader_of(Texts()), ratio=0.2)
    record_target(store, "outputs-20", chosen)
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in reversed(list(module.named_parameters()))}
    record_target(store.root, "by_hand", TargetParameters.of(module, masks))
    assert recorded_targets(str(store.root)) == ("by_hand", "outputs-20")
    for name, target in (("outputs-20", chosen), ("by_hand", TargetParameters.of(module, masks))):
        found = recorded_target(store, name)
        assert same(found, target) and found.names == target.names and dict(found.origin) == dict(target.origin)
        assert found.shapes == target.shapes and list(found.shapes) == list(target.shapes)  # in the module's order
        assert found.shares() == target.shares() and str(found) == str(target)
    file = store.artifacts("target")[0]
    assert (file.path, file.step, file.mark) == ("targets/by_hand.safetensors", 20, 20)
    assert store.verify() == [] and main(["inspect", str(store.root)]) == main(["verify", str(store.root)]) == 0
    assert "no problems" in capsys.readouterr().out


def test_resuming_keeps_what_is_not_trained_again(store: ArtifactStore) -> None:
    target = TargetParameters.everything(classifier())
    record_target(store, "all", target)
    for mark in (None, 20):
        resumed = ArtifactStore.resume(store.root, store.manifest, mark)
        assert same(recorded_target(resumed, "all"), target) and resumed.verify() == []
    resumed = ArtifactStore.resume(store.root, store.manifest, 10)
    assert recorded_targets(resumed) == () and resumed.verify() == []
    assert not (store.root / "targets" / "all.safetensors").exists()
    record_target(resumed, "all", target)
    assert resumed.artifacts("target")[0].step == 10


def test_what_cannot_be_recorded(store: ArtifactStore, tmp_path: Path) -> None:
    module = classifier()
    target = TargetParameters.everything(module)
    record_target(store, "K", target)
    before = store.artifacts()
    for name in ("", "a b", "../K", "a/b", "a.b", "é", "K\n"):
        with pytest.raises(StoreError, match=r"(?s)cannot be recorded.*letters, digits.*HINT"):
            record_target(store, name, target)
    with pytest.raises(StoreError, match=r"(?s)cannot be recorded as 'K'.*the names K.*HINT"):
        record_target(store, "K", target)
    with pytest.raises(CaptureError, match=r"(?s)'0.weight' differs.*no such parameter.*HINT"):
        record_target(store, "other", TargetParameters.everything(nn.Sequential(nn.Linear(2, 2))))
    assert store.artifacts() == before and store.verify() == []
    empty = ArtifactStore.create(tmp_path / "empty", manifest_of(module, Texts(), "all", "replay", 5, "float64"))
    with pytest.raises(StoreError, match=r"(?s)no checkpoint.*HINT"):
        record_target(empty, "K", target)
    assert empty.artifacts() == ()
    with pytest.raises(StoreError, match="no artifact store"):
        record_target(tmp_path / "nowhere", "K", target)


def test_what_is_not_there(store: ArtifactStore) -> None:
    with pytest.raises(StoreError, match=r"(?s)no target parameters 'K'.*none of any name.*HINT"):
        recorded_target(store, "K")
    for name in ("b", "a"):
        record_target(store, name, TargetParameters.everything(classifier()))
    with pytest.raises(StoreError, match=r"(?s)no target parameters 'K'.*one of 'a', 'b'.*HINT"):
        recorded_target(store, "K")


def test_a_file_that_was_tampered_with(store: ArtifactStore) -> None:
    record_target(store, "K", TargetParameters.everything(classifier()))
    path = store.root / "targets" / "K.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"(?s)K.safetensors is damaged.*sha256.*HINT"):
        recorded_target(store, "K")
    assert len(store.verify()) == 1 and "targets/K.safetensors" in store.verify()[0]
    path.unlink()
    with pytest.raises(StoreError):
        recorded_target(store, "K")


SHAPES: Any = [[name, list(p.shape)] for name, p in classifier().named_parameters()]
MASK = {"head.bias": torch.tensor([True, False, True])}


@pytest.mark.parametrize(
    ("tensors", "meta"),
    [
        (MASK, {}),
        (MASK, {"shapes": SHAPES}),
        (MASK, {"shapes": SHAPES, "origin": None}),
        (MASK, {"shapes": 3, "origin": {}}),
        (MASK, {"shapes": [1, 2], "origin": {}}),
        (MASK, {"shapes": [[["a"], [3]]], "origin": {}}),
        (MASK, {"shapes": [["head.bias", 3]], "origin": {}}),
        (MASK, {"shapes": [["head.bias", [4]]], "origin": {}}),
        (MASK, {"shapes": [["head.weight", [3, 4]]], "origin": {}}),
        (MASK, {"shapes": [["head.bias", [3]], ["tail", [3]]], "origin": {}}),
        ({"head.bias": torch.ones(3)}, {"shapes": SHAPES, "origin": {}}),
        ({"head.bias": torch.zeros(3).bool()}, {"shapes": SHAPES, "origin": {}}),
    ],
)
def test_a_damaged_description(store: ArtifactStore, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    writer = ArtifactStore.resume(store.root, store.manifest, None)
    writer.commit(writer.write("target", "targets/K.safetensors", tensors, step=20, mark=20, meta=meta))
    with pytest.raises(StoreError, match=r"(?s)K.safetensors does not describe target parameters.*HINT"):
        recorded_target(store, "K")
    assert recorded_targets(store) == ("K",)
