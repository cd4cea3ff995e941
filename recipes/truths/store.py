"""A folder of truths: what models trained on parts of one training set say of one set of queries.

    store = TruthStore.at("truths", origin)      # truths/<key of the origin>
    store.add({part_key(subset, weights): measured})
    store.read([part_key(subset, weights)])      # losses and log-odds (M, Q)

`truth.json` says what the results come from; every other file holds the results of some models, each known by its
subset and weights alone. Files appear whole or not at all, and two programs may write at once: a file is named by the
models that it holds, so none can take another's place. Sharing truths is copying the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_influence.artifacts.disk import sync_folder
from lightning_influence.artifacts.json_values import Json, canonical, parse
from lightning_influence.artifacts.tensor_files import raw_bytes
from lightning_influence.errors import StoreError
from recipes.truths.measuring import Truth
from recipes.truths.samples import Samples

VERSION = 2  # raise it when the arithmetic changes: it is part of every store's key
_FACTS = "truth.json"
_MANY = 32  # files of a store before they become one
_WORDS = {
    "model": "another model, or other initial weights",
    "recipe": "another recipe",
    "train": "other training data",
    "train_size": "another number of training samples",
    "queries": "other queries",
    "query_count": "another number of queries",
    "seed": "another seed",
}


@dataclass(frozen=True)
class Origin:
    """Everything that the results of one store depend on, but for the part that a model was trained on.

    Args:
        model: hash of the model's printed form, its initial weights and its buffers. Code that the printed form does
            not show, as in a `forward`, is not in it.
        recipe: how it is trained.
        train: hash of the training samples.
        train_size: their number.
        queries: hash of the queries.
        query_count: their number.
        seed: of the initial weights and the batches.
        model_repr: the printed form, for readers.
        version: of the arithmetic.
    """

    model: str
    recipe: Mapping[str, Json]
    train: str
    train_size: int
    queries: str
    query_count: int
    seed: int
    model_repr: str
    version: int = VERSION

    @property
    def key(self) -> str:
        """32 hex digits over all of it."""
        return hashlib.sha256(canonical(asdict(self)).encode()).hexdigest()[:32]


def data_hash(samples: Samples) -> str:
    """32 hex digits over the samples' content."""
    return _hash(f"padding {samples.padding}", [samples.inputs, samples.labels])


def model_hash(model: nn.Module) -> str:
    """32 hex digits over a model's printed form, weights and buffers."""
    tensors = dict(model.state_dict()) | dict(model.named_buffers())  # those that no checkpoint holds, too
    return _hash(repr(model) + " ".join(sorted(tensors)), [tensors[name] for name in sorted(tensors)])


def part_key(subset: Tensor, weights: Tensor) -> str:
    """32 hex digits over the indices (n,) that a model is trained on, in their order, and their weights (n,)."""
    return _hash("", [subset.long(), weights.double()])


