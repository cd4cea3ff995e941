"""Layers of one run side by side: their sums, their cancellation, their verdicts, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_influence import (
    BM25,
    GradientSnapshot,
    InfluenceFunction,
    InfluenceModule,
    LayerComparison,
    MultiStage,
    QueryError,
    RandomProjection,
    Removals,
    RemovalTruth,
    TracIn,
    TracInWE,
    compare_layers,
)
from lightning_influence.artifacts import ArtifactStore, Shard
from lightning_influence.curvature import EKFAC
from lightning_influence.layer_comparison.aggregation import rank_scores, vote_scores
from lightning_influence.layer_comparison.layers import layers_of, named_layers
from lightning_influence.metrics import cancellation_ratio
from tests.stores import (
    VOCABULARY,
    Texts,
    all_names,
    batch_of,
    classifier,
    collate,
    group,
    in_flight_store,
    loader_of,
    loss_of_one,
    manifest_of,
    quiet,
    replay_store,
    singles,
    trajectory,
)
from tests.two_stages import linked

SAMPLES, QUERIES, RATES = 14, 5, (0.3, 0.15)
FLAGS = [i in (1, 4, 9) for i in range(SAMPLES)]


class Reader(LightningModule):
    """Word embedding, two transformer blocks, a norm, a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        block = nn.TransformerEncoderLayer(width, 2, 6, 0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, batch: Any) -> Tensor:
        padding = batch["tokens"] == 0
        hidden = self.encoder(self.embedding(batch["tokens"]), src_key_padding_mask=padding)
        present = (~padding).unsqueeze(2).to(hidden.dtype)
        return self.head((hidden * present).sum(1) / present.sum(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Run:
    """A reader with a store of two checkpoints, and what autograd says of every sample there."""

    def __init__(self, root: Path) -> None:
        self.module: Any = classifier(kind=Reader)
        self.train, self.asked = Texts(SAMPLES), Texts(QUERIES, seed=1)
        self.states = trajectory(self.module, 2)
        self.store = self.stored(root)
        self.queries = [batch_of(self.asked, [0, 1, 2]), batch_of(self.asked, [3, 4])]

    def stored(self, root: Path, parameters: str | Sequence[str] = "all", **options: Any) -> ArtifactStore:
        return replay_store(
            root,
            self.module,
            self.train,
            self.states,
            lambda c: [group(all_names(self.module), RATES[c])],
            parameters=parameters,
            **options,
        )

    def influence(self, estimator: Any = None, store: Any = None, **options: Any) -> InfluenceModule:
        options = {"k": 3, "train_loader": loader_of(self.train), **options}
        return InfluenceModule(self.module, store or self.store, estimator or TracIn(), **options)

    def compared(self, **options: Any) -> LayerComparison:
        return compare_layers(self.influence(), self.queries, **options)

    def slow_gradients(self, c: int, dataset: Texts) -> dict[str, Tensor]:
        """Written out by autograd, sample by sample: name -> (N, *shape)."""
        other = Reader().double()
        other.load_state_dict(self.states[c])
        rows = [torch.autograd.grad(loss_of_one(other, one), list(other.parameters())) for one in singles(dataset)]
        names = [name for name, _ in other.named_parameters()]
        return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("layers") / "store")


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


DEFAULT = ["embedding", "encoder.layers.0", "encoder.layers.1", "encoder.norm", "head"]


def test_every_parameter_of_a_model_is_in_one_layer(run: Run) -> None:
    layers = layers_of(run.module)
    assert [layer.name for layer in layers] == DEFAULT
    assert sorted(name for layer in layers for name in layer.parameters) == sorted(all_names(run.module))


def test_layers_of_models_without_blocks_and_with_repeated_ones() -> None:
    flat = nn.ModuleDict({"words": nn.Embedding(5, 2), "body": nn.Linear(2, 2), "head": nn.Linear(2, 3)})
    assert [layer.name for layer in layers_of(flat)] == ["words", "body", "head"]
    flat["body"].scale = nn.Parameter(torch.ones(1))
    flat.own = nn.Parameter(torch.ones(2))
    sizes = {layer.name: len(layer.parameters) for layer in layers_of(flat)}
    assert sizes == {"own": 1, "words": 1, "body": 3, "head": 2}
    stacked = nn.ModuleDict(
        {
            "body": nn.Sequential(
                nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU(), nn.Sequential(nn.Linear(2, 2))
            ),
            "once": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
        }
    )
    assert [layer.name for layer in layers_of(stacked)] == ["body.0", "body.2", "once.0", "once.1"]
    tied = nn.ModuleDict({"words": nn.Embedding(5, 2), "head": nn.Linear(2, 5)})
    tied["head"].weight = tied["words"].weight
    assert [(layer.name, layer.parameters) for layer in layers_of(tied)] == [
        ("words", ("words.weight",)),
        ("head", ("head.bias",)),
    ]


def test_layers_are_named_by_modules_words_and_globs(run: Run) -> None:
    layers = named_layers(run.module, ["word_embeddings", "encoder.layers.1", "*.norm1.*", "last_layer"])
    assert layers[0].parameters == ("embedding.weight",)
    assert layers[1].parameters == tuple(n for n in all_names(run.module) if n.startswith("encoder.layers.1."))
    assert layers[2].parameters == tuple(n for n in all_names(run.module) if ".norm1." in n)
    assert layers[3].parameters == ("head.weight", "head.bias")


def test_scores_of_a_layer_are_those_of_tracin_restricted_to_it_and_sum_to_those_of_all(run: Run) -> None:
    found = run.compared()
    assert [layer.name for layer in found.layers] == DEFAULT
    assert found.missing == ()
    expected = torch.zeros(QUERIES, SAMPLES, dtype=torch.float64)
    for layer in found.layers:
        slow = torch.zeros(QUERIES, SAMPLES, dtype=torch.float64)
        for c, rate in enumerate(RATES):
            mine, theirs = run.slow_gradients(c, run.train), run.slow_gradients(c, run.asked)
            for name in layer.parameters:
                slow += rate * theirs[name].flatten(1) @ mine[name].flatten(1).T
        close(layer.scores, slow)
        restricted = run.influence(TracIn(list(layer.parameters)))
        close(layer.scores, torch.cat([restricted.scores(batch) for batch in run.queries]))
        shapes = [run.store.manifest.parameters[name].shape for name in layer.parameters]
        assert layer.size == sum(math.prod(shape) for shape in shapes)
        expected += slow
    close(sum(layer.scores for layer in found.layers), expected)
    close(found.whole.scores, expected)
    close(found.whole.scores, torch.cat([run.influence().scores(batch) for batch in run.queries]))


def test_the_cancellation_ratio_is_that_of_written_out_gradients_at_each_checkpoint(run: Run) -> None:
    found = run.compared()
    for c in range(2):
        slow = run.slow_gradients(c, run.train)
        for layer in found.layers:
            flat = torch.cat([slow[name].flatten(1) for name in layer.parameters], 1)
            expected = float(flat.abs().sum() / flat.sum(0).abs().sum())
            assert float(layer.cancellations[c]) == pytest.approx(expected, rel=1e-10)
            assert expected == pytest.approx(cancellation_ratio({"layer": flat})["layer"], rel=1e-10)
            assert expected > 1
    assert found["head"].cancellation == pytest.approx(float(found["head"].cancellations.mean()))


def test_each_shard_is_read_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[Any] = []
    reading: Any = vars(Shard)["tensors"]

    def read(shard: Shard) -> Any:
        looks.append(shard.span)
        return reading.fget(shard)

    monkeypatch.setattr(Shard, "tensors", property(read))
    run.compared(flags=FLAGS)
    assert len(looks) == 2 * 3  # two checkpoints of three shards, whatever the number of layers


def test_nothing_depends_on_batches_shards_and_the_order_of_layers(run: Run, tmp_path: Path) -> None:
    found = run.compared(flags=FLAGS)
    influence = run.influence(store=run.stored(tmp_path / "other", shard_size=14))
    other = compare_layers(influence, DataLoader(run.asked, 1, collate_fn=collate), flags=FLAGS, layers=DEFAULT[::-1])
    for mine, theirs in zip(found.layers, other.layers[::-1], strict=True):
        close(theirs.scores, mine.scores)
        close(theirs.cancellations, mine.cancellations)
        assert theirs.self_influence is not None and mine.self_influence is not None
        close(theirs.self_influence, mine.self_influence)
    close(other.by_rank.scores, found.by_rank.scores)
    close(other.by_vote.scores, found.by_vote.scores)


def test_self_influence_finds_flags_as_a_count_of_pairs_says(run: Run) -> None:
    found = run.compared(flags=FLAGS)
    flagged = torch.tensor(FLAGS)
    for layer in found.layers:
        slow = torch.zeros(SAMPLES, dtype=torch.float64)
        for c, rate in enumerate(RATES):
            mine = run.slow_gradients(c, run.train)
            slow += sum(rate * mine[name].flatten(1).square().sum(1) for name in layer.parameters)
        assert layer.self_influence is not None and layer.found_by_self is not None
        close(layer.self_influence, slow)
        pairs = (slow[flagged][:, None] > slow[~flagged][None]).double()
        assert layer.found_by_self.auroc == pytest.approx(float(pairs.mean()))
        means = layer.scores.mean(0)
        pairs = (means[flagged][:, None] < means[~flagged][None]).double()
        assert layer.found_as_opponents is not None
        assert layer.found_as_opponents.auroc == pytest.approx(float(pairs.mean()))
    assert found.whole.self_influence is not None
    close(found.whole.self_influence, run.influence().self_influence())
    assert all(one.found_by_self is not None and one.self_influence.shape == (SAMPLES,) for one in found)
    assert run.compared().whole.found_by_self is None


def test_ranks_and_votes(run: Run) -> None:
    found = run.compared(k=4)
    ranks, votes = torch.zeros(QUERIES, SAMPLES).double(), torch.zeros(QUERIES, SAMPLES).double()
    for layer in found.layers:
        for q in range(QUERIES):
            row = layer.scores[q].tolist()
            for z in range(SAMPLES):
                below, equal = sum(other < row[z] for other in row), row.count(row[z])  # texts without shared words
                ranks[q, z] += below + (1 + equal) / 2
                votes[q, z] += SAMPLES - below - equal + row[:z].count(row[z]) < 4
    ranks /= len(found.layers)
    close(found.by_rank.scores, ranks)
    assert torch.equal(found.by_vote.scores.floor(), votes)
    close(found.by_vote.scores - votes, ranks / (SAMPLES + 1))


def test_equal_scores_share_their_rank_and_vote_in_dataset_order() -> None:
    scores = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    assert rank_scores(scores).tolist() == [[2.25, 2.25, 1.5]]
    assert vote_scores(scores, 1).floor().tolist() == [[2.0, 0.0, 0.0]]
    assert torch.equal(rank_scores(scores * 1e-30), rank_scores(scores))


def test_layers_without_gradients_are_named(run: Run, tmp_path: Path) -> None:
    store = run.stored(tmp_path / "part", ["embedding.weight", "encoder.layers.1.*", "head.bias"])
    found = compare_layers(run.influence(store=store), run.queries)
    assert [layer.name for layer in found.layers] == ["embedding", "encoder.layers.1", "head"]
    assert found["head"].parameters == ("head.bias",)
    assert found.missing == ("encoder.layers.0", "encoder.norm")
    assert "Not compared, since their gradients are not there: encoder.layers.0, encoder.norm." in str(found)
    only = compare_layers(run.influence(TracInWE(top_words=2)), run.queries)
    assert [layer.name for layer in only.layers] == ["embedding"] and len(only.missing) == 4
    close(only.layers[0].scores, torch.cat([run.influence(TracInWE(top_words=2)).scores(b) for b in run.queries]))


def test_layers_that_overlap(run: Run) -> None:
    found = run.compared(layers=["all", "head", "head.*"])
    close(found["all"].scores, found.whole.scores)
    assert torch.equal(found["head"].scores, found["head.*"].scores)


def test_records_made_in_flight(run: Run, tmp_path: Path) -> None:
    names = all_names(run.module)
    halves = [group(names[:3], 0.2), group(names[3:], 0.1, 1)]
    records = [(s, z, run.states[s % 2], [0.2, 0.1], 2.0) for s, z in ((1, 0), (1, 3), (2, 5), (3, 3))]
    points = [(0, run.states[0], halves), (2, run.states[1], halves)]
    store = in_flight_store(tmp_path / "flight", run.module, run.train, points, records)
    influence = run.influence(store=store)
    found = compare_layers(influence, run.queries, flags=FLAGS)
    close(sum(layer.scores for layer in found.layers), torch.cat([influence.scores(b) for b in run.queries]))
    assert found.whole.self_influence is not None
    close(found.whole.self_influence, influence.self_influence())
    assert found.layers[0].cancellations.shape == (2,)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, DataLoader[Any]]:
    """A reader that was really trained, for removals and curvature."""
    seed_everything(0, verbose=False)
    root, module = tmp_path_factory.mktemp("fitted") / "store", Reader().double()
    loader = DataLoader(Texts(40, seed=5), batch_size=10, shuffle=True, collate_fn=collate)
    snapshot = GradientSnapshot(root, "all", every_n_epochs=5, dtype="float64")
    quiet(max_epochs=10, callbacks=[snapshot]).fit(module, loader)
    return module, root, loader


