"""What CurvatureSnapshot writes: at which steps, of which weights, beside whom, and what the record says of it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from lightning_influence import ArtifactStore, CurvatureSnapshot, GradientSnapshot, InfluenceModule, TracIn
from lightning_influence.curvature import EKFAC, Dense, Diagonal, recorded_curvature
from lightning_influence.curvature import evidence as evidence_room
from lightning_influence.errors import StoreError, UnsupportedError
from lightning_influence.gradients import Dense as Vectors
from tests.callbacks.curvature_fits import Net, assert_same, batches, curvatures, estimate, everything, vectors
from tests.callbacks.fits import WARNINGS, Classifier, WeightsBefore, fit, padded, seeded, singles, state_hash, stored
from tests.callbacks.fits import Texts as ShortTexts
from tests.callbacks.fits import loader as texts
from tests.callbacks.test_resume import assert_equal

pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]


def run(root: Path, *callbacks: Callback, make: Any = Net, data: Any = None, **options: Any) -> Trainer:
    return fit(root, seeded(make), None, *callbacks, data=batches() if data is None else data, **options)


def steps_of(store: ArtifactStore) -> list[int]:
    return [step for step, _ in curvatures(store)]


# -- when, and at which weights ----------------------------------------------------------------------------------------

MOMENTS: list[tuple[dict[str, Any], dict[str, Any], list[tuple[int, int]]]] = [  # settings, Trainer, (step, epoch)
    ({}, {}, [(8, 1)]),
    ({"every_n_epochs": 1}, {}, [(4, 0), (8, 1)]),
    ({"every_n_epochs": 2}, {"max_epochs": 5}, [(8, 1), (16, 3), (20, 4)]),
    ({"at_steps": [3, 4, 6]}, {}, [(3, 0), (4, 0), (6, 1), (8, 1)]),  # the second in the last batch of an epoch
    ({"at_steps": [2], "every_n_epochs": 1}, {"accumulate_grad_batches": 2}, [(2, 0), (4, 1)]),
    ({"at_steps": [1, 3]}, {"accumulate_grad_batches": 3}, [(1, 0), (3, 1), (4, 1)]),
    ({"at_steps": [2, 100]}, {"max_epochs": -1, "max_steps": 5}, [(2, 0), (5, 1)]),
]


@pytest.mark.parametrize(("settings", "options", "expected"), MOMENTS)
def test_snapshots_are_taken_when_they_are_due_and_at_the_weights_beside_them(
    tmp_path: Path, settings: Any, options: Any, expected: Any
) -> None:
    snapshot, before = CurvatureSnapshot(tmp_path / "store", Diagonal(), **settings), WeightsBefore()
    module = run(tmp_path, snapshot, before, **options).lightning_module
    store = snapshot.artifacts
    assert [(c.step, c.epoch) for c in store.checkpoints()] == expected and store.verify() == []
    assert steps_of(store) == [step for step, _ in expected]
    for at in store.checkpoints():
        weights = store.weights(at)
        if at.step in before.at:  # a batch followed
            assert all(torch.equal(weights[name], value) for name, value in before.at[at.step].items())
        assert_same(store, curvatures(store)[at.step, "diagonal"], estimate(module, store, at, Diagonal())[0])


@pytest.mark.parametrize("mode", ["replay", "in_flight"])
def test_a_shared_folder_is_one_store_in_whatever_order_the_callbacks_stand(tmp_path: Path, mode: Any) -> None:
    """... with gradients wherever there is a curvature, and rates that sum to those of the whole run."""

    def go(name: str, *order: int) -> Path:
        root = tmp_path / name
        callbacks: list[Callback] = [
            GradientSnapshot(root, "head.*", mode=mode, every_n_epochs=2),
            CurvatureSnapshot(root, at_steps=[3, 4, 6, 9]),
            CurvatureSnapshot(str(root), "kfac", mode="in_flight", every_n_epochs=2),
        ]
        assert state_hash(run(tmp_path, *(callbacks[i] for i in order), max_epochs=3)) == plain
        return root

    plain = state_hash(run(tmp_path, max_epochs=3))
    first, second, third = go("a", 0, 1, 2), go("b", 2, 1, 0), go("c", 1, 0, 2)
    found = everything(first)
    assert_equal(found, everything(second))
    assert_equal(found, everything(third))
    store = ArtifactStore.open(first)
    start = [0] if mode == "in_flight" else []
    assert [c.step for c in store.checkpoints()] == [*start, 3, 4, 6, 8, 9, 12]
    assert [c.epoch for c in store.checkpoints()] == [*start, 0, 0, 1, 1, 2, 2]
    assert sorted(curvatures(store)) == [
        *((step, "ekfac") for step in (3, 4, 6)), (8, "kfac"), (9, "ekfac"), (12, "ekfac"), (12, "kfac")
    ]  # fmt: skip
    if mode == "replay":
        assert {file.step for file in store.artifacts("gradients")} == {3, 4, 6, 8, 9, 12}
    for at in store.checkpoints():
        if (at.step, "ekfac") in curvatures(store):
            assert_same(store, curvatures(store)[at.step, "ekfac"], estimate(Net(), store, at)[0])

    alone = GradientSnapshot(tmp_path / "alone", "head.*", mode=mode, every_n_epochs=3)
    run(tmp_path, alone, max_epochs=3)
    rates = [sum(c.groups[0].learning_rate_sum for c in s.checkpoints()) for s in (store, alone.artifacts)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    queries = tuple(tensor[:3] for tensor in vectors().tensors)
    assert InfluenceModule(Net(), store, TracIn()).scores(queries).shape == (3, 13)


def test_two_kinds_share_a_store_of_their_own(tmp_path: Path) -> None:
    first, second = (
        CurvatureSnapshot(tmp_path / "store"),
        CurvatureSnapshot(tmp_path / "store", "diagonal", at_steps=[5]),
    )
    assert state_hash(run(tmp_path, first, second)) == state_hash(run(tmp_path))
    assert first.artifacts is second.artifacts and first.artifacts.verify() == []
    assert sorted(curvatures(first.artifacts)) == [(5, "diagonal"), (8, "diagonal"), (8, "ekfac")]
    assert set(first.artifacts.manifest.facts["curvature_overhead"]) == {"ekfac", "diagonal"}  # type: ignore[arg-type]


def test_callbacks_that_write_the_same_thing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    twins = CurvatureSnapshot("store"), CurvatureSnapshot(tmp_path / "x" / ".." / "store", EKFAC(exact_up_to=4))
    with pytest.raises(UnsupportedError, match=r"(?s)two CurvatureSnapshots write 'ekfac'.*HINT"):
        run(tmp_path, *twins)
    with pytest.raises(UnsupportedError, match="two GradientSnapshots"):
        gradients = GradientSnapshot("store", "head.*"), GradientSnapshot("store", "first.*")
        run(tmp_path, *gradients, CurvatureSnapshot("store"))
    run(tmp_path, CurvatureSnapshot("a"), CurvatureSnapshot("b"), max_steps=1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a", "b"]


def test_the_default_folder_is_shared_and_a_trial_run_leaves_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger = CSVLogger(tmp_path)
    snapshots = CurvatureSnapshot(), GradientSnapshot(parameters="head.*")
    run(tmp_path, *snapshots, logger=logger)
    assert snapshots[0].artifacts is snapshots[1].artifacts
    assert snapshots[0].artifacts.root == Path(logger.log_dir) / "influence"

    again = CurvatureSnapshot(tmp_path / "store"), GradientSnapshot(tmp_path / "store", "head.*")
    run(tmp_path, *again, fast_dev_run=2)
    assert not (tmp_path / "store").exists() and again[0].artifacts is again[1].artifacts
    assert sorted(curvatures(again[0].artifacts)) == [(2, "ekfac")]
    run(tmp_path, *again, max_epochs=1)  # the same callbacks, now in earnest
    assert sorted(curvatures(ArtifactStore.open(tmp_path / "store"))) == [(4, "ekfac")]


@pytest.mark.parametrize("shared", [False, True])
def test_a_second_fit_with_the_same_trainer_goes_on(tmp_path: Path, shared: bool) -> None:
    others = [GradientSnapshot(tmp_path / "store", "head.*")] if shared else []
    fitted = run(tmp_path, CurvatureSnapshot(tmp_path / "store"), *others, max_epochs=1)
    fitted.fit_loop.max_epochs = 2
    fitted.fit(fitted.lightning_module, batches())
    store = ArtifactStore.open(tmp_path / "store")
    assert store.verify() == [] and steps_of(store) == [4, 8]
    rates = [c.groups[0].learning_rate_sum for c in store.checkpoints()]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)  # Lightning makes a new schedule for the second fit


def test_weights_that_move_on_after_their_checkpoint(tmp_path: Path) -> None:
    """A curvature belongs to the weights beside it: those before the average; in a folder of its own, the average."""
    averaging: dict[str, Any] = {"max_epochs": 3, "make": lambda: Net("plain")}
    root = tmp_path / "shared"
    gradients, curvature = GradientSnapshot(root, "head.*"), CurvatureSnapshot(root, "diagonal")
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, device=None)
    with pytest.warns(UserWarning, match="has changed since the checkpoint of optimizer step 12"):
        trained = run(tmp_path, swa, gradients, curvature, **averaging)
    store, module = curvature.artifacts, trained.lightning_module
    last = store.checkpoints()[-1]
    assert not torch.equal(store.weights(last)["head.weight"], module.head.weight)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    assert_same(store, curvatures(store)[12, "diagonal"], estimate(module, store, last, "diagonal")[0])
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())

    own = CurvatureSnapshot(tmp_path / "own", "diagonal")
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, device=None)
    trained = run(tmp_path, swa, own, **averaging)
    kept = own.artifacts.weights(own.artifacts.checkpoints()[-1])
    assert torch.equal(kept["head.weight"], trained.lightning_module.head.weight)


# -- what the record says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "make", "taken"),
    [
        (None, Net, "exact"),
        (None, lambda: Net(classes=40), "sampled"),
        (None, lambda: Net(loss="own"), "observed"),
        ("exact", lambda: Net(loss="mse"), "exact"),
        ("sampled", Net, "sampled"),
        ("observed", Net, "observed"),
        ("observed", lambda: Net(loss="sum"), "observed"),
    ],
)
def test_labels(tmp_path: Path, labels: Any, make: Any, taken: str) -> None:
    snapshot = CurvatureSnapshot(tmp_path / "store", "kfac", labels=labels, seed=3, batch_size=5)
    module = run(tmp_path, snapshot, make=make, max_epochs=1).lightning_module
    found = recorded_curvature(snapshot.artifacts)
    assert (found.labels, found.seed, found.num_samples) == (taken, 3, 13)
    reduction = "sum" if module.hparams["loss"] == "sum" else "mean"
    assert snapshot.artifacts.manifest.settings["reduction"] == reduction
    how = {"labels": taken, "seed": 3, "batch_size": 5, "reduction": reduction}
    (file,) = curvatures(snapshot.artifacts).values()
    assert_same(snapshot.artifacts, file, estimate(module, snapshot.artifacts, found.at, "kfac", **how)[0])


def test_a_part_of_the_training_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshots = [CurvatureSnapshot(tmp_path / str(seed), "diagonal", at_most=6, seed=seed) for seed in (0, 0x5EED, 2)]
    snapshots.append(CurvatureSnapshot(tmp_path / "more", "diagonal", at_most=600))
    with caplog.at_level(logging.INFO):
        run(tmp_path, *snapshots, max_epochs=1)
    assert "exact labels of 6 of 13 samples, drawn with seed 2" in caplog.text
    found = [recorded_curvature(snapshot.artifacts) for snapshot in snapshots]
    assert [each.num_samples for each in found] == [6, 6, 6, 13]
    tensors = [snapshot.artifacts.curvature(*snapshot.artifacts.artifacts("curvature")) for snapshot in snapshots]
    assert len({float(each["0.diagonal"].sum()) for each in tensors}) == 4


def test_beside_a_summed_loss_the_decay_is_that_of_the_mean(tmp_path: Path) -> None:
    """wd θ stands beside the gradient of a batch's sum, so that beside its mean it is wd θ / B."""
    snapshot = CurvatureSnapshot(tmp_path / "store", "kfac")
    run(tmp_path, snapshot, make=lambda: Net("decay", "sum"), data=batches(batch_size=5))
    found = recorded_curvature(snapshot.artifacts)
    assert dict(found.decay) == pytest.approx(dict.fromkeys(found.curvature.parameters, 0.01 / 5))


