"""Scores on disk: a run that is killed in the middle of a record goes on, and other queries are refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_influence import InfluenceModule, QueryError, StoreError, TracIn, TracInLast
from lightning_influence.streaming import score_file, stream
from tests.stores import quiet
from tests.streaming.models import QUERIES, SAMPLES, Case, close, table


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("mlp", tmp_path_factory.mktemp("scores") / "store")


def prepared(mlp: Case, path: Path, estimator: Any = None, asked: Any = None, **options: Any) -> InfluenceModule:
    influence = mlp.influence(estimator or TracIn(), **options)
    influence.prepare(mlp.loader(asked or mlp.asked, 2), scores_file=path)
    return influence


def test_all_scores_are_kept(tmp_path, mlp):
    path = tmp_path / "deep" / "scores.safetensors"
    influence = prepared(mlp, path)
    with pytest.raises(StoreError, match="no finished scores"):
        influence.streamed_scores  # noqa: B018
    found = mlp.streamed(influence, mlp.loader(mlp.train, 3))
    stored = influence.scores(mlp.batch(mlp.asked))
    assert influence.streamed_scores.dtype == torch.float32
    close(influence.streamed_scores.double(), stored, 1e-6)
    assert torch.equal(load_file(path)["scores"], influence.streamed_scores)
    assert torch.equal(found, influence.streamed_scores) and os.listdir(path.parent) == [path.name]


def test_a_part_and_then_the_rest(tmp_path, mlp, monkeypatch):
    path = tmp_path / "scores.safetensors"
    influence = prepared(mlp, path, k=2)
    quiet(limit_predict_batches=2).predict(influence, mlp.loader(mlp.train, 3))
    some = influence.streamed_scores
    assert some[:, :6].isfinite().all() and some[:, 6:].isnan().all()
    sizes = count_batches(monkeypatch)
    influence = prepared(mlp, path)
    found = mlp.streamed(influence, mlp.loader(mlp.train, 4))  # other batches
    assert sizes == [4, 4, 4, 2], "the first is scored again to see that nothing else has changed"
    assert torch.equal(found, influence.streamed_scores) and torch.equal(found[:, :6], some[:, :6])
    sizes.clear()
    influence = prepared(mlp, path, k=3)
    quiet().predict(influence, mlp.loader(mlp.train, 4))
    assert sizes == [4] and torch.equal(influence.attribution.proponents.scores, found.sort(descending=True)[0][:, :3])


@pytest.mark.parametrize("records", [0, 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_killed_run_goes_on(tmp_path, mlp, monkeypatch, records, share):
    """Killed while record number `records` was being written, of which a share has reached the file."""
    path = tmp_path / "scores.safetensors"
    child = os.fork()
    if child == 0:
        try:
            written, write_all = [], score_file.write_all

            def write(file: Any, data: memoryview) -> None:
                written.append(len(data))
                if len(written) == records + 2:  # the first is the head
                    write_all(file, data[: int(share * len(data))])
                    os.kill(os.getpid(), signal.SIGKILL)
                write_all(file, data)

            score_file.write_all = write
            quiet().predict(prepared(mlp, path), mlp.loader(mlp.train, 3))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not path.exists()
    sizes = count_batches(monkeypatch)
    influence = prepared(mlp, path)
    quiet().predict(influence, mlp.loader(mlp.train, 3))
    whole = records + (share == 1.0)
    assert len(sizes) == 5 - whole + (whole > 0)
    through = prepared(mlp, tmp_path / "through.safetensors")
    quiet().predict(through, mlp.loader(mlp.train, 3))
    assert torch.equal(influence.streamed_scores, through.streamed_scores)
    assert torch.equal(table(influence), table(through))
    assert torch.equal(influence.attribution.opponents.sample_ids, through.attribution.opponents.sample_ids)


def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are scored at the first checkpoint."""
    sizes: list[int] = []
    score = stream.batch_scores

    def counted(module: Any, selection: Any, part: Any, size: int, *args: Any) -> Any:
        if part.at.step == 10:
            sizes.append(size)
        return score(module, selection, part, size, *args)

    monkeypatch.setattr(stream, "batch_scores", counted)
    return sizes


def test_scores_of_something_else(tmp_path, mlp):
    path = tmp_path / "scores.safetensors"
    quiet(limit_predict_batches=2).predict(prepared(mlp, path, k=1), mlp.loader(mlp.train, 3))
    others = (
        prepared(mlp, path, TracInLast()),
        prepared(mlp, path, asked=mlp.train),
        prepared(mlp, path, measurement="margin"),
    )
    before = path.read_bytes()
    for other in others:
        with pytest.raises(QueryError, match="scores of something else") as refused:
            quiet().predict(other, mlp.loader(mlp.train, 3))
        assert "scores_file" in refused.value.hint
    assert path.read_bytes() == before


def test_a_measurement_that_was_changed_behind_its_name(tmp_path, mlp):
    path = tmp_path / "scores.safetensors"

    def measured(sign: float) -> Any:
        def margin(module: Any, batch: Any) -> Any:
            return sign * module(batch[0])[:, 0]

        return margin

    loader = mlp.loader(mlp.train, 3)
    quiet(limit_predict_batches=2).predict(prepared(mlp, path, k=1, measurement=measured(1.0)), loader)
    quiet(limit_predict_batches=3).predict(prepared(mlp, path, k=1, measurement=measured(1.0)), loader)
    with pytest.raises(QueryError, match="not those of these queries"):
        quiet().predict(prepared(mlp, path, k=1, measurement=measured(-1.0)), loader)


def test_files_that_are_no_scores(tmp_path, mlp, monkeypatch):
    wrong, other = tmp_path / "wrong.safetensors", tmp_path / "other.safetensors"
    wrong.write_bytes(b"text")
    save_file({"values": torch.zeros(2)}, other)
    for path in (wrong, other):
        with pytest.raises(StoreError, match="no finished scores"):
            quiet().predict(prepared(mlp, path), mlp.loader(mlp.train))
    monkeypatch.setattr(score_file, "free_bytes", lambda path: 8 * QUERIES * SAMPLES - 1)
    with pytest.raises(StoreError, match="too little space"):
        quiet().predict(prepared(mlp, tmp_path / "new.safetensors"), mlp.loader(mlp.train))
