"""StageLinker in real fits: what it checks, what it records, what it leaves alone, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import (
    ArtifactStore,
    CurvatureSnapshot,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    MatrixFree,
    MultiStage,
    Proximity,
    QueryError,
    SmallProximity,
    Source,
    StageLinker,
    StoreError,
    TracIn,
    UnsupportedError,
)
from lightning_influence.cli import inspected
from tests.callbacks.fits import WARNINGS
from tests.two_stages import Finetuned, Network, begun, data, fit

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in WARNINGS),
    pytest.mark.filterwarnings("ignore:The model was far from a stationary point"),
]
PRE, FINE, ASKED = data(20, 3, 0), data(16, 2, 1), data(4, 2, 2)
ENCODER = ("encoder.0.weight", "encoder.0.bias")


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network]:
    """A pretraining run with gradients and curvature."""
    root = tmp_path_factory.mktemp("pretraining")
    seed_everything(0, verbose=False)
    module = Network(3).double()
    fit(root, module, PRE, GradientSnapshot(root / "pre", "all"), CurvatureSnapshot(root / "pre"))
    return root / "pre", module


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("beside", ["alone", "curvature", "gradients"])
def test_the_link_says_what_became_of_the_shared_weights(tmp_path, pretraining, frozen, beside):
    folder, pretrained = pretraining
    module = begun(pretrained, frozen=frozen)
    others = {
        "alone": [],
        "curvature": [CurvatureSnapshot(tmp_path / "fine")],
        "gradients": [GradientSnapshot(tmp_path / "fine", "all"), CurvatureSnapshot(tmp_path / "fine")],
    }[beside]
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder), *others)
    store = ArtifactStore.open(tmp_path / "fine")
    link = store.link
    assert link is not None and link.complete
    assert link.parent == ArtifactStore.open(folder).identity
    assert dict(link.shared) == {name: name for name in ENCODER}
    assert link.other_shapes == ("head.weight", "head.bias")  # resized: not shared
    assert link.frozen == (ENCODER if frozen else ())
    steps, rate = 2 * 4, 0.1
    trained = [name for name, _ in module.named_parameters() if not (frozen and name in ENCODER)]
    assert link.travel == pytest.approx(dict.fromkeys(trained, steps * rate / (1 - 0.5)))
    assert link.optimizers == ("SGD",) and link.preconditioned == ()
    assert store.verify() == []
    weights = store.weights(store.checkpoints()[-1])
    assert all(torch.equal(weights[name], p) for name, p in module.named_parameters())
    frozen_of = "2 frozen, 0 tuned" if frozen else "0 frozen, 2 tuned"
    assert f"began from    2 parameters of {folder}" in inspected(store)[0] and frozen_of in inspected(store)[0]


def test_adam_says_its_denominators(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, optimizer="Adam")
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder), CurvatureSnapshot(tmp_path / "fine"))
    store = ArtifactStore.open(tmp_path / "fine")
    link = store.link
    assert link is not None and set(link.preconditioned) == {name for name, _ in module.named_parameters()}
    assert link.travel == pytest.approx(dict.fromkeys(link.travel, 8 * 0.01))
    influence = InfluenceModule(module, store, MultiStage(InfluenceFunction("ekfac")))
    assert bool(influence.scores(ASKED.tensors).isfinite().all())
    problem = influence.estimator.problem(influence.stage)
    scale = store.preconditioner(store.checkpoints()[-1])[ENCODER[0]]
    torch.testing.assert_close(problem.held[ENCODER[0]], scale / 0.08)


def test_training_is_bit_identical_with_and_without(tmp_path, pretraining):
    folder, pretrained = pretraining
    ends = []
    for callbacks in ([], [StageLinker(tmp_path / "a", pretrain=folder)],
                      [StageLinker(tmp_path / "b", pretrain=folder), CurvatureSnapshot(tmp_path / "b")]):  # fmt: skip
        module = begun(pretrained)
        fit(tmp_path, module, FINE, *callbacks)
        ends.append(
            {name: p.detach().clone() for name, p in module.state_dict().items()} | {"rng": torch.get_rng_state()}
        )
    for other in ends[1:]:
        assert all(torch.equal(ends[0][name], other[name]) for name in ends[0])


def test_a_resumed_fit_has_the_link_of_one_that_was_not_interrupted(tmp_path, pretraining):
    folder, pretrained = pretraining
    whole = begun(pretrained)
    fit(tmp_path / "w", whole, FINE, StageLinker(tmp_path / "whole", pretrain=folder), epochs=3)
    module = begun(pretrained)
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, save_on_train_epoch_end=True)
    linker = StageLinker(tmp_path / "fine", pretrain=folder)
    fit(tmp_path / "r", module, FINE, linker, saver, epochs=1, enable_checkpointing=True)
    again = begun(pretrained)
    linker = StageLinker(tmp_path / "fine", pretrain=folder)
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, save_on_train_epoch_end=True)
    last = tmp_path / "ckpt" / "last.ckpt"
    fit(tmp_path / "r", again, FINE, linker, saver, epochs=3, enable_checkpointing=True, ckpt_path=last)
    one, other = (ArtifactStore.open(tmp_path / name).link for name in ("whole", "fine"))
    assert one is not None and other is not None and other.complete
    assert one.travel == pytest.approx(other.travel)
    assert (one.shared, one.frozen, one.start) == (other.shared, other.frozen, other.start)


def test_weights_in_another_type_are_converted_and_recorded(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained).float()
    float_data = torch.utils.data.TensorDataset(FINE.tensors[0].float(), FINE.tensors[1])
    fit(tmp_path, module, float_data, StageLinker(tmp_path / "fine", pretrain=folder))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and dict(link.converted) == dict.fromkeys(ENCODER, "float64 -> float32")


class Wrapped(Finetuned):
    """The encoder under another name, an adapter on its frozen weights, and a layer tied to another."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"encoder": self.encoder})
        self.adapter = nn.Linear(4, 4, bias=False)
        self.twin = self.adapter
        del self.encoder
        self.backbone.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone["encoder"](x)
        return self.head(h + self.twin(self.adapter(h)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "shared",
    [
        {"encoder.*": "backbone.encoder.*"},
        {"encoder.0.weight": "backbone.encoder.0.weight", "encoder.0.bias": "backbone.encoder.0.bias"},
    ],
    ids=["star", "by name"],
)
def test_names_may_differ_and_additions_are_new_parameters(tmp_path, pretraining, shared):
    folder, pretrained = pretraining
    seed_everything(1, verbose=False)
    module = Wrapped().double()
    module.backbone["encoder"].load_state_dict(pretrained.encoder.state_dict())
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder, shared=shared))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and dict(link.shared) == {f"backbone.{name}": name for name in ENCODER}
    assert set(link.travel) == {"adapter.weight", "head.weight", "head.bias"}
    method = MultiStage(InfluenceFunction("ekfac"), finetuned=InfluenceFunction(MatrixFree("ggn"), damping=0.1))
    influence = InfluenceModule(module, tmp_path / "fine", method, train_loader=DataLoader(FINE, 4))
    assert influence.scores(ASKED.tensors).shape == (4, 20)


