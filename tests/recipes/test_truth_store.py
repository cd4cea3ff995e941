"""The store of truths: what belongs to it is found, what does not is refused, and two writers do no harm."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_influence.errors import StoreError
from recipes.truths import store as module
from recipes.truths.measuring import Truth, of_logits
from recipes.truths.retraining import Samples, origins, retrain
from recipes.truths.store import Origin, TruthStore, data_hash, model_hash, part_key
from recipes.truths.training import Recipe

ORIGIN = Origin(
    model="m", recipe={"epochs": 2, "rate": 0.1}, train="t", train_size=9, queries="q", query_count=4, seed=1,
    model_repr="Linear()\n  α",
)  # fmt: skip
RECIPE = Recipe(epochs=1, batch_size=4, learning_rate=0.1)
DATA = Samples(torch.arange(24.0).view(8, 3) / 24, torch.arange(8) % 2)
QUERIES = Samples(torch.ones(2, 3), torch.tensor([0, 1]))


def linear() -> nn.Module:
    return nn.Linear(3, 2)


def result(number: int) -> Truth:
    values = torch.arange(4, dtype=torch.float64) + number
    return Truth(values, -values)


def key(number: int) -> str:
    return part_key(torch.tensor([number]), torch.ones(1))


def filled(cache: Path, count: int) -> TruthStore:
    """A store with a file for each of some models."""
    store = TruthStore.at(cache, ORIGIN)
    for number in range(count):
        store.add({key(number): result(number)})
    return store


def models_files(store: TruthStore) -> list[Path]:
    return sorted(store.folder.glob("models-*"))


def test_results_come_back_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    store.add({key(4): result(4), key(3): result(3)})
    found = TruthStore.open(store.folder).read([key(number) for number in (3, 0, 4, 3)])
    assert found.losses[:, 0].tolist() == [3, 0, 4, 3] and torch.equal(found.log_odds, -found.losses)
    assert found.losses.dtype == torch.float64 and found.losses.shape == (4, 4)
    with pytest.raises(StoreError, match=r"lacks results(.|\n)*found: 2 of them missing"):
        store.read([key(0), key(7), key(8)])


def test_a_person_can_read_what_a_folder_holds(tmp_path: Path) -> None:
    (origin,) = origins(linear, RECIPE, DATA, QUERIES, [5])
    facts = json.loads((TruthStore.at(tmp_path, origin).folder / "truth.json").read_text())
    assert facts["seed"] == 5 and facts["train_size"] == 8 and facts["query_count"] == 2
    assert facts["recipe"] == {
        "epochs": 1, "batch_size": 4, "learning_rate": 0.1, "momentum": 0.0, "weight_decay": 0.0
    }  # fmt: skip
    assert facts["model_repr"] == repr(linear()) and facts["key"] == origin.key
    assert len({facts["model"], facts["train"], facts["queries"]}) == 3


def test_many_files_become_one(tmp_path: Path) -> None:
    store = filled(tmp_path, 32)
    store.tidy()
    assert len(models_files(store)) == 32  # few are left alone
    store.add({key(40): result(40), key(41): result(41)})
    before = store.known()
    store.tidy()
    (path,) = models_files(store)
    after = TruthStore.open(store.folder).known()
    assert sorted(path.name for path in store.folder.iterdir()) == [path.name, "truth.json"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].losses, after[name].losses) for name in before)
    store.add(before)  # under the same name
    store.tidy()
    assert models_files(store) == [path]


def test_a_reader_waits_for_files_that_another_program_puts_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = filled(tmp_path, 33), TruthStore.open(tmp_path / ORIGIN.key)
    real = TruthStore._load
    calls: list[Path] = []

    def interrupted(self: TruthStore, path: Path) -> dict[str, Truth]:
        calls.append(path)
        if len(calls) == 5:
            with monkeypatch.context() as patch:
                patch.setattr(TruthStore, "_load", real)
                other.tidy()
        return real(self, path)

    monkeypatch.setattr(TruthStore, "_load", interrupted)
    assert store.known().keys() == {key(number) for number in range(33)}
    assert len(calls) == 5 + 1  # the fifth file was gone; then there was one


def test_programs_that_write_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MANY", 3)

    def job(numbers: range) -> None:
        for number in numbers:
            store = TruthStore.at(tmp_path, ORIGIN)
            if key(number) not in store.known():
                store.add({key(number): result(number)})
            store.tidy()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(job, [range(0, 20), range(10, 30), range(30, 40), range(25, 45)]))
    found = TruthStore.open(tmp_path / ORIGIN.key).read([key(number) for number in range(45)])
    assert found.losses[:, 0].tolist() == list(range(45))
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("when", ["before the whole file", "before the small ones go"])
def test_a_crash_while_files_are_put_together_loses_nothing(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, 33)

    def crash(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "before the whole file":
            patch.setattr(module.os, "replace", crash)
        else:
            patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            store.tidy()
    assert store.known().keys() == {key(number) for number in range(33)}
    store.tidy()
    assert len(models_files(store)) == 1


OTHERS = {
    "model": (dict(build=lambda: nn.Linear(3, 2, bias=False)), "another model, or other initial weights"),
    "recipe": (dict(recipe=replace(RECIPE, epochs=2)), "another recipe"),
    "train": (dict(train=Samples(DATA.inputs, 1 - DATA.labels)), "other training data"),
    "queries": (dict(queries=Samples(DATA.inputs[:2], DATA.labels[:2])), "other queries"),
    "seeds": (dict(seeds=[2]), "another model, or other initial weights, another seed"),
    "size": (dict(train=Samples(DATA.inputs[:6], DATA.labels[:6])), "other training data, another number of training"),
    "padding": (dict(train=replace(DATA, padding=0)), "other training data"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_something_else_is_refused_and_says_what_differs(what: str, tmp_path: Path) -> None:
    settings = dict(build=linear, recipe=RECIPE, train=DATA, queries=QUERIES, seeds=[1])
    (origin,) = origins(**settings)  # type: ignore[arg-type]
    store = TruthStore.open(TruthStore.at(tmp_path, origin).folder)
    store.require(origin)
    changed, words = OTHERS[what]
    (other,) = origins(**(settings | changed))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=f"of something else: {words}") as refused:
        store.require(other)
    assert "expected: " in str(refused.value) and "found: " in str(refused.value) and "HINT: " in str(refused.value)


def test_a_folder_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    (origin,) = origins(linear, RECIPE, DATA, QUERIES, [1])
    folder = TruthStore.at(tmp_path, origin).folder
    shutil.copytree(folder, tmp_path / replace(origin, seed=2).key)
    with pytest.raises(StoreError, match="another seed"):
        TruthStore.at(tmp_path, replace(origin, seed=2))


def test_no_store_and_a_changed_or_older_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read"):
        TruthStore.open(tmp_path)
    path = TruthStore.at(tmp_path, ORIGIN).folder / "truth.json"
    text = path.read_text()
    for was, becomes, words in (
        ('"seed": 1', '"seed": 2', "was changed"),
        ('"seed": 1,', "", "was changed"),
        (f'"version": {module.VERSION}', '"version": 1', "another version"),
        ("{", "", "cannot be read"),
    ):
        assert was in text
        path.write_text(text.replace(was, becomes, 1))
        with pytest.raises(StoreError, match=words):
            TruthStore.open(path.parent)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def changed(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def of_another_program(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "is damaged"), (emptied, "is damaged"), (changed, "is damaged"), (of_another_program, "another store")],
)
def test_a_damaged_file_is_named(damage: object, words: str, tmp_path: Path) -> None:
    subsets: list[Tensor] = [torch.arange(4), torch.arange(2, 8)]
    first = retrain(linear, RECIPE, DATA, QUERIES, subsets, seeds=[1], cache=tmp_path)
    (path,) = tmp_path.glob("*/models-*")
    damage(path)  # type: ignore[operator]
    with pytest.raises(StoreError, match=words) as refused:
        retrain(linear, RECIPE, DATA, QUERIES, subsets, seeds=[1], cache=tmp_path)
    assert path.name in str(refused.value)
    path.unlink()  # as the error says
    again = retrain(linear, RECIPE, DATA, QUERIES, subsets, seeds=[1], cache=tmp_path)
    assert torch.equal(again.losses, first.losses)


def test_a_link_to_nothing_is_no_reason_to_wait(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    (store.folder / "models-lost.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StoreError, match="models-lost"):
        store.known()


def test_hashes_see_content_and_nothing_else() -> None:
    assert data_hash(DATA) == data_hash(Samples(DATA.inputs.clone(), DATA.labels.clone()))
    assert data_hash(DATA) != data_hash(Samples(DATA.inputs.double(), DATA.labels))
    assert key(1) != key(2) and key(1) == part_key(torch.tensor([1], dtype=torch.int32), torch.ones(1).double())
    assert part_key(torch.tensor([1, 2]), torch.ones(2)) != part_key(torch.tensor([2, 1]), torch.ones(2))
    assert part_key(torch.tensor([1]), torch.ones(1)) != part_key(torch.tensor([1]), torch.zeros(1))
    torch.manual_seed(0)
    one = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    assert model_hash(one) != model_hash(other)
    other.load_state_dict(one.state_dict())
    assert model_hash(one) == model_hash(other)
    other.register_buffer("places", torch.ones(1), persistent=False)
    assert model_hash(one) != model_hash(other)


def test_log_odds_of_sure_models_are_finite() -> None:
    found = of_logits(torch.tensor([[60.0, 0.0], [-60.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(found.log_odds, torch.tensor([-60.0, 60.0, 0.0]).double())
    assert found.losses.isfinite().all() and found.losses[1] == 60
