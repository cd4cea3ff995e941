"""Curvatures in a store: they come back as they were, with the weight decay of the optimizer, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_influence import ArtifactStore, CurvatureSnapshot
from lightning_influence.artifacts import ParameterGroup
from lightning_influence.artifacts.journal import Journal
from lightning_influence.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonal,
    Dense,
    Diagonal,
    Relative,
    recorded_curvature,
    statistics_of,
    weight_decay,
    write_curvature,
)
from lightning_influence.curvature.dense import DenseBlock
from lightning_influence.curvature.diagonal import DiagonalBlock
from lightning_influence.curvature.kronecker import KroneckerBlock, RowsBlock
from lightning_influence.errors import CurvatureError, InfluenceError, StoreError
from tests import reference
from tests.curvature.settings import (
    Model,
    classified,
    draws,
    every_label,
    evidence,
    flat,
    matrix_of,
    model,
    same,
    shapes_of,
    singles,
    vectors,
)
from tests.curvature.test_kronecker import Encoder, Words, texts
from tests.stores import all_names, group, quiet, replay_store

STATISTICS = [KFAC(), EKFAC(), EKFAC(exact_up_to=4), Diagonal(), Dense("fisher"), Dense("ggn"), Dense("hessian")]
IDS = ["kfac", "ekfac", "ekfac-diagonal", "diagonal", "fisher", "ggn", "hessian"]
EVERY = pytest.mark.parametrize("statistics", STATISTICS, ids=IDS)
DATA = classified(draws(8, 3))


class TextModel(nn.Module):
    """Every form of block: look-ups, matrices with and without a bias, and a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = Words(padding_idx=0), nn.LayerNorm(3)
        self.grouped, self.head = nn.Conv2d(2, 4, 1, groups=2), nn.Linear(7, 3, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.norm(self.words(tokens))
        images = self.grouped(tokens[:, :4].double().view(-1, 2, 1, 2)).mean((2, 3))
        return self.head(torch.cat([h, images], 1))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))


def bare(root: Path, module: Any, dataset: Any = DATA, steps: int = 1) -> ArtifactStore:
    """A store for writing, with checkpoints and no curvature."""
    states = [module.state_dict()] * steps

    def batch(data: Any, positions: Any) -> Any:
        return [torch.stack(column) for column in zip(*(data[i] for i in positions), strict=True)]

    store = replay_store(root, module, dataset, states, lambda c: [group(all_names(module), 0.1)], batch=batch)
    return ArtifactStore.resume(root, store.manifest, None)


def written(root: Path, module: Any, statistics: Any, dataset: Any = DATA, decay: Any = None, **options: Any) -> Any:
    """The store opened anew, and the curvature that was written into it."""
    store = bare(root, module, dataset)
    found = evidence(module, dataset, labels="exact", **options)
    curvature = statistics.collect(found)
    write_curvature(store, store.checkpoints()[-1], statistics, curvature, found, decay or {})
    return ArtifactStore.open(root), curvature


@EVERY
@pytest.mark.parametrize("make", [TextModel, Encoder, small])
def test_what_is_read_is_what_was_written(tmp_path: Path, statistics, make):
    module = model(make)
    dataset = {TextModel: texts(), Encoder: classified(draws(6, 3, 4)), small: DATA}[make]
    decay = {name: 0.1 * (k + 1) for k, name in enumerate(all_names(module)) if name.endswith("weight")}
    store, curvature = written(tmp_path / "s", module, statistics, dataset, decay)
    recorded = recorded_curvature(store)
    shapes = shapes_of(module, curvature.parameters)
    v = vectors(shapes)
    decayed = curvature.decayed(decay)
    assert torch.equal(flat(recorded.curvature.matvec(v), shapes), flat(decayed.matvec(v), shapes))
    damping = Relative(0.1)
    assert torch.equal(flat(recorded.curvature.solve(v, damping), shapes), flat(decayed.solve(v, damping), shapes))
    assert recorded.curvature.parameters == curvature.parameters
    assert (
        recorded.decay == decay
        and recorded.labels == ("exact" if statistics.uses_labels else None)
        and recorded.num_samples == len(dataset)
    )
    assert recorded.at == store.checkpoints()[-1] and recorded.name == statistics.name
    assert store.verify() == []