class TruthStore:
    """One folder of results; see the module's text."""

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder = folder
        self.origin = origin

    @classmethod
    def at(cls, cache: str | os.PathLike[str], origin: Origin) -> TruthStore:
        """The store of an origin in a folder of stores, made where it is not there yet."""
        folder = Path(cache) / origin.key
        if not (folder / _FACTS).exists():
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"key": origin.key, **asdict(origin)}, indent=1, ensure_ascii=False)
            with _into_place(folder / _FACTS) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
            return cls(folder, origin)
        store = cls.open(folder)
        store.require(origin)
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> TruthStore:
        """The store in a folder.

        Raises:
            StoreError: there is none, or its `truth.json` is of another version, or was changed.
        """
        path = Path(folder) / _FACTS
        try:
            found = parse(path.read_bytes())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read", expected="the facts of a store of truths", found=str(error),
                hint="name the folder that holds truth.json, or restore that file from a copy",
            ) from error  # fmt: skip
        if found.get("version") != VERSION:
            raise StoreError(
                f"{path} is of another version of this program", expected=VERSION, found=found.get("version"),
                hint="retrain into a new folder",
            )  # fmt: skip
        try:
            origin = Origin(**{field.name: found[field.name] for field in fields(Origin)})
            unchanged = found["key"] == origin.key
        except (KeyError, TypeError):
            unchanged = False
        if not unchanged:
            raise StoreError(
                f"{path} was changed", expected="facts whose hash is the key beside them", found="another hash",
                hint="restore truth.json from a copy of the folder",
            )  # fmt: skip
        return cls(Path(folder), origin)

    def require(self, origin: Origin) -> None:
        """Make sure that the results come from this origin.

        Raises:
            StoreError: they do not; it says what differs.
        """
        mine, theirs = asdict(self.origin), asdict(origin)
        different = [name for name in mine if mine[name] != theirs[name] and name != "model_repr"]  # it is in `model`
        if different:
            raise StoreError(
                f"{self.folder} holds truths of something else: "
                + ", ".join(_WORDS.get(name, name) for name in different),
                expected={name: theirs[name] for name in different},
                found={name: mine[name] for name in different},
                hint="open the folder that belongs to this set-up, or retrain into another one",
            )  # fmt: skip

    def known(self) -> dict[str, Truth]:
        """Every model's results by its part's key: losses and log-odds (Q,) each.

        Raises:
            StoreError: a file is damaged, or of another store.
        """
        while True:
            try:
                found: dict[str, Truth] = {}
                for path in self._files():
                    found |= self._load(path)
                return found
            except FileNotFoundError:
                continue  # another program has just put it together with others: look again

    def read(self, keys: Sequence[str]) -> Truth:
        """The results (M, Q) of some models.

        Raises:
            StoreError: some are not there.
        """
        known = self.known()
        if missing := sum(key not in known for key in keys):
            raise StoreError(
                f"{self.folder} lacks results", expected=f"{len(keys)} models", found=f"{missing} of them missing",
                hint="retrain them: what is there already is not trained again",
            )  # fmt: skip
        return _stacked([known[key] for key in keys])

    def add(self, results: Mapping[str, Truth]) -> None:
        """Write the results of some models, (Q,) each, as one file."""
        keys = sorted(results)
        together = _stacked([results[key] for key in keys])
        tensors = {
            "keys": torch.tensor([list(bytes.fromhex(key)) for key in keys], dtype=torch.uint8),  # (M, 16)
            "losses": together.losses,
            "log_odds": together.log_odds,
        }
        write_whole(
            self.folder / f"models-{_name(results)}.safetensors",
            tensors,
            {"store": self.origin.key, "check": _check(tensors)},
        )

    def tidy(self) -> None:
        """Put many small files together; a crash in between leaves a result twice, never less than once."""
        files = self._files()
        if len(files) <= _MANY:
            return
        try:
            found: dict[str, Truth] = {}
            for path in files:
                found |= self._load(path)
        except FileNotFoundError:
            return  # another program is at it
        self.add(found)
        for path in files:
            if path.name != f"models-{_name(found)}.safetensors":
                path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("models-*.safetensors"))

    def _load(self, path: Path) -> dict[str, Truth]:
        if path.is_symlink() and not path.exists():
            raise _damaged(path, "a link to nothing")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("keys", "losses", "log_odds")}
        except SafetensorError as error:
            raise _damaged(path, str(error)) from error
        if metadata.get("store") != self.origin.key:
            raise StoreError(
                f"{path} belongs to another store", expected=self.origin.key, found=metadata.get("store"),
                hint="copy whole folders, never single files into another folder",
            )  # fmt: skip
        if metadata.get("check") != _check(tensors):
            raise _damaged(path, "content with another checksum")
        keys = [bytes(row).hex() for row in tensors["keys"].tolist()]
        rows = zip(tensors["losses"].unbind(), tensors["log_odds"].unbind(), strict=True)
        return dict(zip(keys, (Truth(*row) for row in rows), strict=True))


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the file under another name, force it to the disk, and rename it: it is there whole, or not at all."""
    held = {name: value.contiguous() for name, value in tensors.items()}
    with _into_place(path) as temporary:
        save_file(held, temporary, dict(metadata) if metadata else None)


@contextmanager
def _into_place(path: Path) -> Iterator[Path]:
    """A name to write under, which no other program uses; what was written then gets its own name."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _damaged(path: Path, found: str) -> StoreError:
    return StoreError(
        f"{path} is damaged", expected="the results as they were written", found=found,
        hint="restore it from a copy, or delete it: the models that it held are then trained again",
    )  # fmt: skip


def _stacked(results: Sequence[Truth]) -> Truth:
    return Truth(torch.stack([r.losses for r in results]), torch.stack([r.log_odds for r in results]))


def _name(results: Mapping[str, Truth]) -> str:
    """Of a file, by the models in it."""
    return hashlib.sha256(" ".join(sorted(results)).encode()).hexdigest()[:32]


def _check(tensors: Mapping[str, Tensor]) -> str:
    return _hash("", [tensors[name] for name in ("keys", "losses", "log_odds")])


def _hash(text: str, tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(f" {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes("", tensor))
    return digest.hexdigest()[:32]
