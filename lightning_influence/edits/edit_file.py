"""An edit on disk: its tensors as safetensors, and beside them a JSON that tells what they are and their checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_influence.artifacts.disk import make_folders, replace_file, write_all, writing
from lightning_influence.artifacts.json_values import Fields, parse
from lightning_influence.artifacts.tensor_files import TensorFile, write_tensors
from lightning_influence.errors import StoreError

_TENSORS, _RECORD = "edit.safetensors", "edit.json"
_NEEDED = (
    "kind", "num_samples", "num_leaving", "leaving_sha256", "fingerprints", "method", "damping", "target", "size",
    "total", "reduction", "seed", "batch_size", "per_sample_loss", "module", "weights", "steps", "left",
)  # fmt: skip
_OF_STEPS = ("residual", "damping", "left")
_VERSION = 2


def write_edit(
    folder: Path, path: Mapping[str, Tensor], before: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Path:
    """Write both files, the JSON last: without it there is no edit.

    Raises:
        StoreError: there is an edit already; the disk refuses.
    """
    if (folder / _RECORD).exists():
        raise StoreError(
            f"there is an edit in {folder} already",
            expected="a new or empty folder",
            found=_RECORD,
            hint="choose another folder, or delete this one",
        )
    with writing(folder):
        make_folders(folder)
    tensors = {f"path|{n}": t for n, t in path.items()} | {f"before|{n}": t for n, t in before.items()}
    size, sha256 = write_tensors(folder / _TENSORS, {n: t.contiguous() for n, t in tensors.items()})
    facts = {"version": _VERSION, "bytes": size, "sha256": sha256, "edit": dict(record)}
    text = json.dumps(facts, indent=1, allow_nan=True).encode()
    replace_file(folder / _RECORD, lambda file: write_all(file, memoryview(text)), 0)
    return folder


def read_edit(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Path, weights before, and record.

    Raises:
        StoreError: no edit there, or a damaged one.
    """
    try:
        facts = parse((folder / _RECORD).read_bytes())
    except FileNotFoundError as error:
        raise StoreError(
            f"there is no edit in {folder}",
            expected=f"{_RECORD} and {_TENSORS}, as ModelEdit.save writes them",
            found="no such file",
            hint="give the folder that the edit was saved in",
        ) from error
    except (OSError, ValueError) as error:
        raise _damaged(folder / _RECORD, error) from error
    try:
        fields = Fields(facts)
        if fields.integer("version") != _VERSION:
            raise ValueError(f"version {facts['version']}")
        record = facts["edit"]
        if missing := [name for name in _NEEDED if name not in Fields(record).record]:
            raise ValueError(f"a record without {missing[0]!r}")
        if not isinstance(record["steps"], list) or not all(
            set(_OF_STEPS) <= set(Fields(step).record) for step in record["steps"]
        ):
            raise ValueError("a record that does not tell its steps")
        if record["kind"] == "relabelling" and "labels_sha256" not in record:
            raise ValueError("a relabelling that does not tell its labels")
        if not isinstance(record["weights"], dict):
            raise ValueError("weights without digests")
        size, sha256 = fields.integer("bytes"), fields.text("sha256")
    except (KeyError, TypeError, ValueError, StoreError) as error:
        raise _damaged(folder / _RECORD, error) from error
    held = TensorFile(folder, _TENSORS, size=size, sha256=sha256).read()
    path, before = (_named(held, prefix) for prefix in ("path|", "before|"))
    steps = len(record["steps"])
    if not path or set(path) != set(before) or any(path[n].shape != (steps, *before[n].shape) for n in path):
        raise _damaged(folder / _TENSORS, ValueError("changes that do not belong to the weights before them"))
    return path, before, record


def _named(held: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor.clone() for name, tensor in held.items() if name.startswith(prefix)}


def _damaged(file: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{file} is damaged",
        expected="what ModelEdit.save wrote",
        found=f"{type(error).__name__}: {error}",
        hint="restore the folder from a copy, or make the edit again",
    )
