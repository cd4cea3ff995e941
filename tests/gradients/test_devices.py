"""Queries on an accelerator meet training gradients that were read from the disk into main memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lightning_influence.gradients import Dense, Factored, GradientBlock, LowRankGradients, Rows
from tests.pretended_device import ELSEWHERE, PretendedDevice

BLOCKS: dict[str, Callable[[], GradientBlock]] = {
    "dense": lambda: Dense(torch.randn(3, 4, 5)),
    "one position": lambda: Factored(torch.randn(3, 1, 5), torch.randn(3, 1, 4)),
    "positions": lambda: Factored(torch.randn(3, 2, 5), torch.randn(3, 2, 4)),
    "groups": lambda: Factored(torch.randn(3, 2, 10), torch.randn(3, 2, 4), groups=2),
    "rows": lambda: Rows.from_tokens(torch.randint(0, 4, (3, 6)), torch.randn(3, 6, 5), num_words=4),
    "low rank": lambda: LowRankGradients(torch.randn(3, 2, 4), torch.randn(3, 2, 5)),
}
STORED = [name for name in BLOCKS if name != "low rank"]


@pytest.mark.parametrize("query", BLOCKS)
@pytest.mark.parametrize("train", STORED)
def test_products_are_where_the_query_is(train: str, query: str) -> None:
    torch.manual_seed(0)
    stored, asked = BLOCKS[train](), BLOCKS[query]()
    expected = stored.inner(asked)
    with PretendedDevice(), torch.no_grad():
        found = stored.inner(asked.to(device=ELSEWHERE))
        assert found.device == ELSEWHERE
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_pretended_device_refuses_to_mix() -> None:
    with PretendedDevice(), torch.no_grad():
        there = torch.ones(2, 2).to(ELSEWHERE)
        with pytest.raises(RuntimeError, match="both devices"):
            there @ torch.ones(2, 2)
