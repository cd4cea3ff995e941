"""What a store's journals say: checkpoints with their optimizers' rates, step ranges, and committed files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_influence.artifacts.json_values import Fields, Json, plain
from lightning_influence.errors import StoreError


@dataclass(frozen=True)
class ParameterGroup:
    """One parameter group of one optimizer, as it was used up to a checkpoint.

    Args:
        optimizer: class name of the optimizer.
        index: position of the group in ``optimizer.param_groups``.
        parameters: full names of the parameters that the group updates.
        learning_rate: the rate that the last step before the checkpoint really used.
        learning_rate_sum: sum of the rates of all steps since the previous checkpoint.
        options: momentum, betas, eps, weight_decay, ... as JSON.
    """

    optimizer: str
    index: int
    parameters: tuple[str, ...]
    learning_rate: float
    learning_rate_sum: float
    options: Mapping[str, Json] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))
        object.__setattr__(self, "options", plain(self.options, f"the options of {self.optimizer}"))

    def to_json(self) -> dict[str, Json]:
        return {
            "optimizer": self.optimizer,
            "index": self.index,
            "parameters": list(self.parameters),
            "learning_rate": self.learning_rate,
            "learning_rate_sum": self.learning_rate_sum,
            "options": self.options,
        }

    @classmethod
    def from_json(cls, record: Any) -> ParameterGroup:
        fields = Fields(record)
        return cls(
            optimizer=fields.text("optimizer"),
            index=fields.integer("index"),
            parameters=fields.texts("parameters"),
            learning_rate=fields.number("learning_rate"),
            learning_rate_sum=fields.number("learning_rate_sum"),
            options=fields.object("options"),
        )


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one moment of the fit, after ``step`` optimizer steps and ``mark`` training batches."""

    step: int
    epoch: int
    mark: int
    groups: tuple[ParameterGroup, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))

    def learning_rate(self, parameter: str, *, summed: bool = True) -> float:
        """η_c of ``parameter``: the sum since the previous checkpoint, or (``summed=False``) the last step's.

        A parameter that several optimizers update gets the sum of their rates. A parameter that none updates
        (a frozen embedding whose gradients were asked for) gets the common rate of all groups, if there is
        one.

        Raises:
            StoreError: no group updates the parameter and the groups' rates differ (or there are none).
        """
        rates = {group: group.learning_rate_sum if summed else group.learning_rate for group in self.groups}
        own = [rate for group, rate in rates.items() if parameter in group.parameters]
        if own:
            return sum(own)
        common = set(rates.values())
        if len(common) == 1:
            return common.pop()
        raise StoreError(
            f"the checkpoint at step {self.step} has no learning rate for the parameter {parameter!r}",
            expected="a parameter group that holds it, or one rate that all groups share",
            found=f"{len(self.groups)} groups with the rates {sorted(common)}",
            hint="give the estimator the learning rates yourself, or attribute to trained parameters",
        )

    def to_json(self) -> dict[str, Json]:
        groups = [group.to_json() for group in self.groups]
        return {"step": self.step, "epoch": self.epoch, "mark": self.mark, "groups": groups}

    @classmethod
    def from_json(cls, record: Any) -> Checkpoint:
        fields = Fields(record)
        return cls(
            step=fields.integer("step"),
            epoch=fields.integer("epoch"),
            mark=fields.integer("mark"),
            groups=fields.items("groups", ParameterGroup.from_json),
        )


@dataclass(frozen=True)
class StepRange:
    """The in-flight records with ``after < step <= through``."""

    after: int
    through: int

    def __post_init__(self) -> None:
        if self.through < self.after:
            raise ValueError(f"an empty range of steps: after {self.after}, through {self.through}")


@dataclass(frozen=True)
class Artifact:
    """One file of a store: where it is, what it holds, and the size and checksum that it must have.

    Args:
        path: relative to the store's folder, with forward slashes.
        kind: "weights", "frozen", "optimizer", "gradients", "in_flight", or a kind of the caller's own.
        step: optimizer steps at the moment it describes (of an in-flight chunk: of its last record).
        mark: training batches that this rank had seen.
        bytes: size of the file.
        sha256: checksum of the whole file, 64 hex digits.
        meta: JSON facts about the content (the span of a shard, the batches of a chunk, ...).
        rank: the rank that wrote it; known from the journal, not written into the line.
    """

    path: str
    kind: str
    step: int
    mark: int
    bytes: int
    sha256: str
    meta: Mapping[str, Json] = field(default_factory=dict, hash=False)
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", plain(self.meta, f"the meta data of {self.path}"))

    @property
    def span(self) -> tuple[int, int] | None:
        """The dataset positions [start, stop) of a replay shard; None for every other file."""
        if "span" not in self.meta:
            return None
        start, stop = Fields(self.meta).integers("span")
        return start, stop

    @property
    def batches(self) -> int:
        """How many training batches an in-flight chunk covers: those with marks in (mark - batches, mark]."""
        return Fields(self.meta).integer("batches") if self.kind == "in_flight" else 0

    def to_json(self) -> dict[str, Json]:
        return {
            "path": self.path,
            "kind": self.kind,
            "step": self.step,
            "mark": self.mark,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, record: Any, rank: int = 0) -> Artifact:
        fields = Fields(record)
        artifact = cls(
            path=fields.text("path"),
            kind=fields.text("kind"),
            step=fields.integer("step"),
            mark=fields.integer("mark"),
            bytes=fields.integer("bytes"),
            sha256=fields.text("sha256"),
            meta=fields.object("meta"),
            rank=rank,
        )
        if not re.fullmatch("[0-9a-f]{64}", artifact.sha256):
            raise ValueError("the field 'sha256' is not a checksum of 64 hex digits")
        if artifact.kind == "gradients" and (artifact.span is None or artifact.span[0] >= artifact.span[1]):
            raise ValueError("a gradient shard without a span of dataset positions")
        if artifact.kind == "in_flight" and not 0 < artifact.batches <= artifact.mark:
            raise ValueError("an in-flight chunk that covers no batch, or more than were seen")
        return artifact
