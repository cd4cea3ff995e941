"""Who listens: what is attached to a training batch hears nothing of a model that is run on the side meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0


def depth() -> int:
    """How many runs on the side are nested now; a listener hears only what happens at the depth where it was put up."""
    return _depth


@contextmanager
def on_the_side() -> Iterator[None]:
    """Run a model so that captures and watches put up outside of the block do not notice."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