@pytest.mark.parametrize("optimizer", ["sgd", "decay", "adamw"])
def test_weight_decay_and_stationarity_are_recorded(tmp_path: Path, optimizer: str) -> None:
    snapshot = CurvatureSnapshot(tmp_path / "store", Dense("fisher"))
    module = run(tmp_path, snapshot, make=lambda: Net(optimizer)).lightning_module
    store = snapshot.artifacts
    found, at = recorded_curvature(store), store.checkpoints()[-1]
    names = [name for name, _ in module.named_parameters()]
    if optimizer == "sgd":
        expected = {}
    elif optimizer == "decay":
        expected = dict.fromkeys(names, 0.01)
    else:
        expected = {name: 0.1 * float(store.preconditioner(at)[name].double().mean()) for name in names}
    assert dict(found.decay) == pytest.approx(expected, rel=1e-12)
    plain, seen = estimate(module, store, at, Dense("fisher"), decay=expected)
    assert_same(store, *curvatures(store).values(), plain.decayed(expected))
    assert found.stationarity is not None and found.stationarity == seen.stationarity
    mean = torch.zeros(())
    with torch.enable_grad():
        module.eval()
        loss = module.loss(vectors().tensors)
    for (name, parameter), gradient in zip(
        module.named_parameters(), torch.autograd.grad(loss, list(module.parameters())), strict=True
    ):
        mean = mean + (gradient + expected.get(name, 0.0) * parameter.detach()).square().sum()
    assert found.stationarity.mean_gradient == pytest.approx(float(mean) ** 0.5, rel=1e-5)


