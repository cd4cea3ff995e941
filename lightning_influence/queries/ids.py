"""Which training samples a question names: a table, some for each query, or one or several sets."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from lightning_influence.errors import QueryError


def table_of_ids(sample_ids: Tensor | Sequence[Sequence[int]], num_queries: int) -> Tensor:
    """(Q, k) int64 on the CPU."""
    try:
        ids = torch.as_tensor(sample_ids).cpu()
        found = f"shape {tuple(ids.shape)} and {ids.dtype}"
    except (TypeError, ValueError, RuntimeError) as error:  # rows of different lengths, text
        ids, found = torch.zeros(0), f"{type(error).__name__}: {error}"
    if ids.ndim != 2 or len(ids) != num_queries or ids.is_floating_point() or ids.dtype == torch.bool:
        raise QueryError(
            "sample_ids must name some samples for each query",
            expected=f"integers of shape ({num_queries}, k)",
            found=found,
            hint="pass attribution.proponents.sample_ids of the same batch",
        )
    return ids.long()


def sets_of_ids(sample_ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> tuple[bool, list[Tensor]]:
    """Whether one set of samples is given, and every set, (k,) int64 on the CPU.

    Raises:
        QueryError: something else than integers.
    """
    try:
        each = list(sample_ids)
        one = all(isinstance(i, Integral) or (isinstance(i, Tensor) and i.ndim == 0) for i in each)
        sets = [torch.as_tensor(ids).cpu().reshape(-1) for ids in ([each] if one else each)]
        kinds = [ids.dtype for ids in sets if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)]
        found = f"numbers of type {kinds[0]}" if kinds else None
    except (TypeError, ValueError, RuntimeError) as error:  # a single number, text, sets within sets
        one, sets, found = False, [], f"{type(error).__name__}: {error}"
    if found is not None:
        raise QueryError(
            "sample_ids must name training samples",
            expected="a set of integers, or several sets",
            found=found,
            hint="write predict_removal(batch, [3, 17]), or [[3, 17], [5]] for two removals; of a mask take "
            "mask.nonzero().flatten()",
        )
    return one, [ids.long() for ids in sets]