class Thawing(BaseFinetuning):
    """Lightning's own way to freeze a backbone first."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.encoder)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.encoder, optimizer, lr=0.05)


def test_what_is_thawed_on_the_way_counts_as_tuned(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained)
    fit(tmp_path, module, FINE, Thawing(), StageLinker(tmp_path / "fine", pretrain=folder))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and link.frozen == () and link.moved_though_frozen == ()
    assert link.travel[ENCODER[0]] == pytest.approx(4 * 0.05 / (1 - 0.5))  # the rate of its own group, for one epoch


# -- from a real pair of runs to answers ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, pretraining: Any) -> tuple[Path, Finetuned]:
    """Both stores in one folder, and the finetuned module."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(pretraining[0], root / "pre")
    module = begun(pretraining[1])
    snapshots = GradientSnapshot(root / "fine", "all"), CurvatureSnapshot(root / "fine")
    fit(root, module, FINE, StageLinker(root / "fine", pretrain=root / "pre"), *snapshots)
    return root, module


def test_predict_answers_with_pretraining_samples(pair):
    root, module = pair
    influence = InfluenceModule(module, root / "fine", MultiStage(InfluenceFunction("ekfac")), k=3)
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    trainer.predict(influence, DataLoader(ASKED, 2))
    scores = influence.scores(ASKED.tensors)
    assert scores.shape == (4, 20)
    best = scores.topk(3, dim=1)
    torch.testing.assert_close(influence.attribution.proponents.scores, best.values)
    assert torch.equal(influence.attribution.proponents.sample_ids, best.indices)
    removed = influence.predict_removal(ASKED.tensors, [0, 5, 19])
    torch.testing.assert_close(removed, scores[:, [0, 5, 19]].double().sum(1) / 20)


