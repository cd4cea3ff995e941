"""The head of a store: which dataset, which parameters, which settings, and the convention of signs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.artifacts.disk import read_bytes, replace_file
from lightning_influence.artifacts.json_values import CHECK, Fields, Json, digest, parse, plain
from lightning_influence.errors import StoreError

SCHEMA_VERSION = 1
UNBOUNDED = 1 << 62  # dataset_length of a stream, whose ids are what the user calls them
MANIFEST = "manifest.json"
SIGN_CONVENTION = (
    "score(q, z) = -dm(q)/d(epsilon) when training sample z is up-weighted by epsilon; the measurement m is "
    "lower-is-better, so a positive score is a proponent (training on z lowers m), a negative one an opponent"
)


def library_version() -> str:
    """The installed version of this library, "unknown" when it runs from a bare source tree."""
    try:
        return metadata.version("lightning_influence")
    except metadata.PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class ParameterSpec:
    """Shape and dtype (as "float32") of one parameter of the model."""

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))

    @classmethod
    def of(cls, tensor: Tensor) -> ParameterSpec:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


@dataclass(frozen=True)
class Manifest:
    """What a store is about. Everything but the facts is fixed when the store is created.

    Args:
        dataset_length: number of training samples; sample ids are positions in [0, dataset_length).
        dataset_fingerprint: hex digest of the dataset's content.
        parameters: full parameter name -> shape and dtype, of the whole model.
        selected: full names of the parameters whose gradients are captured.
        mode: "replay" or "in_flight".
        shard_size: dataset positions in one replay shard.
        dtype: dtype of the stored gradients, as "float32".
        module_class: import path of the LightningModule, or None.
        hyper_parameters: its constructor's arguments where they are plain JSON, or None.
        settings: everything else that a resumed run must share with the run that created the store.
        facts: small measurements that come at the end (overhead, bytes, staleness).
    """

    dataset_length: int
    dataset_fingerprint: str
    parameters: Mapping[str, ParameterSpec]
    selected: tuple[str, ...]
    mode: str
    shard_size: int
    dtype: str
    module_class: str | None = None
    hyper_parameters: Mapping[str, Json] | None = None
    settings: Mapping[str, Json] = field(default_factory=dict)
    facts: Mapping[str, Json] = field(default_factory=dict)
    sign_convention: str = SIGN_CONVENTION
    schema_version: int = SCHEMA_VERSION
    library_version: str = field(default_factory=library_version)

    def __post_init__(self) -> None:
        object.__setattr__(self, "selected", tuple(self.selected))
        object.__setattr__(self, "parameters", dict(self.parameters))
        for name in ("hyper_parameters", "settings", "facts"):
            object.__setattr__(self, name, plain(getattr(self, name), f"the manifest's {name}"))

    @staticmethod
    def describe(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, ParameterSpec]:
        """The ``parameters`` field of a model: ``Manifest.describe(module.named_parameters())``."""
        return {name: ParameterSpec.of(parameter) for name, parameter in parameters}

    def with_fact(self, key: str, value: Json) -> Manifest:
        return replace(self, facts={**self.facts, key: value})

    def difference(self, other: Manifest) -> tuple[str, object, object] | None:
        """The first thing in which ``other`` is about something else: (what, here, there), or None.

        The library's version, the class path, the hyper-parameters and the facts may differ: they do not
        change what the gradients mean.
        """
        pairs: list[tuple[str, object, object]] = [
            ("the length of the dataset", self.dataset_length, other.dataset_length),
            ("the content of the dataset", self.dataset_fingerprint, other.dataset_fingerprint),
        ]
        for name in dict.fromkeys((*self.parameters, *other.parameters)):
            here, there = self.parameters.get(name), other.parameters.get(name)
            pairs.append((f"the parameter {name!r}", here or "no such parameter", there or "no such parameter"))
        pairs += [
            ("the captured parameters", sorted(self.selected), sorted(other.selected)),
            ("the mode", self.mode, other.mode),
            ("the shard size", self.shard_size, other.shard_size),
            ("the dtype of the stored gradients", self.dtype, other.dtype),
        ]
        for name in sorted({*self.settings, *other.settings}):
            mine, theirs = self.settings.get(name, "not set"), other.settings.get(name, "not set")
            pairs.append((f"the setting {name!r}", mine, theirs))
        pairs.append(("the sign convention", self.sign_convention, other.sign_convention))
        return next(((what, mine, theirs) for what, mine, theirs in pairs if mine != theirs), None)

    def to_json(self) -> dict[str, Json]:
        parameters: dict[str, Json] = {
            name: {"shape": list(spec.shape), "dtype": spec.dtype} for name, spec in self.parameters.items()
        }
        return {
            "schema_version": self.schema_version,
            "library_version": self.library_version,
            "sign_convention": self.sign_convention,
            "dataset": {"length": self.dataset_length, "fingerprint": self.dataset_fingerprint},
            "mode": self.mode,
            "shard_size": self.shard_size,
            "dtype": self.dtype,
            "selected": list(self.selected),
            "settings": self.settings,
            "module_class": self.module_class,
            "hyper_parameters": self.hyper_parameters,
            "parameters": parameters,
            "facts": self.facts,
        }

    @classmethod
    def from_json(cls, record: Any) -> Manifest:
        fields = Fields(record)
        dataset = Fields(fields.object("dataset"))
        parameters = {}
        for name, spec in fields.object("parameters").items():
            parameters[name] = ParameterSpec(Fields(spec).integers("shape"), Fields(spec).text("dtype"))
        hyper_parameters = fields.record.get("hyper_parameters")
        return cls(
            dataset_length=dataset.integer("length"),
            dataset_fingerprint=dataset.text("fingerprint"),
            parameters=parameters,
            selected=fields.texts("selected"),
            mode=fields.text("mode"),
            shard_size=fields.integer("shard_size"),
            dtype=fields.text("dtype"),
            module_class=fields.optional_text("module_class"),
            hyper_parameters=None if hyper_parameters is None else fields.object("hyper_parameters"),
            settings=fields.object("settings"),
            facts=fields.object("facts"),
            sign_convention=fields.text("sign_convention"),
            schema_version=fields.integer("schema_version"),
            library_version=fields.text("library_version"),
        )


def refuse_difference(root: Path, stored: Manifest, wanted: Manifest) -> None:
    """StoreError naming the first thing in which the store at ``root`` differs from this run."""
    difference = stored.difference(wanted)
    if difference is not None:
        what, here, there = difference
        raise StoreError(
            f"the store at {root} was started by a run with other settings: {what} differs",
            expected=f"{here} (the store)",
            found=f"{there} (this run)",
            hint="resume with the settings of the first run, or give the callback another folder",
        )


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace the manifest of the store at ``root`` in one step."""
    record = manifest.to_json()
    text = json.dumps({**record, CHECK: digest(record)}, indent=1, ensure_ascii=True) + "\n"
    replace_file(root / MANIFEST, lambda file: file.write(text.encode()), rank=0)


def read_manifest(root: Path) -> Manifest:
    """The manifest of the store at ``root``.

    Raises:
        StoreError: there is none, it is damaged, or it has another schema version.
    """
    path = root / MANIFEST
    if not path.exists():
        raise StoreError(
            f"{root} is not an artifact store",
            expected=f"a folder with a {MANIFEST}",
            found="no such file",
            hint="give the folder that the callback printed at the start of the fit",
        )
    text = read_bytes(root, MANIFEST)
    try:
        record = parse(text)
        version = Fields(record).integer("schema_version")
        if version == SCHEMA_VERSION:
            if Fields(record).text(CHECK) != digest(record):
                raise ValueError("its check digits do not match its content")
            return Manifest.from_json(record)
    except (ValueError, StoreError) as error:
        raise StoreError(
            f"{path} is damaged",
            expected="the JSON that the library wrote",
            found=f"{error} ({len(text)} bytes)",
            hint="restore the file from a copy of the store; without it the store cannot be read",
        ) from error
    raise StoreError(
        f"{path} has another schema version",
        expected=SCHEMA_VERSION,
        found=f"{version}, written by version {record.get('library_version')} of the library",
        hint="read the store with the version of the library that wrote it",
    )