def test_settings_are_recorded(tmp_path: Path) -> None:
    snapshot = CurvatureSnapshot(tmp_path / "store", EKFAC(exact_up_to=7), parameters=["head.*"])
    run(tmp_path, snapshot, max_epochs=1)
    ((key, file),) = curvatures(snapshot.artifacts).items()
    assert key == (4, "ekfac") and file.path == "checkpoints/step=00000004/curvature-ekfac.safetensors"
    assert file.meta["statistics"] == {"class": "EKFAC", "exact_up_to": 7}
    assert file.meta["parameters"] == ["head.weight", "head.bias"]
    assert snapshot.artifacts.manifest.selected == ()


def test_words_and_text(tmp_path: Path) -> None:
    """A store with word gradients, and curvature of all layers: a whole text classifier, read in a worker process."""
    snapshots = GradientSnapshot(tmp_path / "store", "word_embeddings"), CurvatureSnapshot(tmp_path / "store")
    module = fit(tmp_path, seeded(Classifier), None, *snapshots, data=texts(), max_epochs=1).lightning_module
    store = snapshots[1].artifacts
    assert stored(store, "words.weight").shape[0] == len(ShortTexts()) and store.verify() == []
    expected, _ = estimate(module, store, store.checkpoints()[0], data=texts())
    assert_same(store, curvatures(store)[4, "ekfac"], expected)
    assert padded([ShortTexts()[0]]).keys() == singles(ShortTexts(), [0])[0].keys()