def test_removals_are_trained_and_foretold(fitted: Any) -> None:
    module, root, loader = fitted
    influence = InfluenceModule(module, root, TracIn(), train_loader=loader)
    queries = [batch_of(Texts(6, seed=9))]
    before, state = {n: p.clone() for n, p in module.state_dict().items()}, torch.get_rng_state()
    removals = Removals(fraction=0.25, steps=8)
    found = compare_layers(influence, queries, removals=removals, layers=["embedding", "encoder.layers.*", "head"])
    assert all(torch.equal(before[n], p) for n, p in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert found.trained is not None and (found.trained.count, found.trained.size, found.trained.steps) == (16, 10, 8)
    assert found.whole.removals is not None and found.whole.removals.per_query.shape == (6,)
    assert found.whole.removals.low > 0  # short trainings by SGD are what TracIn foretells
    assert found.whole.deletion is not None and found.whole.deletion.mean > float(found.trained.changes.mean())
    again = compare_layers(influence, queries, removals=removals, layers=["head"])
    assert again.whole.removals is not None
    assert torch.equal(again.whole.removals.per_query, found.whole.removals.per_query)
    text = str(found)
    assert "16 random parts of 10 samples" in text and "m after deletion" in text
    figure, axes = found.plot()
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [one.name for one in found]
    figure.clf()


def test_a_truth_of_the_users_own_is_judged_by_rank_correlation(run: Run) -> None:
    parts = [torch.tensor(p) for p in ([0, 1], [2, 3], [4, 9], [5, 6], [13, 1])]
    scores = run.compared().whole.scores
    sums = torch.stack([scores[:, part].sum(1) for part in parts])  # (S, Q)
    truth = RemovalTruth(parts, sums**3)
    found = run.compared(removals=truth)
    assert found.whole.removals is not None and found.trained is None and found.whole.deletion is None
    assert found.whole.removals.per_query.tolist() == [pytest.approx(1.0)] * QUERIES
    assert found.whole.removals.low == pytest.approx(1.0)
    assert found.layers[0].removals is not None and found.layers[0].removals.mean < 1
    opposite = RemovalTruth(parts, -sums).agreement(scores)
    assert opposite.mean == pytest.approx(-1.0)
    noisy = RemovalTruth(parts, sums[torch.tensor([1, 0, 2, 4, 3])]).agreement(scores)
    assert noisy.low < noisy.mean < noisy.high


def test_shares_of_an_influence_function_sum_to_its_scores(fitted: Any) -> None:
    module, root, loader = fitted
    influence = InfluenceModule(module, root, InfluenceFunction(EKFAC()), train_loader=loader)
    queries = batch_of(Texts(4, seed=9))
    found = compare_layers(influence, [queries], flags=[i < 3 for i in range(40)])
    close(sum(layer.scores for layer in found.layers), influence.scores(queries))
    head = InfluenceModule(module, root, InfluenceFunction(EKFAC(), parameters="head.*"), train_loader=loader)
    close(found["head"].scores, head.scores(queries), 1e-8)
    assert found.whole.self_influence is not None
    close(found.whole.self_influence, influence.self_influence())


def test_the_table_and_the_picture(run: Run) -> None:
    found = run.compared(flags=FLAGS)
    lines = str(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [one.name for one in found]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert f"{found['head'].cancellation:.1f}" in lines[6]
    assert "3 flagged samples among all" in str(found)
    by_self = found["head"].found_by_self
    assert by_self is not None and 0 <= by_self.auroc_low <= by_self.auroc <= by_self.auroc_high <= 1
    assert f"{by_self.auroc:.3f} [{by_self.auroc_low:.3f}, {by_self.auroc_high:.3f}]" in lines[6]
    figure, ax = found.plot()
    reach = ax.containers[0].lines[2][0].get_segments()[list(found).index(found["head"])]
    assert reach[:, 1].tolist() == pytest.approx([by_self.auroc_low, by_self.auroc_high])
    figure.clf()
    bare, _ = run.compared().plot()
    assert len(bare.axes) == 2
    bare.clf()


def test_what_is_refused(run: Run) -> None:
    with pytest.raises(QueryError, match=r"no layer 'encoder\.layer\.0'") as caught:
        run.compared(layers=["encoder.layer.0"])
    assert "encoder.layers.0" in str(caught.value)
    for layers in ([], ["head", "head"]):
        with pytest.raises(QueryError, match="cannot be compared"):
            run.compared(layers=layers)
    for flags in (FLAGS[:-1], [True] * SAMPLES, [False] * SAMPLES, [1.0] * SAMPLES, [FLAGS]):
        with pytest.raises(QueryError, match="do not tell"):
            run.compared(flags=flags)
    for k in (0, SAMPLES + 1, 1.5):
        with pytest.raises(QueryError, match="k does not fit"):
            run.compared(k=k)
    with pytest.raises(QueryError, match="no query batches"):
        compare_layers(run.influence(), run.queries[0])
    with pytest.raises(QueryError, match="there are no training data"):
        compare_layers(run.influence(train_loader=None), run.queries, removals=Removals())
    with pytest.raises(QueryError, match="none of these layers"):
        compare_layers(run.influence(TracIn("head.*")), run.queries, layers=["embedding"])
    words = run.influence(BM25(lambda batch: [[1]] * len(batch["label"])))
    with pytest.raises(QueryError, match="within one run"):
        compare_layers(words, run.queries)


def test_an_earlier_run_is_not_asked_through_a_later_one(run: Run, tmp_path: Path) -> None:
    names = {name: name for name in all_names(run.module)}
    store = linked(run.stored(tmp_path / "fine"), run.store, names)
    later = run.influence(MultiStage(TracIn(), module=run.module, train_loader=loader_of(run.train)), store=store)
    with pytest.raises(QueryError, match="within one run"):
        compare_layers(later, run.queries)


def test_stores_without_gradients_are_refused(run: Run, tmp_path: Path) -> None:
    manifest = replace(manifest_of(run.module, run.train, "all", "replay", 5, "float64"), selected=())
    empty = ArtifactStore.create(tmp_path / "empty", manifest)
    at = run.store.checkpoints()[-1]
    empty.commit_checkpoint(at, empty.write_weights(at.step, at.mark, run.states[-1]))
    with pytest.raises(QueryError, match="as they were captured") as caught:
        compare_layers(run.influence(store=empty), run.queries)
    assert "no gradients" in str(caught.value)
    projection = RandomProjection(8, seed=1)
    store = run.stored(tmp_path / "projected", projection=projection)
    with pytest.raises(QueryError, match="as they were captured") as caught:
        compare_layers(run.influence(store=store), run.queries)
    assert "projected by" in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "shape"),
    [([[0], [1], [2]], (3, QUERIES)), ([[0], [1], [2], [3]], (4, 1)), ([[0], [1], [2], [SAMPLES]], (4, QUERIES))],
)
def test_truths_that_do_not_fit_are_refused(run: Run, parts: list[list[int]], shape: tuple[int, int]) -> None:
    truth = RemovalTruth([torch.tensor(part) for part in parts], torch.randn(shape))
    with pytest.raises(QueryError, match=r"do not belong|no training sample"):
        run.compared(removals=truth)


def test_constant_scores_have_no_interval_and_a_removal_that_diverged_is_refused() -> None:
    truth = RemovalTruth([torch.tensor([i]) for i in range(6)], torch.randn(6, 2, dtype=torch.float64))
    found = truth.agreement(torch.zeros(2, 6))
    assert all(math.isnan(value) for value in (found.mean, found.low, found.high))
    changes = truth.changes.clone()
    changes[1, 1] = math.nan
    with pytest.raises(QueryError, match="not finite"):
        RemovalTruth(truth.parts, changes).check(2, 6)
