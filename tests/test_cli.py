"""The command line over a store that is whole, damaged, torn, or not there: what it says, and its exit status."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from lightning_influence import ArtifactStore
from lightning_influence.cli import main
from tests.stores import Texts, classifier, group, replay_store, trajectory

ROOT = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    module = classifier()
    names = [name for name, _ in module.named_parameters()]
    made = replay_store(tmp_path / "store", module, Texts(), trajectory(module, 2), lambda c: [group(names, 0.25 * c)])
    ArtifactStore.resume(made.root, made.manifest, None).record("overhead", {"seconds": 1.5, "ratio": 0.25})
    return ArtifactStore.open(made.root)


def test_inspect(store, capsys):
    assert main(["inspect", str(store.root)]) == 0
    said = capsys.readouterr()
    assert not said.err
    for part in (
        f"{store.root}: replay",
        f"14 samples, fingerprint {store.manifest.dataset_fingerprint}",
        "tests.stores.Classifier, 5 parameters",
        "embedding.weight",
        "as float64",
        store.manifest.sign_convention,
        "ratio 0.25, seconds 1.5",
    ):
        assert part in said.out
    table = [line.split() for line in said.out.splitlines()[-2:]]
    assert [row[:4] for row in table] == [["10", "0", "0", "0"], ["20", "1", "0.125", "0.25"]]
    assert table[0][4:] == ["SGD", "of", "5", "parameters"]


def test_inspect_lists_curvatures(store, capsys):
    writer, at = ArtifactStore.resume(store.root, store.manifest, None), store.checkpoints()[-1]
    facts = {"name": "ekfac", "labels": "exact", "num_samples": 14, "parameters": ["head.weight", "head.bias"]}
    writer.commit(writer.write_curvature(at, "ekfac", {"0.eigenvalues": torch.ones(1, 2, 2)}, facts))
    assert main(["inspect", str(store.root)]) == 0
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.split() == ["step", "curvature", "labels", "samples", "MB", "parameters"]
    assert row.split() == ["20", "ekfac", "exact", "14", "0.0", "head.weight,", "head.bias"]


def test_verify_a_whole_store(store, capsys):
    assert main(["verify", str(store.root)]) == 0
    assert capsys.readouterr().out == f"{store.root}: no problems\n"


def test_verify_names_every_problem(store, capsys):
    first, second = (store.root / artifact.path for artifact in store.artifacts("gradients")[:2])
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    second.unlink()
    (store.root / "notes.txt").write_text("not ours")
    assert main(["verify", str(store.root)]) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert last == f"{store.root}: {len(problems)} problems"
    for path in (first, second, store.root / "notes.txt"):
        assert any(str(path.relative_to(store.root)) in problem for problem in problems)


def test_a_damaged_journal(store, capsys):
    """Every line but the last must be whole."""
    journal = store.root / "manifest-rank00000.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"{not a record\n", *lines[1:]]))
    assert main(["verify", str(store.root)]) in (1, 2)
    said = capsys.readouterr()
    assert journal.name in said.out + said.err
    assert main(["inspect", str(store.root)]) == 2
    assert "HINT" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_store(tmp_path, capsys, command):
    for folder in (tmp_path / "nothing", tmp_path):
        assert main([command, str(folder)]) == 2
        said = capsys.readouterr()
        assert not said.out and str(folder) in said.err and "expected:" in said.err and "HINT:" in said.err


def test_wrong_usage(capsys):
    for arguments in ([], ["inspect"], ["delete", "store"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert "usage: lightning-influence" in capsys.readouterr().err


def test_the_entry_point():
    wanted = re.search(r'^lightning-influence = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert wanted is not None and wanted.groups() == (main.__module__, main.__name__)
    for installed in entry_points(group="console_scripts", name="lightning-influence"):
        assert installed.load() is main