# -- precision and cost ------------------------------------------------------------------------------------------------


def test_mixed_precision_is_near_full_precision(tmp_path: Path) -> None:
    narrow = CurvatureSnapshot(tmp_path / "narrow", labels="sampled")
    module = run(tmp_path, narrow, precision="bf16-mixed").lightning_module
    store = narrow.artifacts
    expected, _ = estimate(module, store, store.checkpoints()[-1], labels="sampled")
    found = recorded_curvature(store).curvature
    draw = torch.Generator().manual_seed(0)
    v = {name: Vectors(torch.randn(6, *p.shape, generator=draw)) for name, p in module.named_parameters()}
    got, wanted = found.matvec(v), expected.matvec(v)
    for name in v:
        a, b = got[name].dense(), wanted[name].dense()
        assert bool(a.isfinite().all()) and a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.03, name


def test_cost_is_told_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshots = GradientSnapshot(tmp_path / "store", "head.*"), CurvatureSnapshot(tmp_path / "store", every_n_epochs=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run(tmp_path, *snapshots)
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("CurvatureSnapshot")]
    assert len(told) == 2
    assert "'ekfac' of 4 parameters over the exact labels of all samples" in told[0] and "MB a snapshot" in told[0]
    assert "CurvatureSnapshot('ekfac'): took" in told[1] and "beside" in told[1] and str(tmp_path) in told[1]
    facts: Any = snapshots[1].artifacts.manifest.facts
    overhead = facts["curvature_overhead"]["ekfac"]
    training = overhead["seconds"] / overhead["ratio"]
    assert 0 < overhead["seconds"] + facts["overhead"]["seconds"] + training < 1.01 * overhead["fit_seconds"]
    assert overhead["bytes"] == sum(file.bytes for file in curvatures(snapshots[1].artifacts).values())
    others = [file.bytes for file in snapshots[1].artifacts.artifacts() if file.kind != "curvature"]
    assert facts["overhead"]["bytes"] == sum(others)