def test_every_form_of_block_was_among_them():
    module = model(TextModel)
    kinds = {
        type(block)
        for statistics in (EKFAC(), EKFAC(exact_up_to=4))
        for block in statistics.collect(evidence(module, texts(), labels="exact")).blocks
    }
    assert kinds == {KroneckerBlock, RowsBlock, DiagonalBlock, DenseBlock}


def test_the_record_says_how_it_came_about(tmp_path: Path):
    module = model(small)
    store, _ = written(tmp_path / "s", module, EKFAC(exact_up_to=99), seed=5, at_most=6)
    (file,) = store.artifacts("curvature")
    assert file.path.endswith("curvature-ekfac.safetensors")
    assert file.meta["statistics"] == {"class": "EKFAC", "exact_up_to": 99}
    recorded = recorded_curvature(store, "ekfac")
    assert (recorded.seed, recorded.num_samples, recorded.labels) == (5, 6, "exact")
    look = recorded.stationarity
    assert look is not None and look.num_samples == 6 and 0 < look.mean_gradient <= look.sample_gradient


def test_stationarity_is_the_norm_of_the_mean_gradient_with_weight_decay(tmp_path: Path):
    module = model(small)
    decay = dict.fromkeys(all_names(module), 0.3)
    found = evidence(module, DATA, labels="sampled", decay=decay, batch_size=3)
    Diagonal().collect(found)
    gradients = reference.per_sample_gradients(module, lambda m, batch: m.training_step(batch, 0), singles(DATA))
    total = sum(
        float((g.mean(0) + 0.3 * module.get_parameter(n).detach()).square().sum()) for n, g in gradients.items()
    )
    single = sum(float(g.square().sum()) for g in gradients.values()) / len(DATA)
    look = found.stationarity
    assert look is not None
    assert look.mean_gradient == pytest.approx(total**0.5, rel=1e-10)
    assert look.sample_gradient == pytest.approx(single**0.5, rel=1e-10)
    assert look.ratio == pytest.approx((total / single) ** 0.5, rel=1e-10)


# Which one is read


def test_the_last_checkpoint_that_has_one_unless_another_is_asked_for(tmp_path: Path):
    module = model(small)
    store = bare(tmp_path / "s", module, steps=3)
    for number, at in enumerate(store.checkpoints()[:2]):
        found = evidence(module, DATA, labels="exact", seed=number)
        write_curvature(store, at, EKFAC(), EKFAC().collect(found), found, {})
    first, second, third = store.checkpoints()
    assert recorded_curvature(store).at == second and recorded_curvature(store).seed == 1
    assert recorded_curvature(store, at=first).at == first and recorded_curvature(store, "ekfac", first).seed == 0
    with pytest.raises(CurvatureError, match=f"step {third.step} .* holds no such curvature"):
        recorded_curvature(store, at=third)


def test_several_ask_for_a_name_and_a_wrong_name_lists_those_there(tmp_path: Path):
    module = model(small)
    store = bare(tmp_path / "s", module)
    with pytest.raises(CurvatureError, match="holds no such curvature") as caught:
        recorded_curvature(store)
    assert "CurvatureSnapshot(store)" in caught.value.hint and "none" in str(caught.value.found)
    for statistics in (EKFAC(), Diagonal()):
        found = evidence(module, DATA)
        write_curvature(store, store.checkpoints()[0], statistics, statistics.collect(found), found, {})
    with pytest.raises(CurvatureError, match="several curvatures") as caught:
        recorded_curvature(store)
    assert "diagonal, ekfac" in str(caught.value) and "curvature='diagonal'" in caught.value.hint
    assert recorded_curvature(store, "diagonal").name == "diagonal"
    with pytest.raises(CurvatureError, match="no such curvature") as caught:
        recorded_curvature(store, "kfac")
    assert "diagonal, ekfac" in str(caught.value)