def test_streamed_pretraining_data_have_the_scores_of_stored_gradients(pair, pretraining):
    root, module = pair
    stored = InfluenceModule(module, root / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    method = MultiStage(InfluenceFunction("ekfac"), module=copy.deepcopy(pretraining[1]))
    influence = InfluenceModule(module, root / "fine", method, k=20)
    influence.prepare([ASKED.tensors])
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    trainer.predict(influence, DataLoader(PRE, 4))
    found = influence.attribution.proponents
    torch.testing.assert_close(torch.zeros_like(stored).scatter(1, found.sample_ids, found.scores), stored)


def test_mixed_attribution_ranks_both_runs_on_one_scale(pair):
    root, module = pair
    influence = InfluenceModule(module, root / "fine", MultiStage(InfluenceFunction("ekfac"), Proximity(0.1)))
    mixed = influence.mixed(ASKED.tensors, k=4)
    pre = influence.scores(ASKED.tensors) / 20
    torch.testing.assert_close(mixed.pretraining.proponents.scores, pre.topk(4, dim=1).values)
    torch.testing.assert_close(mixed.amounts[:, 1], pre.abs().double().sum(1))
    # the finetuning samples, held to the start by 2α: the same as a plain influence function of that curvature
    problem = influence.estimator.problem(influence.stage)
    plain = InfluenceModule(module, root / "fine", _Decayed({name: 0.2 for name in ENCODER}))
    fine = plain.scores(ASKED.tensors) / 16
    torch.testing.assert_close(mixed.finetuning.proponents.scores, fine.topk(4, dim=1).values)
    torch.testing.assert_close(mixed.shares.sum(1), torch.ones(4, dtype=torch.float64))
    assert problem.held == dict.fromkeys(ENCODER, 0.2)


class _Decayed(InfluenceFunction):
    """EK-FAC with a number added to the diagonal of some parameters."""

    def __init__(self, more: dict[str, float]) -> None:
        super().__init__("ekfac")
        self._more = more

    def recorded(self, stage: Any) -> Any:
        from dataclasses import replace

        found = super().recorded(stage)
        return replace(found, curvature=found.curvature.decayed(self._more))


def test_tracin_inside_ranks_and_tells_no_amounts(pair):
    root, module = pair
    influence = InfluenceModule(module, root / "fine", MultiStage(TracIn(), SmallProximity()))
    assert influence.query(ASKED.tensors, k=3).proponents.sample_ids.shape == (4, 3)
    with pytest.raises(QueryError, match="rank samples"):
        influence.predict_removal(ASKED.tensors, [0])
    with pytest.raises(QueryError, match="only rank"):
        influence.mixed(ASKED.tensors)


def test_both_folders_may_move_together_and_one_may_not(pair, tmp_path):
    root, module = pair
    shutil.copytree(root, tmp_path / "elsewhere")
    expected = InfluenceModule(module, root / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    found = InfluenceModule(module, tmp_path / "elsewhere" / "fine", MultiStage(InfluenceFunction("ekfac")))
    assert torch.equal(found.scores(ASKED.tensors), expected)
    assert found.estimator.parent(found.stage).store.root == tmp_path / "elsewhere" / "pre"


def test_a_parent_that_is_gone_or_another_is_refused(pair, tmp_path):
    root, module = pair
    shutil.copytree(root / "fine", tmp_path / "alone" / "fine")
    link = ArtifactStore.open(tmp_path / "alone" / "fine").link
    assert link is not None
    shutil.copytree(root / "pre", tmp_path / "pre")
    moved = MultiStage(InfluenceFunction("ekfac"), store=tmp_path / "pre")
    InfluenceModule(module, tmp_path / "alone" / "fine", moved).scores(ASKED.tensors)
    other = MultiStage(InfluenceFunction("ekfac"), store=root / "fine")
    with pytest.raises(StoreError, match="is not there") as refused:
        InfluenceModule(module, tmp_path / "alone" / "fine", other).scores(ASKED.tensors)
    assert "another store" in str(refused.value)
    with pytest.raises(StoreError, match="linked to no earlier run"):
        InfluenceModule(Network(3).double(), root / "pre", MultiStage(InfluenceFunction())).scores(ASKED.tensors)


def test_frozen_parameters_need_the_finetuning_data_or_leave_to_ignore_them(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, frozen=True)
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder), CurvatureSnapshot(tmp_path / "fine"))
    with pytest.raises(QueryError, match="ignore_cross_terms=True"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    ignoring = MultiStage(InfluenceFunction("ekfac"), ignore_cross_terms=True)
    without = InfluenceModule(module, tmp_path / "fine", ignoring).scores(ASKED.tensors)
    method, fine = MultiStage(InfluenceFunction("ekfac")), DataLoader(FINE, 4)
    whole = InfluenceModule(module, tmp_path / "fine", method, train_loader=fine).scores(ASKED.tensors)
    assert not torch.allclose(without, whole)
    assert all(p.requires_grad != name.startswith("encoder") for name, p in module.named_parameters())


# -- names, heads and buffers ---------------------------------------------------------------------------------------


class Prefixed(Finetuned):
    """All of the network under another name."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__(classes)
        self.net = nn.ModuleDict({"encoder": self.encoder, "head": self.head})
        del self.encoder, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.net["head"](self.net["encoder"](x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("classes", "settings", "other_shapes"),
    [(2, {}, ("net.head.weight", "net.head.bias")), (2, {"fresh": "net.head.*"}, ()), (3, {"fresh": "net.head.*"}, ())],
    ids=["resized", "resized and fresh", "fresh"],
)
def test_a_star_over_all_takes_the_encoder_alone(tmp_path, pretraining, classes, settings, other_shapes):
    folder, pretrained = pretraining
    seed_everything(1, verbose=False)
    module = Prefixed(classes).double()
    module.net["encoder"].load_state_dict(pretrained.encoder.state_dict())
    linker = StageLinker(tmp_path / "fine", pretrain=folder, shared={"*": "net.*"}, **settings)
    fit(tmp_path, module, data(8, classes, 5), linker, epochs=1)
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and dict(link.shared) == {f"net.{name}": name for name in ENCODER}
    assert link.other_shapes == other_shapes


class Alias(Finetuned):
    """A second name of the encoder's weight, which PyTorch leaves out of named_parameters()."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = nn.Linear(3, 4, bias=False)
        self.mirror.weight = self.encoder[0].weight


@pytest.mark.parametrize("name", ["encoder.0.weight", "mirror.weight"])
def test_any_name_of_a_tied_parameter_will_do(tmp_path, pretraining, name):
    folder, pretrained = pretraining
    module = begun(pretrained, Alias)
    linker = StageLinker(tmp_path / "fine", pretrain=folder, shared={"encoder.0.weight": name})
    fit(tmp_path, module, FINE, linker, epochs=1)
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and dict(link.shared) == {"encoder.0.weight": "encoder.0.weight"}


class Normed(Finetuned):
    """With running statistics."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__(classes)
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.encoder.requires_grad_(classes == 3)


def test_running_statistics_that_begin_otherwise_are_told_and_a_query_is_in_eval_mode(tmp_path):
    seed_everything(0, verbose=False)
    pretrained = Normed(3).double()
    fit(tmp_path, pretrained, PRE, GradientSnapshot(tmp_path / "pre", "all"), CurvatureSnapshot(tmp_path / "pre"))
    whole, parts = Normed().double(), Normed().double()
    state = pretrained.encoder.state_dict()
    whole.encoder.load_state_dict(state)
    parts.encoder.load_state_dict({n: v for n, v in state.items() if "running" not in n}, strict=False)
    with pytest.warns(UserWarning, match=r"encoder\.1\.running_mean, encoder\.1\.running_var begin with other values"):
        fit(tmp_path, parts, FINE, StageLinker(tmp_path / "parts", pretrain=tmp_path / "pre"), epochs=1)
    linker = StageLinker(tmp_path / "whole", pretrain=tmp_path / "pre")
    fit(tmp_path, whole, FINE, linker, CurvatureSnapshot(tmp_path / "whole"))  # warnings are errors
    buffers = copy.deepcopy(dict(whole.named_buffers()))
    influence = InfluenceModule(
        whole, tmp_path / "whole", MultiStage(InfluenceFunction("ekfac")), train_loader=DataLoader(FINE, 4)
    )
    whole.train()
    scores = influence.scores(ASKED.tensors)
    alone = torch.cat([influence.scores([part[i : i + 1] for part in ASKED.tensors]) for i in range(4)])
    torch.testing.assert_close(alone, scores, rtol=1e-10, atol=1e-12)  # in training mode they would hang together
    assert whole.training and all(torch.equal(buffers[name], value) for name, value in whole.named_buffers())


class Kept(Finetuned):
    """A head that nothing uses any more."""

    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(4, 3)


class Silent(Finetuned):
    """The encoder runs without gradients, and its parameters require them all the same."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.encoder(x)
        return self.head(h)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "still"), [(Kept, ("old.weight", "old.bias")), (Silent, ENCODER)])
