"""The slow and obvious truth that the library is compared with: everything one sample at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def doubled(value: Any) -> Any:
    """The same structure with every floating-point tensor in float64."""
    return tree_map(lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def per_sample_gradients(
    module: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    samples: Sequence[Any],
    names: Iterable[str] | None = None,
) -> dict[str, Tensor]:
    """The gradient of every sample's own loss, from one plain forward and backward per sample.

    Args:
        module: left as it is; a float64 copy in the same mode is differentiated.
        loss_fn: (module, batch of one) -> scalar.
        samples: batches of one.
        names: full parameter names; default all. Frozen ones are differentiated too.

    Returns:
        name -> (N, *parameter shape), zeros where the loss does not depend on the parameter.
    """
    copied = copy.deepcopy(module).double()
    parameters = dict(copied.named_parameters())
    wanted = {name: parameters[name].requires_grad_() for name in (names if names is not None else parameters)}
    rows: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for sample in samples:
        with torch.enable_grad():
            loss = loss_fn(copied, doubled(sample))
        for parameter in copied.parameters():
            parameter.grad = None
        loss.backward()
        for name, parameter in wanted.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            rows[name].append((grad.to_dense() if grad.is_sparse else grad).detach().clone())
    return {name: torch.stack(found) for name, found in rows.items()}


# Attribution by its formulas: explicit loops over queries, samples and words, float64.

State = dict[str, Tensor]
Rates = dict[str, float]
Loss = Callable[[Any, Any], Tensor]


def at(module: nn.Module, state: State) -> nn.Module:
    """A copy of the module with other weights."""
    copied = copy.deepcopy(module).double()
    copied.load_state_dict({name: value.double() for name, value in state.items()})
    return copied


def tracin(
    module: nn.Module,
    loss_fn: Loss,
    checkpoints: Sequence[tuple[State, Rates]],
    samples: Sequence[Any],
    queries: Sequence[Any],
    denominators: Sequence[State] | None = None,
) -> Tensor:
    """sum_c sum_p eta_c(p) <grad_p m(q; theta_c) / d_c(p), grad_p l(z; theta_c)>, (Q, N); the rates name the p."""
    scores = torch.zeros(len(queries), len(samples), dtype=torch.float64)
    for c, (state, rates) in enumerate(checkpoints):
        train = per_sample_gradients(at(module, state), loss_fn, samples, rates)
        query = per_sample_gradients(at(module, state), loss_fn, queries, rates)
        for q in range(len(queries)):
            for z in range(len(samples)):
                for name, rate in rates.items():
                    g = query[name][q] if denominators is None else query[name][q] / denominators[c][name].double()
                    scores[q, z] += rate * (g * train[name][z]).sum()
    return scores


def in_flight_tracin(
    module: nn.Module,
    loss_fn: Loss,
    checkpoints: Sequence[tuple[int, State]],
    records: Sequence[tuple[int, int, State, Rates, float]],
    samples: Sequence[Any],
    queries: Sequence[Any],
) -> Tensor:
    """sum_t eta_t / B_t <grad m(q; theta_c(t)), grad l(z; w_t)>, c(t) the last checkpoint before step t, (Q, N).

    Args:
        checkpoints: (step, weights).
        records: (step t, sample id, w_t, eta_t by parameter, B_t), one for each time that a sample was trained on.
    """
    scores = torch.zeros(len(queries), len(samples), dtype=torch.float64)
    for step, z, state, rates, size in records:
        before = [weights for saved, weights in checkpoints if saved < step][-1]
        query = per_sample_gradients(at(module, before), loss_fn, queries, rates)
        train = per_sample_gradients(at(module, state), loss_fn, [samples[z]], rates)
        for q in range(len(queries)):
            for name, rate in rates.items():
                scores[q, z] += rate / size * (query[name][q] * train[name][0]).sum()
    return scores


def tracin_we(
    module: nn.Module,
    loss_fn: Loss,
    checkpoints: Sequence[tuple[State, float]],
    samples: Sequence[Any],
    queries: Sequence[Any],
    tokens: Callable[[Any], Sequence[int]],
    name: str,
    *,
    exclude: Sequence[int] = (),
    top_words: int | None = None,
    synonyms: float | None = None,
) -> list[list[dict[tuple[int, int], float]]]:
    """For each query and sample: (word of the query, word of the sample) -> contribution; their sum is the score."""
    found: list[list[dict[tuple[int, int], float]]] = [[{} for _ in samples] for _ in queries]
    embedding = checkpoints[-1][0][name].double()
    for state, rate in checkpoints:
        train = per_sample_gradients(at(module, state), loss_fn, samples, [name])[name]
        query = per_sample_gradients(at(module, state), loss_fn, queries, [name])[name]
        theirs = [kept_words(g, tokens(s), exclude, top_words) for g, s in zip(train, samples, strict=True)]
        mine = [kept_words(g, tokens(s), exclude, top_words) for g, s in zip(query, queries, strict=True)]
        for q in range(len(queries)):
            for z in range(len(samples)):
                pairs = [(w, w) for w in mine[q] if w in theirs[z]]
                if synonyms is not None:
                    pairs += synonym_pairs(mine[q], theirs[z], embedding, synonyms)
                for w, v in pairs:
                    score = rate * float(query[q][w] @ train[z][v])
                    found[q][z][w, v] = found[q][z].get((w, v), 0.0) + score
    return found


def kept_words(gradient: Tensor, tokens: Sequence[int], exclude: Sequence[int], top_words: int | None) -> list[int]:
    """The words of a text, padding (0) and excluded ones left out, those with the largest gradients first."""
    words = sorted({t for t in tokens if t != 0} - set(exclude), key=lambda w: (-float(gradient[w].norm()), w))
    return words if top_words is None else words[:top_words]


def synonym_pairs(
    mine: Sequence[int], theirs: Sequence[int], embedding: Tensor, threshold: float
) -> list[tuple[int, int]]:
    """Greedy: of the words without an equal in the other text, always the closest free pair above the threshold."""
    unit = embedding / embedding.norm(dim=1, keepdim=True).clamp_min(1e-12)
    free = sorted(
        (-float(unit[w] @ unit[v]), w, v)
        for w in set(mine) - set(theirs)
        for v in set(theirs) - set(mine)
        if float(unit[w] @ unit[v]) >= threshold
    )
    pairs: list[tuple[int, int]] = []
    for _, w, v in free:
        if all(w != a and v != b for a, b in pairs):
            pairs.append((w, v))
    return pairs
