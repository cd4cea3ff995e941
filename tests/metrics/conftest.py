"""Pictures without a screen, closed after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def pyplot() -> Iterator[object]:
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield plt
    plt.close("all")
    plt.switch_backend(before)
