"""The examples in docstrings run: every module of the package that has one is a test."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import lightning_influence

MODULES = [info.name for info in pkgutil.walk_packages(lightning_influence.__path__, "lightning_influence.")]


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in doctest.DocTestFinder().find(module, name) if test.examples]


FOUND = [test for name in ["lightning_influence", *MODULES] if not name.endswith("__main__") for test in examples(name)]


@pytest.mark.parametrize("example", FOUND, ids=lambda example: example.name)
def test_the_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    failed = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=said.append).failed
    assert not failed, "".join(said)


def test_there_are_examples():
    assert len(FOUND) >= 5