def test_what_no_gradient_reaches_is_frozen(tmp_path, pretraining, kind, still):
    folder, pretrained = pretraining
    fit(tmp_path, begun(pretrained, kind), FINE, StageLinker(tmp_path / "fine", pretrain=folder))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and link.complete and link.frozen == still
    assert link.travel == pytest.approx(dict.fromkeys(link.travel, 8 * 0.2)) and not set(still) & set(link.travel)


# -- proximities, and fits that go another way ----------------------------------------------------------------------


def test_the_proximity_of_the_run_is_taken_unless_another_is_given(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained)
    linker = StageLinker(tmp_path / "fine", pretrain=folder, proximity=0.7)
    fit(tmp_path, module, FINE, linker, CurvatureSnapshot(tmp_path / "fine"), epochs=1)
    for form, held in ((None, 1.4), (Proximity(), 1.4), (Proximity(0.1), 0.2), (Source(), 1 / 0.8)):
        influence = InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"), form))
        found = influence.estimator.problem(influence.stage).held
        names = ENCODER if form is None or isinstance(form, Proximity) else (*ENCODER, "head.weight", "head.bias")
        assert found == pytest.approx(dict.fromkeys(names, held), rel=1e-12)


def test_an_optimizer_that_divides_otherwise_ends_well_and_has_no_default_proximity(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, optimizer="Adafactor")
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder), CurvatureSnapshot(tmp_path / "fine"))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and link.complete and dict(link.travel) == {} and link.optimizers == ("Adafactor",)
    for form in (Proximity(), Source()):
        with pytest.raises(QueryError, match="how far finetuning went is not known") as refused:
            InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"), form)).scores(
                ASKED.tensors
            )
        assert "Adafactor" in str(refused.value)


