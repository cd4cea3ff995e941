"""Checkpoints, groups, artifacts and manifests: JSON round trips, learning rates, differences, and damaged fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_influence.artifacts import (
    Artifact,
    Checkpoint,
    Manifest,
    ParameterGroup,
    ParameterSpec,
    StepRange,
)
from lightning_influence.artifacts.manifest import SIGN_CONVENTION, read_manifest, write_manifest
from lightning_influence.errors import StoreError


def through_json(value: object) -> object:
    return json.loads(json.dumps(value))


def group(name: str, rate: float, summed: float, optimizer: str = "SGD") -> ParameterGroup:
    return ParameterGroup(optimizer, 0, (name,), rate, summed, {"betas": (0.9, 0.999), "nesterov": False})


def test_checkpoint_round_trip() -> None:
    checkpoint = Checkpoint(12, 1, 30, (group("a", 0.1, 1.0), group("b", 0.3, 2.0)))
    again = Checkpoint.from_json(through_json(checkpoint.to_json()))
    assert again == checkpoint and hash(again) == hash(checkpoint)
    assert again.groups[0].options == {"betas": [0.9, 0.999], "nesterov": False}


def test_learning_rates() -> None:
    checkpoint = Checkpoint(12, 1, 30, (group("a", 0.1, 1.0), group("b", 0.3, 2.0), group("a", 0.5, 4.0, "Adam")))
    assert checkpoint.learning_rate("b") == 2.0
    assert checkpoint.learning_rate("b", summed=False) == 0.3
    assert checkpoint.learning_rate("a") == 5.0  # two optimizers update it
    with pytest.raises(StoreError, match="no learning rate for the parameter 'frozen'") as error:
        checkpoint.learning_rate("frozen")
    assert "[1.0, 2.0, 4.0]" in str(error.value)


def test_a_frozen_parameter_gets_the_rate_that_all_groups_share() -> None:
    checkpoint = Checkpoint(12, 1, 30, (group("a", 0.1, 1.0), group("b", 0.3, 1.0)))
    assert checkpoint.learning_rate("frozen") == 1.0
    with pytest.raises(StoreError):
        checkpoint.learning_rate("frozen", summed=False)
    with pytest.raises(StoreError, match="0 groups"):
        Checkpoint(0, 0, 0).learning_rate("frozen")


def test_step_range() -> None:
    assert StepRange(3, 3) == StepRange(3, 3)
    with pytest.raises(ValueError, match="empty range"):
        StepRange(3, 2)


def test_artifact_round_trip() -> None:
    artifact = Artifact("a/b.safetensors", "gradients", 3, 4, 5, "0" * 64, {"span": (0, 4)}, rank=2)
    assert Artifact.from_json(through_json(artifact.to_json()), rank=2) == artifact
    assert artifact.span == (0, 4) and artifact.batches == 0


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "xyz"},
        {"bytes": -1},
        {"bytes": True},
        {"bytes": "7"},
        {"path": None},
        {"meta": []},
        {"meta": {}},
        {"meta": {"span": [4, 4]}},
        {"meta": {"span": [0, 4, 5]}},
        {"meta": {"span": [-1, 4]}},
        {"kind": "in_flight", "meta": {"batches": 9}},
        {"kind": "in_flight", "meta": {}},
    ],
    ids=str,
)
def test_damaged_artifact_fields(change: dict[str, object]) -> None:
    record = Artifact("a.safetensors", "gradients", 3, 4, 5, "0" * 64, {"span": [0, 4]}).to_json()
    with pytest.raises(ValueError):
        Artifact.from_json({**record, **change})


def test_values_that_json_cannot_hold_are_named() -> None:
    with pytest.raises(StoreError, match="the options of SGD cannot be written as JSON"):
        ParameterGroup("SGD", 0, (), 0.1, 0.1, {"lr": torch.ones(1)})  # type: ignore[dict-item]
    with pytest.raises(StoreError, match="is not a string"):
        Artifact("a", "b", 0, 0, 0, "", {1: 2})  # type: ignore[dict-item]
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(StoreError, match="cannot be written as JSON"):
        Artifact("a", "b", 0, 0, 0, "", {"x": loop})  # type: ignore[dict-item]


def test_manifest_round_trip(tmp_path: Path, make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest(hyper_parameters={"width": 3, "names": ("a", "b")}, facts={"overhead": 1.5})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    text = json.loads((tmp_path / "manifest.json").read_text())
    assert text["sign_convention"] == SIGN_CONVENTION and "proponent" in SIGN_CONVENTION
    assert text["dataset"] == {"length": 10, "fingerprint": "c0ffee"}
    assert text["parameters"]["embedding.weight"] == {"shape": [7, 3], "dtype": "float32"}
    assert text["schema_version"] == 1


@pytest.mark.parametrize(
    ("change", "what", "expected", "found"),
    [
        ({"dataset_length": 11}, "length of the dataset", "10", "11"),
        ({"dataset_fingerprint": "beef"}, "content of the dataset", "c0ffee", "beef"),
        ({"selected": ("head.weight",)}, "captured parameters", "embedding.weight", "head.weight"),
        ({"mode": "in_flight"}, "mode", "replay", "in_flight"),
        ({"shard_size": 5}, "shard size", "4", "5"),
        ({"dtype": "bfloat16"}, "dtype", "float32", "bfloat16"),
        ({"settings": {"every_n_epochs": 2}}, "setting 'betas'", "[0.9, 0.999]", "not set"),
        ({"settings": {"every_n_epochs": 2, "betas": [0.9, 0.999]}}, "setting 'every_n_epochs'", "1", "2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_first_difference_is_named(
    make_manifest: Callable[..., Manifest], change: dict[str, object], what: str, expected: str, found: str
) -> None:
    difference = make_manifest().difference(make_manifest(**change))
    assert difference is not None
    assert what in difference[0] and expected in str(difference[1]) and found in str(difference[2])


def test_differences_of_parameters(make_manifest: Callable[..., Manifest]) -> None:
    manifest = make_manifest()
    wider = {**manifest.parameters, "embedding.weight": ParameterSpec((8, 3), "float32")}
    difference = manifest.difference(make_manifest(parameters=wider))
    assert difference is not None and difference[0] == "the parameter 'embedding.weight'"
    assert (str(difference[1]), str(difference[2])) == ("float32 of shape (7, 3)", "float32 of shape (8, 3)")
    more = {**manifest.parameters, "extra": ParameterSpec((1,), "float32")}
    assert manifest.difference(make_manifest(parameters=more)) == (
        "the parameter 'extra'",
        "no such parameter",
        ParameterSpec((1,), "float32"),
    )


def test_what_may_differ(make_manifest: Callable[..., Manifest]) -> None:
    other = make_manifest(library_version="9", facts={"a": 1}, hyper_parameters={"lr": 3}, module_class="x.Y")
    assert make_manifest().difference(other) is None
    assert make_manifest(settings={"a": (1, 2)}).difference(make_manifest(settings={"a": [1, 2]})) is None
