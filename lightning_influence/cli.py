"""The command line: `lightning-influence inspect STORE` says what a store holds, `verify STORE` reads all of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from lightning_influence.artifacts import UNBOUNDED, ArtifactStore
from lightning_influence.artifacts.stage_link import LINK
from lightning_influence.errors import InfluenceError

_COMMANDS = {
    "inspect": "say what a store holds: training set, model, gradients, checkpoints, learning rates and curvatures",
    "verify": "compare every file of a store with its checksum; exit status 1 if anything is wrong",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0 all well, 1 problems in the store, 2 it cannot be read at all."""
    parser = argparse.ArgumentParser(prog="lightning-influence", description="Look into an artifact store.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _COMMANDS.items():
        commands.add_parser(name, help=text, description=text).add_argument("store", help="folder of the artifacts")
    options = parser.parse_args(arguments)
    try:
        store = ArtifactStore.open(options.store)
        text, status = inspected(store) if options.command == "inspect" else verified(store)
    except InfluenceError as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return status


def inspected(store: ArtifactStore) -> tuple[str, int]:
    """A page of text about a store, and the exit status."""
    manifest, files = store.manifest, store.artifacts()
    length = "a stream" if manifest.dataset_length == UNBOUNDED else f"{manifest.dataset_length} samples"
    lines = [
        f"{store.root}: {manifest.mode}, written by lightning_influence {manifest.library_version}",
        f"  training set  {length}, fingerprint {manifest.dataset_fingerprint or 'none'}",
        f"  model         {manifest.module_class}, {len(manifest.parameters)} parameters",
        f"  gradients     {', '.join(manifest.selected) or 'none'} as {manifest.dtype}",
        f"  size          {sum(file.bytes for file in files) / 1e6:.1f} MB in {len(files)} files",
        f"  sign          {manifest.sign_convention}",
        *(f"  {name:12}  {_value(value)}" for name, value in manifest.facts.items() if name != LINK),
        *([] if store.link is None else [f"  began from    {store.link}"]),
        f"  {'step':>12}  {'epoch':>5}  {'rate':>9}  {'sum of rates':>12}  optimizer",
    ]
    for checkpoint in store.checkpoints():
        for group in checkpoint.groups:
            lines.append(
                f"  {checkpoint.step:12d}  {checkpoint.epoch:5d}  {group.learning_rate:9.3g}  "
                f"{group.learning_rate_sum:12.3g}  {group.optimizer} of {len(group.parameters)} parameters"
            )
    curvatures = store.artifacts("curvature")
    if curvatures:
        lines.append(f"  {'step':>12}  {'curvature':16}  {'labels':8}  {'samples':>8}  {'MB':>7}  parameters")
    for file in curvatures:
        facts = file.meta
        lines.append(
            f"  {file.step:12d}  {facts.get('name')!s:16}  {facts.get('labels') or 'all'!s:8}  "
            f"{facts.get('num_samples')!s:>8}  {file.bytes / 1e6:7.1f}  {_counted(facts.get('parameters'))}"
        )
    return "\n".join(lines), 0


def _counted(names: object) -> str:
    """A few names, or how many they are."""
    known = [str(name) for name in names] if isinstance(names, (list, tuple)) else []
    return ", ".join(known) if len(known) <= 4 else f"{len(known)} of them"


def verified(store: ArtifactStore) -> tuple[str, int]:
    """Every problem of a store, a line each, and the exit status."""
    problems = store.verify()
    count = "no problems" if not problems else f"{len(problems)} problem{'s' if problems[1:] else ''}"
    return "\n".join([*problems, f"{store.root}: {count}"]), int(bool(problems))


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
