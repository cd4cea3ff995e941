"""Scores through a part of the parameters against dense least squares, from a store and by streaming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_influence import (
    FreezingInfluenceFunction,
    GeneralizedInfluenceFunction,
    InfluenceFunction,
    InfluenceModule,
    ProjectedInfluenceFunction,
    SecondOrderInfluenceFunction,
    Solver,
    TargetParameters,
    TracIn,
    record_target,
    recorded_target,
)
from lightning_influence.artifacts import ArtifactStore, Manifest
from lightning_influence.curvature import Dense, MatrixFree, ProjectedGram, write_curvature
from lightning_influence.errors import CaptureError, QueryError
from lightning_influence.gradients import FactorProjection
from tests import reference
from tests.curvature.settings import evidence, eye, matrix_of, shapes_of
from tests.stores import (
    Texts,
    all_names,
    batch_of,
    classifier,
    collate,
    group,
    loader_of,
    loss_of_one,
    quiet,
    replay_store,
    singles,
)

TRAIN, ASKED = Texts(), Texts(5, seed=1)
DAMPING = 0.05
EXACT = Solver("minres", tolerance=1e-14, max_iterations=2000)
WRITTEN_OUT = Dense("hessian")
HESSIAN = MatrixFree("hessian", "minres", tolerance=1e-13)
pytestmark = pytest.mark.filterwarnings("ignore:.*stopped before its tolerance", "ignore:.*did not converge")


def target_of(module: Any, seed: int = 0, share: float = 0.3) -> TargetParameters:
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in all_names(module) if not name.startswith("embedding")]
    parameters = dict(module.named_parameters())
    return TargetParameters.of(
        module, {name: torch.rand(parameters[name].shape, generator=generator) < share for name in names}
    )


def store_of(root: Path, module: Any, parameters: Any = "all") -> ArtifactStore:
    groups = [group(all_names(module), 0.1)]
    return replay_store(root, module, TRAIN, [module.state_dict()], lambda c: groups, parameters=parameters)


def scores(module: Any, store: Any, estimator: Any, batch_size: int = 4) -> Tensor:
    influence = InfluenceModule(module, store, estimator, train_loader=loader_of(TRAIN, batch_size))
    return influence.scores(batch_of(ASKED))


def rows(module: Any, dataset: Any) -> Tensor:
    found = reference.per_sample_gradients(module, loss_of_one, singles(dataset), all_names(module))
    return torch.cat([found[name].flatten(1) for name in all_names(module)], 1)


def hessian_of(module: Any) -> Tensor:
    shapes = shapes_of(module, all_names(module))
    return matrix_of(Dense("hessian").collect(evidence(module, TRAIN, collate=collate)), shapes)


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """A model, its target parameters, and all scores by dense algebra."""
    module = classifier()
    target = target_of(module)
    inside = target.flat(shapes_of(module, all_names(module)))
    matrix = hessian_of(module)
    h = matrix + DAMPING * eye(len(matrix))
    query, train = rows(module, ASKED), rows(module, TRAIN)
    by = {"GIF": reference.generalized_change, "FIF": reference.freezing_change, "PIF": reference.projected_change}
    return {
        "module": module,
        "target": target,
        "matrix": matrix,
        "query": query,
        "train": train,
        "T": {
            "GIF": reference.generalized_transform(h, inside),
            "FIF": reference.freezing_transform(h, inside),
            "PIF": reference.projected_transform(h, inside),
        },
        **{name: query @ change(h, train, inside).T for name, change in by.items()},
    }


def estimators(target: TargetParameters, statistics: Any = WRITTEN_OUT) -> dict[str, Any]:
    return {
        "GIF": GeneralizedInfluenceFunction(target, statistics, damping=DAMPING, solver=EXACT),
        "FIF": FreezingInfluenceFunction(target, statistics, damping=DAMPING, solver=EXACT),
        "PIF": ProjectedInfluenceFunction(target, statistics, damping=DAMPING),
    }


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert float((found.double() - expected).norm()) <= tolerance * float(expected.norm())


def test_the_hessian_is_indefinite(truth):
    assert torch.linalg.eigvalsh(truth["matrix"]).min() < -1e-3


@pytest.mark.parametrize("name", ["GIF", "FIF", "PIF"])
def test_scores_are_those_of_dense_algebra(tmp_path: Path, truth, name):
    store = store_of(tmp_path / "s", truth["module"])
    estimator = estimators(truth["target"])[name]
    found = scores(truth["module"], store, estimator)
    close(found, truth[name])
    close(found, truth["query"] @ truth["T"][name].T @ truth["train"].T)
    close(scores(truth["module"], store, estimators(truth["target"], HESSIAN)[name]), truth[name])
    assert torch.equal(found, scores(truth["module"], store, estimator))  # asked twice
    close(scores(truth["module"], store, estimators(truth["target"])[name], batch_size=7), found, 1e-9)


def bare(root: Path, module: Any) -> ArtifactStore:
    """A store of weights alone, as a fit without GradientSnapshot leaves one."""
    full = store_of(root.with_suffix(".full"), module)
    store = ArtifactStore.create(root, Manifest(**{**vars(full.manifest), "selected": ()}))
    at = full.checkpoints()[-1]
    store.commit_checkpoint(at, store.write_weights(at.step, at.mark, module.state_dict()))
    return store


@pytest.mark.parametrize("name", ["GIF", "FIF", "PIF"])
@pytest.mark.parametrize("held", ["nothing", "a bias", "K"])
def test_scores_by_streaming(tmp_path: Path, truth, name, held):
    module, target = truth["module"], truth["target"]
    of = {"a bias": "head.bias", "K": list(target.names)}
    store = store_of(tmp_path / "s", module, of[held]) if held in of else bare(tmp_path / "s", module)
    influence = InfluenceModule(module, store, estimators(target)[name], train_loader=loader_of(TRAIN))
    influence.prepare([batch_of(ASKED)], scores_file=tmp_path / "scores.safetensors")
    loader = DataLoader(TRAIN, batch_size=4, shuffle=True, collate_fn=collate)
    quiet().predict(influence, loader)
    close(influence.streamed_scores, truth[name], 1e-6)  # kept in float32


def test_a_store_of_the_target_alone_serves_freezing_alone(tmp_path: Path, truth):
    target: TargetParameters = truth["target"]
    store = store_of(tmp_path / "s", truth["module"], list(target.names))
    close(scores(truth["module"], store, estimators(target)["FIF"]), truth["FIF"])
    for name in ("GIF", "PIF"):
        with pytest.raises(QueryError, match="training gradients that the store does not hold") as caught:
            scores(truth["module"], store, estimators(target)[name])
        assert "embedding.weight" in str(caught.value) and "influence.prepare" in str(caught.value)


def test_with_everything_in_k_it_is_the_influence_function(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    everything = TargetParameters.everything(truth["module"])
    expected = scores(truth["module"], store, InfluenceFunction(WRITTEN_OUT, damping=DAMPING)).double()
    for estimator in estimators(everything).values():
        close(scores(truth["module"], store, estimator), expected)
    close(scores(truth["module"], store, SecondOrderInfluenceFunction(WRITTEN_OUT, damping=DAMPING)), expected)


def test_a_stored_curvature_serves_too(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    writer = ArtifactStore.resume(store.root, store.manifest, None)
    statistics = Dense("hessian")
    found = evidence(truth["module"], TRAIN, collate=collate)
    write_curvature(writer, writer.checkpoints()[-1], statistics, statistics.collect(found), found, {})
    opened = ArtifactStore.open(store.root)
    estimator = GeneralizedInfluenceFunction(truth["target"], "dense_hessian", damping=DAMPING, solver=EXACT)
    close(InfluenceModule(truth["module"], opened, estimator).scores(batch_of(ASKED)), truth["GIF"])


def test_target_parameters_in_other_estimators(tmp_path: Path, truth):
    module, target = truth["module"], truth["target"]
    store = store_of(tmp_path / "s", module)
    inside = target.flat(shapes_of(module, all_names(module)))
    expected = 0.1 * (rows(module, ASKED) * inside) @ rows(module, TRAIN).T
    close(scores(module, store, TracIn(parameters=target)), expected)
    freezing = InfluenceFunction(WRITTEN_OUT, parameters=target, damping=DAMPING)
    freezing.inverse.solver = EXACT  # type: ignore[attr-defined]
    close(scores(module, store, freezing), truth["FIF"])


def test_target_parameters_from_the_store(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    record_target(store, "a_third", truth["target"])
    target = recorded_target(store.root, "a_third")
    assert all(torch.equal(target.masks[name], mask) for name, mask in truth["target"].masks.items())
    close(scores(truth["module"], ArtifactStore.open(store.root), estimators(target)["FIF"]), truth["FIF"])


def test_removal_is_the_sum_of_the_scores(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    influence = InfluenceModule(
        truth["module"], store, estimators(truth["target"])["GIF"], train_loader=loader_of(TRAIN)
    )
    found = influence.predict_removal(batch_of(ASKED), [1, 4])
    close(found, truth["GIF"][:, [1, 4]].sum(1) / len(TRAIN))


# Refusals


def test_a_target_of_another_model(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    other = torch.nn.Linear(3, 2).double()
    with pytest.raises(CaptureError, match="weight"):
        scores(truth["module"], store, GeneralizedInfluenceFunction(TargetParameters.everything(other), HESSIAN))


@pytest.mark.parametrize("name", ["GIF", "PIF"])
def test_k_of_a_model_in_which_other_parameters_were_trained(tmp_path: Path, name):
    module = classifier()
    target = target_of(module)
    store = store_of(tmp_path / "s", module)
    embedding = module.get_parameter("embedding.weight").requires_grad_(False)
    chosen_since = target_of(module)
    with pytest.raises(CaptureError, match=r"(?s)embedding\.weight frozen.*choose K again"):
        scores(module, store, estimators(target)[name])
    embedding.requires_grad_(True)
    with pytest.raises(CaptureError, match=r"embedding\.weight trained"):
        scores(module, store, estimators(chosen_since)[name])
    close(scores(module, store, estimators(chosen_since)["FIF"]), scores(module, store, estimators(target)["FIF"]))


def test_a_curvature_of_projected_gradients_has_no_entries_to_choose(tmp_path: Path, truth):
    module, target = truth["module"], truth["target"]
    groups, states = [group(all_names(module), 0.1)], [module.state_dict()]
    store = replay_store(tmp_path / "s", module, TRAIN, states, lambda c: groups, projection=FactorProjection(2))
    for estimator in estimators(target, ProjectedGram()).values():
        with pytest.raises(QueryError, match="projected ones"):
            scores(module, store, estimator)


def test_what_is_no_target():
    for kind in (GeneralizedInfluenceFunction, FreezingInfluenceFunction, ProjectedInfluenceFunction):
        with pytest.raises(QueryError, match="no target parameters"):
            kind("head.*")


def test_without_training_data_there_are_no_products(tmp_path: Path, truth):
    store = store_of(tmp_path / "s", truth["module"])
    estimator = estimators(truth["target"])["GIF"]
    with pytest.raises(QueryError, match="train_loader"):
        InfluenceModule(truth["module"], store, estimator).scores(batch_of(ASKED))
