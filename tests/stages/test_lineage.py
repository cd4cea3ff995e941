"""From a store to the one before it: by content, wherever it lies, and never by what a damaged link says."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_influence import ArtifactStore, QueryError, StoreError
from lightning_influence.stages import ancestors, held_by_training, link_of, parent_of
from tests.two_stages import data, linked, network, stored

ENCODER = ("encoder.0.weight", "encoder.0.bias")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ArtifactStore, ArtifactStore]:
    """(earlier, later)."""
    earlier = stored(tmp_path / "pre", network(3, 0), data(6, 3, 0))
    later = stored(tmp_path / "fine", network(2, 1), data(5, 2, 1))
    return earlier, linked(later, earlier, {name: name for name in ENCODER})


def changed(store: ArtifactStore, **facts: Any) -> ArtifactStore:
    link = store.link
    assert link is not None
    ArtifactStore.resume(store.root, store.manifest, None).record_link(replace(link, **facts))
    return ArtifactStore.open(store.root)


def test_the_parent_is_found_by_content(pair, tmp_path):
    earlier, later = pair
    assert parent_of(later, link_of(later)).root == earlier.root
    assert [store.root for store in ancestors(later)] == [later.root, earlier.root]
    for name in ("pre", "fine"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    later = ArtifactStore.open(tmp_path / "moved" / "fine")
    assert parent_of(later, link_of(later)).root == tmp_path / "moved" / "pre"
    shutil.move(tmp_path / "moved" / "pre", tmp_path / "far")
    with pytest.raises(StoreError, match="is not there"):
        parent_of(later, link_of(later))
    assert [store.root for store in ancestors(later)] == [later.root]  # as far as they are found
    assert parent_of(later, link_of(later), tmp_path / "far").root == tmp_path / "far"
    with pytest.raises(StoreError, match="another store"):
        parent_of(later, link_of(later), later.root)


def test_what_is_added_to_a_store_leaves_its_identity_and_other_weights_do_not(pair, tmp_path):
    earlier, _ = pair
    before = earlier.identity
    ArtifactStore.resume(earlier.root, earlier.manifest, None).record("remark", "added later")
    assert ArtifactStore.open(earlier.root).identity == before
    same = stored(tmp_path / "same", network(3, 0), data(6, 3, 0))
    other = stored(tmp_path / "other", network(3, 1), data(6, 3, 0))
    elsewhere = stored(tmp_path / "elsewhere", network(3, 0), data(6, 3, 1))
    assert same.identity == before and len({before, other.identity, elsewhere.identity}) == 3


def test_a_circle_is_refused(pair):
    earlier, later = pair
    back = linked(earlier, later, {name: name for name in ENCODER})
    with pytest.raises(StoreError, match="round in a circle"):
        list(ancestors(back))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"complete": False}, "did not reach its end"),
        ({"moved_though_frozen": ("encoder.0.weight",)}, "moved though they were declared frozen"),
        ({"shared": {"body.weight": "encoder.0.weight"}}, "link of the store .* is damaged"),
        ({"shared": {"encoder.0.weight": "body.weight"}}, "link of the store .* is damaged"),
        ({"shared": {"encoder.0.weight": "encoder.0.bias"}}, "link of the store .* is damaged"),
        ({"frozen": ("body.weight",)}, "link of the store .* is damaged"),
        ({"parent_beside": "../pre\0", "parent_folder": "x" * 5000}, "is not there"),
    ],
)
def test_links_that_say_what_cannot_be_are_refused(pair, facts, message):
    store = changed(pair[1], **facts)
    with pytest.raises(StoreError, match=message):
        parent_of(store, link_of(store))


def test_a_record_that_is_no_link_is_refused(pair):
    later = pair[1]
    writable = ArtifactStore.resume(later.root, later.manifest, None)
    for wrong in ({"parent": 3}, {**later.link.to_json(), "travel": {"w": "far"}}, "text"):  # type: ignore[union-attr,dict-item]
        writable.record("stage_link", wrong)
        with pytest.raises(StoreError, match=r"link in .* is damaged"):
            ArtifactStore.open(later.root).link  # noqa: B018
    writable.record("stage_link", {**later.link.to_json(), "complete": "false"})  # type: ignore[union-attr,dict-item]
    assert ArtifactStore.open(later.root).link.complete is False  # type: ignore[union-attr]


def test_what_the_run_did_says_how_firmly_the_start_is_held(pair):
    later = changed(pair[1], travel={ENCODER[0]: 4.0}, optimizers=("SGD",))
    at = later.checkpoints()[-1]
    assert held_by_training(later, link_of(later), at, ENCODER[:1]) == {ENCODER[0]: 0.25}
    with pytest.raises(QueryError, match=r"is not known for encoder\.0\.bias"):
        held_by_training(later, link_of(later), at, ENCODER)
