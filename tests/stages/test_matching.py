"""Which parameters two runs share: by name, by stars, by aliases of tied ones, without those that begin anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_influence import ArtifactStore, StoreError
from lightning_influence.stages import checksums, compared, matched
from tests.two_stages import Network, data, network, stored

DATA = data(6, 3, 0)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    return stored(tmp_path_factory.mktemp("earlier") / "store", network(3, 0), DATA)


class Nested(nn.Module):
    """The network one level down, with a head of another size and a layer of its own."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.body = Network(classes)
        self.adapter = nn.Linear(2, 2)


ENCODER = ("encoder.0.weight", "encoder.0.bias")
HEAD = ("head.weight", "head.bias")


def test_one_name_and_one_shape(earlier):
    match = matched(network(2, 1), earlier, None)
    assert match.shared == {name: name for name in ENCODER} and match.other_shapes == HEAD
    assert matched(network(3, 1), earlier, None).shared == {name: name for name in (*ENCODER, *HEAD)}
    assert matched(network(3, 1), earlier, None, ["head.*"]).shared == {name: name for name in ENCODER}


def test_a_star_leaves_out_what_was_resized_and_what_is_not_there(earlier):
    match = matched(Nested(), earlier, {"*": "body.*"})
    assert match.shared == {f"body.{name}": name for name in ENCODER}
    assert match.other_shapes == tuple(f"body.{name}" for name in HEAD)
    fresh = matched(Nested(), earlier, {"*": "body.*"}, ["body.head.*"])
    assert fresh.shared == match.shared and fresh.other_shapes == ()
    assert matched(Nested(3), earlier, {"enc*": "body.enc*"}).shared == match.shared


def test_explicit_names_must_exist_and_fit(earlier):
    both = {"encoder.0.bias": "body.encoder.0.bias"}
    assert matched(Nested(), earlier, both).shared == {"body.encoder.0.bias": "encoder.0.bias"}
    for shared, message in (
        ({"head.weight": "body.head.weight"}, "another shape"),
        ({"head.weight": "body.tail.weight"}, "no parameter 'body.tail.weight'"),
        ({"tail.*": "body.*"}, "no parameter 'tail"),
        ({"encoder.*": "torso.*"}, "no parameter 'torso"),
        ({"encoder.*": "body"}, "one star"),
    ):
        with pytest.raises(StoreError, match=message):
            matched(Nested(), earlier, shared)
    with pytest.raises(StoreError, match="shares no parameter"):
        matched(nn.Linear(7, 7), earlier, None)
    with pytest.raises(StoreError, match="fresh= names what is no parameter"):
        matched(network(3, 1), earlier, None, ["heads.*"])


class Tied(Network):
    """Two layers that are one."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__(3)
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(self.first(x).tanh()))


def test_tied_there_and_untied_here_are_both_found(tmp_path):
    store = stored(tmp_path / "tied", Tied().double(), DATA)
    shared = matched(Tied(tied=False), store, None).shared
    assert shared["first.weight"] == shared["second.weight"] == "first.weight"
    assert "second.weight" not in matched(Tied(), store, None).shared  # tied here too: one parameter
    assert matched(Tied(tied=False), store, {"second.weight": "second.weight"}).shared == {
        "second.weight": "first.weight"
    }


def test_weights_are_compared_in_the_type_that_they_have_here(earlier):
    module = network(3, 0)
    shared = dict(matched(module, earlier, None).shared)
    assert compared(module, shared, earlier) == {}
    narrow = network(3, 0).to(torch.bfloat16)
    assert compared(narrow, shared, earlier) == dict.fromkeys(shared, "float64 -> bfloat16")
    with torch.no_grad():
        module.head.weight[0, 0] += 1e-6
    with pytest.raises(StoreError, match=r"head\.weight") as refused:
        compared(module, shared, earlier)
    assert "1e-06" in str(refused.value) and "fresh" in str(refused.value)


def test_checksums_tell_any_change_of_content_or_type():
    module: Any = network(3, 0)
    before = checksums(module)
    assert before == checksums(network(3, 0)) and set(before) == {name for name, _ in module.named_parameters()}
    with torch.no_grad():
        module.head.bias[0] = -0.0 if float(module.head.bias[0]) == 0 else module.head.bias[0] * (1 + 2**-50)
    after = checksums(module)
    assert {name for name in before if before[name] != after[name]} == {"head.bias"}
    assert checksums(module.float())["head.weight"] != before["head.weight"]
