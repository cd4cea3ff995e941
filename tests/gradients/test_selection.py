"""select() finds what a person means, and says what there is when it finds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients import select, word_embeddings


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.token_type_embeddings, self.segment_emb = nn.Embedding(2, 4), nn.Embedding(2, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, 3)


@pytest.mark.parametrize("frozen", [True, False])
def test_word_embeddings_are_the_token_look_ups(frozen: bool) -> None:
    module = Encoder().requires_grad_(not frozen)
    selection = select(module, "word_embeddings")
    assert selection.names == ("token_embedding.weight",)
    assert selection.layers == {module.token_embedding: {"weight": "token_embedding.weight"}}
    assert selection.parameters["token_embedding.weight"] is module.token_embedding.weight
    assert selection.module is module


@pytest.mark.parametrize(
    "name", ["pos", "wpe", "pos_embed", "positional", "type_embeddings", "relative_attention_bias"]
)
def test_names_that_are_not_of_words(name: str) -> None:
    module = nn.ModuleDict({"wte": nn.Embedding(9, 4), name: nn.Embedding(5, 4)})
    assert select(module, "word_embeddings").names == ("wte.weight",)


def test_a_lone_embedding_is_the_one_and_two_of_words_are_two() -> None:
    assert select(nn.ModuleDict({"pos": nn.Embedding(5, 4)}), "word_embeddings").names == ("pos.weight",)
    pair = nn.ModuleDict(
        {"source": nn.Embedding(5, 4), "target": nn.EmbeddingBag(5, 4), "positions": nn.Embedding(5, 4)}
    )
    assert select(pair, "word_embeddings").names == ("source.weight", "target.weight")
    assert [name for name, _ in word_embeddings(pair)] == ["source", "target"]


def test_what_a_model_declares_as_input_embeddings_wins() -> None:
    class Declared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weird_pos_name, self.other = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def get_input_embeddings(self) -> nn.Module:
            return self.weird_pos_name

    class Undeclared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lookup = nn.Embedding(9, 4)

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert select(Declared(), "word_embeddings").names == ("weird_pos_name.weight",)
    assert select(Undeclared(), "word_embeddings").names == ("lookup.weight",)
    both = nn.ModuleDict({"a": Declared(), "tags": nn.Embedding(4, 4)})
    assert select(both, "word_embeddings").names == ("a.weird_pos_name.weight", "tags.weight")


def test_last_layer() -> None:
    module = Encoder()
    assert select(module, "last_layer").names == ("head.weight", "head.bias")
    module.head.requires_grad_(False)
    assert select(module, "last_layer").names == ("layer.linear2.weight", "layer.linear2.bias")
    assert select(module.requires_grad_(False), "last_layer").names == ("head.weight", "head.bias")
    net = nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU())
    assert select(net, "last_layer").names == ("0.weight", "0.bias")


def test_all_takes_what_is_trained_and_globs_take_what_they_name() -> None:
    module = Encoder()
    module.head.requires_grad_(False)
    assert set(select(module, "all").names) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert select(module, "head.*").names == ("head.weight", "head.bias")
    assert select(module, ["head.bias", "layer.norm?.weight"]).names == (
        "layer.norm1.weight",
        "layer.norm2.weight",
        "head.bias",
    )
    assert select(module, ["word_embeddings", "head.bias"]).input_only == {"token_embedding.weight"}
    assert select(module, ["word_embeddings", "*"]).input_only == frozenset()


def test_attention_answers_for_its_output_projection() -> None:
    module = Encoder()
    owned = select(module, "layer.self_attn.*").layers
    assert owned == {
        module.layer.self_attn: {
            local: f"layer.self_attn.{local}"
            for local in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        }
    }


def test_a_tied_head_belongs_to_the_parameter_unless_only_look_ups_are_meant() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    for asked in ("all", "head.weight", "last_layer"):
        selection = select(module, asked)
        assert selection.names == ("embed.weight",) and set(selection.layers) == set(module.values())
    assert set(select(module, "word_embeddings").layers) == {module["embed"]}


@pytest.mark.parametrize(
    ("module", "asked", "hint"),
    [
        (Encoder(), "head.wieght", "head.weight"),
        (Encoder(), "encoder.*", "HINT"),
        (nn.Linear(2, 2), "word_embeddings", "weight"),
        (nn.ReLU(), "all", "no parameters"),
        (nn.ReLU(), "last_layer", "no parameters"),
        (nn.Linear(2, 2).requires_grad_(False), "all", "weight"),
        (Encoder(), [], "HINT"),
    ],
)
def test_a_selection_of_nothing_is_refused_with_names_that_are_close(module: nn.Module, asked: Any, hint: str) -> None:
    with pytest.raises(CaptureError, match="matches no parameter") as caught:
        select(module, asked)
    assert hint in str(caught.value)


def test_selection_leaves_no_trace() -> None:
    module = Encoder()
    before = {name: parameter.clone() for name, parameter in module.state_dict().items()}
    select(module, "all")
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_name_that_reads_as_a_glob_is_a_name() -> None:
    module = nn.ModuleDict(
        {"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2), "b*": nn.Linear(2, 2), "bc": nn.Linear(2, 2)}
    )
    names = [name for name, _ in module.named_parameters()]
    assert select(module, names).names == tuple(names)
    assert select(module, "a[0].weight").names == ("a[0].weight",)
    assert select(module, "b*.weight").names == ("b*.weight",)
    assert select(module, "a[0].*").names == ("a0.weight", "a0.bias")  # no name, so a glob