def test_a_finished_fit_that_is_taken_up_and_interrupted_has_not_ended(tmp_path, pretraining):
    folder, pretrained = pretraining

    class Stopping(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            raise RuntimeError("power cut")

    def run(*more: Callback, **options: Any) -> None:
        linker = StageLinker(tmp_path / "fine", pretrain=folder)
        saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, save_on_train_epoch_end=True)
        snapshot = CurvatureSnapshot(tmp_path / "fine", every_n_epochs=1)
        fit(tmp_path, module, FINE, linker, snapshot, saver, *more, enable_checkpointing=True, **options)

    module = begun(pretrained)
    last = tmp_path / "ckpt" / "last.ckpt"
    run(epochs=1)
    assert ArtifactStore.open(tmp_path / "fine").link.complete  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="power cut"):
        run(Stopping(), epochs=3, ckpt_path=last)
    assert not ArtifactStore.open(tmp_path / "fine").link.complete  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="did not reach its end"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    run(epochs=2, ckpt_path=last)
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and link.complete
    assert link.travel == pytest.approx(dict.fromkeys(link.travel, 8 * 0.2), rel=1e-12)


def test_a_linker_without_a_folder_serves_another_fit(tmp_path, pretraining):
    folder, pretrained = pretraining
    linker = StageLinker(pretrain=folder)
    for place in ("one", "two"):
        fit(tmp_path / place, begun(pretrained), FINE, linker, epochs=1)
        store = ArtifactStore.open(tmp_path / place / "influence")
        assert store.link is not None and store.link.complete
        assert store.link.travel == pytest.approx(dict.fromkeys(store.link.travel, 4 * 0.2), rel=1e-12)
        assert [checkpoint.step for checkpoint in store.checkpoints()] == [4]