@pytest.mark.parametrize("shown", [False, True])
def test_a_progress_bar_for_long_walks_only(tmp_path: Path, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[dict[str, Any]] = []
    real = evidence_room.tqdm
    monkeypatch.setattr(evidence_room, "tqdm", lambda *args, **kwargs: bars.append(kwargs) or real(*args, **kwargs))
    run(tmp_path, CurvatureSnapshot(tmp_path / "store", "kfac"), max_epochs=1, enable_progress_bar=shown)
    assert len(bars) == 2  # rehearsal and walk
    assert all(bar["delay"] >= 1 and bar["disable"] is not shown and bar["leave"] is False for bar in bars)


def test_state_keys_differ_with_the_settings() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"store": "a"},
        {"statistics": "kfac"},
        {"parameters": "last_layer"},
        {"labels": "observed"},
        {"every_n_epochs": 2},
        {"at_steps": [3]},
        {"statistics": "kfac", "mode": "in_flight"},
    ]
    assert len({CurvatureSnapshot(**each).state_key for each in settings}) == len(settings)
    assert CurvatureSnapshot("a").state_key == CurvatureSnapshot(Path("a")).state_key


def test_the_store_is_not_known_before_the_fit(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not open"):
        _ = CurvatureSnapshot(tmp_path).artifacts


@pytest.mark.filterwarnings("ignore")  # of the parser's own, about how Lightning uses it
def test_lightning_cli_builds_it(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "fit.yaml"
    config.write_text(
        "trainer:\n  logger: false\n  callbacks:\n"
        "  - class_path: lightning_influence.CurvatureSnapshot\n"
        "    init_args:\n"
        "      at_steps: [10, 20]\n"
        "      labels: sampled\n"
        "      statistics:\n        class_path: lightning_influence.EKFAC\n        init_args: {exact_up_to: 3}\n"
    )
    cli = LightningCLI(Net, run=False, save_config_callback=None, args=[f"--config={config}"])
    found = next(c for c in cli.trainer.callbacks if isinstance(c, CurvatureSnapshot))
    assert (found.at_steps, found.labels, found.statistics.settings()) == ((10, 20), "sampled", {"exact_up_to": 3})
    named = LightningCLI(
        Net, run=False, save_config_callback=None,
        args=["--trainer.callbacks=lightning_influence.CurvatureSnapshot", "--trainer.callbacks.statistics=kfac"],
    )  # fmt: skip
    assert any(
        getattr(c, "statistics", None) is not None and c.statistics.name == "kfac" for c in named.trainer.callbacks
    )
