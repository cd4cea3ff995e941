"""Which parameters of a run are those of an earlier one: found by name, and held against the earlier run's weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn

from lightning_influence.artifacts import ArtifactStore
from lightning_influence.artifacts.tensor_files import content_digest
from lightning_influence.errors import StoreError
from lightning_influence.gradients import meant

SharedNames: TypeAlias = Mapping[str, str] | None


@dataclass(frozen=True)
class Match:
    """What two models have in common.

    Attributes:
        shared: this run's parameter -> the earlier run's, in the order of this run's.
        other_shapes: parameters that have one name in both and another shape, such as a resized head.
    """

    shared: Mapping[str, str]
    other_shapes: tuple[str, ...]


def matched(module: nn.Module, earlier: ArtifactStore, shared: SharedNames, fresh: Sequence[str] = ()) -> Match:
    """The parameters that a module takes over from an earlier run, by what it is told of their names.

    Args:
        module: of this run. Tied parameters count once.
        earlier: the store of the earlier run.
        shared: `None` takes all of one name and shape; otherwise from the earlier run's names to this run's, single
            ones or with a star on both sides: `{"encoder.*": "backbone.encoder.*"}`.
        fresh: globs over this run's names: parameters that begin anew although they have a name and a shape in common.

    Raises:
        StoreError: nothing is shared; a name or glob that names nothing; shapes that differ.
    """
    mine = {name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}
    names = {id(p): name for name, p in module.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    theirs = {name: tuple(spec.shape) for name, spec in earlier.manifest.parameters.items()}
    if unknown := [glob for glob in fresh if not meant(glob, mine)]:
        raise _refused(f"fresh= names what is no parameter here: {', '.join(unknown)}", mine, unknown[0])
    spelled, other = _spelled(earlier, theirs), []
    pairs: dict[str, str] = {}
    for there, here, starred in _pairs(shared, spelled, mine):
        own = names.get(mine.get(here, 0))
        if own is None:
            if not starred:
                raise _refused(f"this run has no parameter {here!r}, which shared= names", mine, here)
        elif not (_any(own, fresh) or _any(here, fresh)):
            if shapes[own] == theirs[there]:
                pairs[own] = there
            elif starred:
                other.append(own)
            else:
                raise StoreError(
                    f"{own!r} is not the {there!r} of the store at {earlier.root}: it has another shape",
                    expected=f"shape {theirs[there]}",
                    found=f"shape {shapes[own]}",
                    hint="leave parameters that were resized out of shared=",
                )
    pairs = {name: pairs[name] for name in shapes if name in pairs}
    if not pairs:
        raise StoreError(
            f"this run shares no parameter with the store at {earlier.root}",
            expected=f"some of {_some(theirs)}",
            found=_some(shapes),
            hint="name them: shared={'encoder.*': 'backbone.encoder.*'}, from the names there to the names here",
        )
    return Match(pairs, tuple(name for name in shapes if name in other))


def compared(module: nn.Module, shared: Mapping[str, str], earlier: ArtifactStore) -> dict[str, str]:
    """Hold the shared weights against the last ones of the earlier run; returns those whose type was converted.

    Raises:
        StoreError: they are others.
    """
    last = earlier.checkpoints()[-1]
    weights, parameters, converted = earlier.weights(last), dict(module.named_parameters()), {}
    others = []
    for name, of_earlier in shared.items():
        mine, theirs = parameters[name].detach().cpu(), weights[of_earlier]
        if mine.dtype != theirs.dtype:
            converted[name] = f"{theirs.dtype} -> {mine.dtype}".replace("torch.", "")
        if not torch.equal(theirs.to(mine.dtype), mine):
            others.append((name, float((theirs.double() - mine.double()).abs().max())))
    if others:
        name, distance = others[0]
        raise StoreError(
            f"{len(others)} of {len(shared)} shared parameters are not those that the run in {earlier.root} ended with"
            f": {', '.join(name for name, _ in others[:5])}",
            expected=f"the weights after its step {last.step}",
            found=f"{name!r} is off by up to {distance:.3g}",
            hint="load these weights before the fit, or name parameters that begin anew: fresh=['head.*']",
        )
    return converted


def checksums(module: nn.Module) -> dict[str, str]:
    """16 hex digits over type and content of every parameter."""
    return {name: content_digest(name, p)[:16] for name, p in module.named_parameters()}


def _spelled(earlier: ArtifactStore, known: Collection[str]) -> dict[str, str]:
    """Every name of an earlier parameter, those of tied ones too -> the name that the manifest has."""
    weights = earlier.weights(earlier.checkpoints()[-1])
    by_tensor = {id(weights[name]): name for name in known if name in weights}
    return {name: by_tensor[id(value)] for name, value in weights.items() if id(value) in by_tensor}


def _pairs(shared: SharedNames, theirs: Mapping[str, str], mine: Collection[str]) -> Iterator[tuple[str, str, bool]]:
    """(earlier name, name here, whether by a star) of all that the table names; of all common names without one."""
    if shared is None:
        yield from ((theirs[name], name, True) for name in mine if name in theirs)
        return
    for pattern, replacement in shared.items():
        if pattern.count("*") != replacement.count("*") or pattern.count("*") > 1:
            raise StoreError(
                "shared= maps one name to another, or one star to another",
                expected="for example {'encoder.*': 'backbone.encoder.*'}",
                found=f"{pattern!r}: {replacement!r}",
                hint="write one star on each side, or none",
            )
        starred = "*" in pattern and pattern not in theirs
        before, _, after = pattern.partition("*")
        here = {
            name: replacement.replace("*", name[len(before) : len(name) - len(after)]) if starred else replacement
            for name in (meant(pattern, theirs) if starred else [pattern])
            if name in theirs
        }
        if not here:
            raise _refused(f"the earlier run has no parameter {pattern!r}, which shared= names", theirs, pattern)
        if starred and not any(name in mine for name in here.values()):
            wanted = next(iter(here.values()))
            raise _refused(f"this run has no parameter {wanted!r}, nor others that shared= names", mine, wanted)
        yield from ((theirs[name], own, starred) for name, own in here.items())


def _any(name: str, globs: Collection[str]) -> bool:
    return any(meant(glob, [name]) for glob in globs)


def _some(names: Collection[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "") or "none"


def _refused(what: str, known: Collection[str], found: str) -> StoreError:
    return StoreError(
        what,
        expected=f"names among {_some(known)}",
        found=found,
        hint="keys of shared= are names of the earlier run, values names of this one; fresh= takes names of this one",
    )