def test_a_linker_of_a_resumed_fit_serves_another_fit(tmp_path, pretraining):
    folder, pretrained = pretraining
    first, again = StageLinker(pretrain=folder), StageLinker(pretrain=folder)

    def run(place: str, linker: StageLinker, **options: Any) -> Path:
        saver = ModelCheckpoint(tmp_path / place / "ckpt", save_last=True, save_on_train_epoch_end=True)
        settings = {"logger": CSVLogger(tmp_path / place), "enable_checkpointing": True, **options}
        fit(tmp_path / place, begun(pretrained), FINE, linker, saver, **settings)
        return linker.artifacts.root

    root = run("a", first, epochs=1)
    assert run("a", again, epochs=2, ckpt_path=tmp_path / "a" / "ckpt" / "last.ckpt") == root
    other = run("b", again, epochs=1)
    assert tmp_path / "b" in other.parents
    for place, steps in ((root, 8), (other, 4)):
        link = ArtifactStore.open(place).link
        assert link is not None and link.complete
        assert link.travel == pytest.approx(dict.fromkeys(link.travel, steps * 0.2), rel=1e-12)


class Removing(Callback):
    """Moves a folder away in the middle of the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            shutil.rmtree(self.folder)


def test_a_fit_ends_well_without_the_pretraining_folder(tmp_path, pretraining):
    folder, pretrained = pretraining
    shutil.copytree(folder, tmp_path / "pre")
    module = begun(pretrained)
    linker = StageLinker(tmp_path / "fine", pretrain=tmp_path / "pre")
    fit(tmp_path, module, FINE, Removing(tmp_path / "pre"), linker, CurvatureSnapshot(tmp_path / "fine"))
    link = ArtifactStore.open(tmp_path / "fine").link
    assert link is not None and link.complete and dict(link.shared) == {name: name for name in ENCODER}
    with pytest.raises(StoreError, match="is not there"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    elsewhere = MultiStage(InfluenceFunction("ekfac"), store=folder)
    assert InfluenceModule(module, tmp_path / "fine", elsewhere).scores(ASKED.tensors).shape == (4, 20)


def test_a_run_before_the_pretraining_run_need_not_be_there(pair, tmp_path):
    root, module = pair
    shutil.copytree(root / "fine", tmp_path / "middle" / "fine")
    before = ArtifactStore.open(root / "fine").link
    assert before is not None
    moved = ArtifactStore.open(tmp_path / "middle" / "fine")
    gone = dataclasses.replace(before, parent_folder="/nowhere")
    ArtifactStore.resume(moved.root, moved.manifest, None).record_link(gone)
    third = begun(module)
    third.load_state_dict(module.state_dict())
    fit(tmp_path, third, FINE, StageLinker(tmp_path / "third", pretrain=moved.root), epochs=1)
    link = ArtifactStore.open(tmp_path / "third").link
    assert link is not None and link.complete and len(link.shared) == 4


# -- refusals -------------------------------------------------------------------------------------------------------


def test_other_weights_than_the_pretraining_runs_are_refused_before_the_first_step(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained)
    with torch.no_grad():
        module.encoder[0].bias.add_(1e-3)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(StoreError, match="shared parameters are not those") as refused:
        fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder))
    assert "encoder.0.bias" in str(refused.value) and "HINT" in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_head_of_the_same_shape_is_new_where_it_is_said_so(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, classes=3)
    three = data(12, 3, 5)
    with pytest.raises(StoreError, match="fresh"):
        fit(tmp_path, copy.deepcopy(module), three, StageLinker(tmp_path / "a", pretrain=folder))
    fit(tmp_path, module, three, StageLinker(tmp_path / "b", pretrain=folder, fresh="head.*"))
    link = ArtifactStore.open(tmp_path / "b").link
    assert link is not None and set(link.shared) == set(ENCODER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared": {"body.*": "encoder.*"}}, "the earlier run has no parameter 'body"),
        ({"shared": {"encoder.*": "body.*"}}, "this run has no parameter 'body.0."),
        ({"shared": {"head.weight": "head.weight"}}, "another shape"),
        ({"shared": {"encoder.*": "encoder"}}, "one star"),
        ({"fresh": "tail.*"}, "no parameter here"),
    ],
)
def test_names_that_are_none_are_refused(tmp_path, pretraining, settings, message):
    folder, pretrained = pretraining
    with pytest.raises(StoreError, match=message.replace("*", r"\*")):
        fit(tmp_path, begun(pretrained), FINE, StageLinker(tmp_path / "fine", pretrain=folder, **settings))


def test_stores_that_cannot_come_before_are_refused(tmp_path, pretraining):
    folder, pretrained = pretraining
    with pytest.raises(StoreError, match="no artifact store"):
        fit(tmp_path, begun(pretrained), FINE, StageLinker(tmp_path / "fine", pretrain=tmp_path / "nothing"))
    with pytest.raises(StoreError, match="before itself"):
        fit(tmp_path, begun(pretrained), FINE, StageLinker(folder, pretrain=folder))
    with pytest.raises(UnsupportedError, match="pretrain must be a folder"):
        StageLinker(tmp_path / "fine", pretrain=3)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="proximity"):
        StageLinker(tmp_path / "fine", pretrain=folder, proximity=-1.0)


class Writing(Callback):
    """Writes into frozen weights, as an exponential moving average might."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            pl_module.encoder[0].bias.add_(0.1)