def test_statistics_by_name():
    assert isinstance(statistics_of("ekfac"), EKFAC) and isinstance(statistics_of("kfac"), KFAC)
    own = EKFAC(exact_up_to=3)
    assert statistics_of(own) is own
    for wrong in ("fisher", EKFAC, 3, None):
        with pytest.raises(CurvatureError, match="unknown curvature statistics"):
            statistics_of(wrong)  # type: ignore[arg-type]


# What is refused


def curvature_file(store: ArtifactStore) -> Path:
    (file,) = store.artifacts("curvature")
    return store.root / file.path


def damaged(root: Path, data: bytes) -> ArtifactStore:
    path = curvature_file(ArtifactStore.open(root))
    path.write_bytes(data)
    return ArtifactStore.open(root)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    written(tmp_path / "s", model(small), EKFAC())
    return tmp_path / "s"


def test_a_truncated_or_tampered_file_is_refused(root: Path):
    good = curvature_file(ArtifactStore.open(root)).read_bytes()
    flipped = bytearray(good)
    flipped[-20] ^= 1
    for data in (good[:-8], good[: len(good) // 2], b"", bytes(flipped), b"\x80\x02" + good[2:]):
        with pytest.raises(StoreError):
            recorded_curvature(damaged(root, data))
    curvature_file(ArtifactStore.open(root)).unlink()
    with pytest.raises(StoreError):
        recorded_curvature(ArtifactStore.open(root))


def rewritten(root: Path, change: Any) -> ArtifactStore:
    """The journal's line of the curvature, changed by someone who knows its check digits."""
    journal = Journal(root, 0)
    records = journal.read()
    for record in records:
        record.pop("check")
        if record.get("kind") == "curvature":
            change(record["meta"])
    journal.replace(records)
    return ArtifactStore.open(root)


CHANGES = {
    "unknown kind": lambda meta: meta.update(kind="quantum"),
    "unknown block": lambda meta: meta["config"]["blocks"][0].update(kind="quantum"),
    "no config": lambda meta: meta.pop("config"),
    "no kind": lambda meta: meta.pop("kind"),
    "no name": lambda meta: meta.pop("name"),
    "no labels": lambda meta: meta.pop("labels"),
    "no blocks": lambda meta: meta["config"].pop("blocks"),
    "blocks of nonsense": lambda meta: meta["config"].update(blocks=7),
    "one block too many": lambda meta: meta["config"]["blocks"].append(dict(meta["config"]["blocks"][0])),
    "no shape": lambda meta: meta["config"]["blocks"][0].pop("shape"),
    "another shape": lambda meta: meta["config"]["blocks"][0].update(shape=[5, 7]),
    "no bias": lambda meta: meta["config"]["blocks"][0].update(bias=False),
    "one name too few": lambda meta: meta["config"]["blocks"][0]["names"].pop(),
    "another name": lambda meta: meta["config"]["blocks"][0].update(names=["other.weight", "other.bias"]),
    "nonsense for a number": lambda meta: meta.update(num_samples="many"),
    "nonsense for decay": lambda meta: meta.update(decay=[1, 2]),
    "nonsense for stationarity": lambda meta: meta.update(stationarity={"ratio": 1}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_description_that_does_not_fit_is_refused(root: Path, change):
    store = rewritten(root, change)
    with pytest.raises(InfluenceError) as caught:
        recorded_curvature(store)
    assert isinstance(caught.value, StoreError)


# Weight decay


def of(optimizer: str, names: list[str], decay: float | None, **options: Any) -> ParameterGroup:
    kept = options if decay is None else {"weight_decay": decay, **options}
    return ParameterGroup(optimizer, 0, tuple(names), 0.1, 0.1, kept)


def test_an_l2_term_adds_itself_and_decoupled_decay_adds_its_share_of_the_denominator():
    scales = {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([10.0])}
    names = ("a", "b", "c")
    assert weight_decay((of("SGD", ["a", "b"], 0.1),), names, {}) == {"a": 0.1, "b": 0.1}
    assert weight_decay((of("Adam", ["a", "b"], 0.1),), names, scales) == {"a": 0.1, "b": 0.1}
    assert weight_decay((of("AdamW", ["a", "b"], 0.1),), names, scales) == {"a": 0.2, "b": 1.0}
    adam = of("Adam", ["a"], 0.1, decoupled_weight_decay=True)
    assert weight_decay((adam,), names, scales) == {"a": 0.2}
    no_decay = (of("AdamW", ["a"], 0.1), of("AdamW", ["b"], 0.0), of("SGD", ["c"], None))
    assert weight_decay(no_decay, names, scales) == {"a": 0.2}
    assert weight_decay((of("SGD", ["a", "b"], 0.1),), ("b",), {}) == {"b": 0.1}
    assert weight_decay((of("SGD", ["a"], 0.1), of("SGD", ["a"], 0.2)), names, {})["a"] == pytest.approx(0.3)
    assert weight_decay((of("SGD", ["a"], 0.1),), names, {}, summed_over=4) == {"a": 0.025}


class Trained(Model):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(nn.Linear(3, 3))
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer([{"params": [self.network.weight]}, {"params": [self.network.bias], "weight_decay": 0.0}])


OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.05),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.05),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.05),
    "adam, decoupled": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.05, decoupled_weight_decay=True),
    "none": lambda groups: torch.optim.SGD(groups, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("statistics", [Dense("fisher"), Diagonal(), EKFAC()], ids=lambda s: s.name)
def test_the_decay_of_a_fit_is_part_of_its_curvature_and_on_record(tmp_path: Path, name, statistics):
    module = model(lambda: Trained(OPTIMIZERS[name]))
    snapshot = CurvatureSnapshot(tmp_path / "s", statistics, labels="exact")
    quiet(max_epochs=2, callbacks=[snapshot]).fit(module, DataLoader(DATA, batch_size=4))
    store = ArtifactStore.open(tmp_path / "s")
    recorded = recorded_curvature(store)
    names = all_names(module)
    expected = {"none": 0.0, "sgd": 0.05, "adam": 0.05}.get(name)
    if expected is None:
        scales = store.preconditioner(store.checkpoints()[-1])
        moments = module.trainer.optimizers[0].state[module.network.weight]
        second = moments["exp_avg_sq"] / (1 - 0.999 ** float(moments["step"]))
        expected = 0.05 * float((second.sqrt() + 1e-8).mean())
        assert expected == pytest.approx(0.05 * float(scales["network.weight"].mean()), rel=1e-12)
    assert recorded.decay == ({} if name == "none" else {"network.weight": pytest.approx(expected, rel=1e-12)})
    plain = statistics.collect(evidence(module, DATA, labels="exact"))
    found = matrix_of(recorded.curvature, shapes_of(module, names)) - matrix_of(plain, shapes_of(module, names))
    bias = expected if isinstance(statistics, EKFAC) else 0.0  # shares the eigenbasis of its weight
    wide: Any = {"dtype": torch.float64}
    same(found, torch.diag(torch.cat([torch.full((9,), expected, **wide), torch.full((3,), bias, **wide)])), 1e-8)


def test_the_truth_behind_all_of_it(tmp_path: Path):
    """A store of a real fit gives the Fisher information at the weights that the fit ended with."""
    module = model(lambda: Trained(OPTIMIZERS["none"]))
    loader = DataLoader(DATA, batch_size=3)
    quiet(max_epochs=2, callbacks=[CurvatureSnapshot(tmp_path / "s", Dense("fisher"))]).fit(module, loader)
    recorded = recorded_curvature(ArtifactStore.open(tmp_path / "s"))
    names = all_names(module)
    truth = reference.fisher(module, every_label, singles(DATA), names).mean(0)
    assert isinstance(recorded.curvature, BlockDiagonal)
    same(matrix_of(recorded.curvature, shapes_of(module, names)), truth)
    assert recorded.labels == "exact"
    assert isinstance(DATA, TensorDataset)
