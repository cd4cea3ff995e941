"""From a finetuning run's store to that of the run before it, which is found by content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from lightning_influence.artifacts import ArtifactStore, StageLink
from lightning_influence.errors import StoreError


def link_of(store: ArtifactStore) -> StageLink:
    """The link of a finished finetuning run.

    Raises:
        StoreError: there is none, or a damaged one; the fit did not reach its end; shared weights moved that were
            declared frozen.
    """
    link = store.link
    if link is None:
        raise StoreError(
            f"the store at {store.root} is linked to no earlier run",
            expected="one that was written with StageLinker(pretrain=...)",
            found="no link",
            hint="add StageLinker(store, pretrain=folder_of_the_earlier_run) to the callbacks of the finetuning run",
        )
    if not link.complete:
        raise StoreError(
            f"the finetuning run of {store.root} did not reach its end",
            expected="a fit with StageLinker that has ended",
            found="a link without an end",
            hint="resume the fit, or run it again into another folder",
        )
    known = store.manifest.parameters
    if unknown := [name for name in (*link.shared, *link.frozen) if name not in known]:
        raise _damaged(store, f"the parameter {unknown[0]!r}, which the run does not have")
    if not link.shared or not (link.alpha is None or 0 < link.alpha < float("inf")):
        raise _damaged(store, f"{len(link.shared)} shared parameters, and the proximity {link.alpha}")
    if link.moved_though_frozen:
        raise StoreError(
            f"shared weights of {store.root} moved though they were declared frozen",
            expected="weights that stay, or requires_grad=True and an optimizer that trains them",
            found=f"other values in {', '.join(link.moved_though_frozen[:5])}",
            hint="look for what wrote into them (a hook, weight averaging, a moving average), and fit again",
        )
    return link


def parent_of(store: ArtifactStore, link: StageLink, given: str | os.PathLike[str] | None = None) -> ArtifactStore:
    """The store of the earlier run: where it was beside this one, where it was, or where it is said to be.

    Raises:
        StoreError: it is in none of these places; what is there is another one.
    """
    places = [store.root / link.parent_beside, Path(link.parent_folder)] if given is None else [Path(given)]
    others = []
    for place in dict.fromkeys(Path(os.path.normpath(place)) for place in places):
        try:
            found = ArtifactStore.open(place)
            identity = found.identity
        except StoreError as error:
            others.append(f"{place}: {error.what}")
            continue
        except (OSError, ValueError) as error:  # no path at all
            others.append(f"{str(place)[:80]!r}: {type(error).__name__}")
            continue
        if identity == link.parent:
            return _fitting(store, link, found)
        others.append(f"{place}: another store, {identity[:12]}")
    raise StoreError(
        f"the earlier run that {store.root} began from is not there",
        expected=f"the store with the content {link.parent[:12]}",
        found="; ".join(others),
        hint="say where it is: MultiStage(..., store='folder of the earlier run'); its weights and training set must "
        "be those that this run began from, so a run that was trained on is another one",
    )


def _fitting(store: ArtifactStore, link: StageLink, parent: ArtifactStore) -> ArtifactStore:
    """The parent, whose shared parameters have the shapes that they have here."""
    here, there = store.manifest.parameters, parent.manifest.parameters
    for name, earlier in link.shared.items():
        if earlier not in there or here[name].shape != there[earlier].shape:
            raise _damaged(store, f"{name!r} shared with {earlier!r}, which {parent.root} has not in that shape")
    return parent


def _damaged(store: ArtifactStore, found: str) -> StoreError:
    return StoreError(
        f"the link of the store at {store.root} is damaged",
        expected="parameters of both runs, of equal shapes, and a positive proximity if any",
        found=found,
        hint="restore the store from a copy",
    )


def ancestors(store: ArtifactStore) -> Iterator[ArtifactStore]:
    """A store, the one before it, and so on, as far as they can be found.

    Raises:
        StoreError: a store that comes twice.
    """
    seen: dict[str, Path] = {}
    while True:
        identity = store.identity
        if identity in seen:
            raise StoreError(
                "links of stores go round in a circle",
                expected="a first run, which began from nothing",
                found=f"{store.root} comes before itself, by way of {', '.join(str(p) for p in seen.values())}",
                hint="link each run to the one whose weights it began from",
            )
        seen[identity] = store.root
        yield store
        link = store.link
        if link is None:
            return
        try:
            store = parent_of(store, link)
        except StoreError:
            return