def test_weights_that_moved_though_frozen_are_told_and_refused_later(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, frozen=True)
    with pytest.warns(UserWarning, match="moved though declared frozen"):
        fit(tmp_path, module, FINE, Writing(), StageLinker(tmp_path / "fine", pretrain=folder))
    with pytest.raises(StoreError, match="moved though they were declared frozen"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)


def test_an_optimizer_that_does_not_say_how_far_it_went_asks_for_the_proximity(tmp_path, pretraining):
    folder, pretrained = pretraining
    module = begun(pretrained, optimizer="lbfgs")
    fit(tmp_path, module, FINE, StageLinker(tmp_path / "fine", pretrain=folder), CurvatureSnapshot(tmp_path / "fine"))
    with pytest.raises(QueryError, match=r"Proximity\(alpha\)"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac"))).scores(ASKED.tensors)
    told = MultiStage(InfluenceFunction("ekfac"), Proximity(0.1))
    InfluenceModule(module, tmp_path / "fine", told).scores(ASKED.tensors)


def test_a_fit_that_was_interrupted_has_no_finished_link(tmp_path, pretraining):
    folder, pretrained = pretraining

    class Stopping(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            raise RuntimeError("power cut")

    module = begun(pretrained)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, module, FINE, Stopping(), StageLinker(tmp_path / "fine", pretrain=folder))
    with pytest.raises(StoreError, match="did not reach its end"):
        InfluenceModule(module, tmp_path / "fine", MultiStage(InfluenceFunction("ekfac")))._checked_k(None)
