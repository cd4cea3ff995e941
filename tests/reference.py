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


# Curvature by its formulas: one plain backward for every label of every sample, matrices over parameters end to end.

Terms = Callable[
    [Any, Any], Iterable[tuple[float, Tensor]]
]  # (module, batch of one) -> weights and losses of its labels


def label_gradients(
    module: nn.Module, terms: Terms, samples: Sequence[Any], names: Sequence[str]
) -> list[list[tuple[float, Tensor]]]:
    """For every sample and every label its weight and its gradient (P,)."""
    copied = copy.deepcopy(module).double()
    wanted = [dict(copied.named_parameters())[name].requires_grad_() for name in names]
    found = []
    for sample in samples:
        rows = []
        for weight, loss in terms(copied, doubled(sample)):
            gradients = torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, gradients, strict=True)]
            rows.append((float(weight), torch.cat([part.detach().flatten() for part in parts])))
        found.append(rows)
    return found


def fisher(module: nn.Module, terms: Terms, samples: Sequence[Any], names: Sequence[str]) -> Tensor:
    """sum over the labels of w g gᵀ for every sample, (N, P, P)."""
    found = label_gradients(module, terms, samples, names)
    return torch.stack([sum((w * torch.outer(g, g) for w, g in rows), torch.zeros(())) for rows in found])


def gauss_newton(
    module: nn.Module,
    predictions: Callable[[nn.Module, Any], Tensor],
    loss: Callable[[Tensor, Any], Tensor],
    samples: Sequence[Any],
    names: Sequence[str],
) -> Tensor:
    """Jᵀ H_z J of the loss of every sample alone, (N, P, P), by torch.autograd.functional."""
    copied = copy.deepcopy(module).double()
    start = tuple(dict(copied.named_parameters())[name].detach().clone() for name in names)
    matrices = []
    for sample in map(doubled, samples):

        def z(*values: Tensor, sample: Any = sample) -> Tensor:
            inner = _Predictions(copied, predictions)
            swapped = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(inner, swapped, (sample,))

        def of_z(value: Tensor, sample: Any = sample) -> Tensor:
            return loss(value, sample)

        here = z(*start).detach()
        jacobian = torch.cat([j.reshape(here.numel(), -1) for j in torch.autograd.functional.jacobian(z, start)], dim=1)
        curvature = torch.autograd.functional.hessian(of_z, here).reshape(here.numel(), -1)
        matrices.append(jacobian.T @ curvature @ jacobian)
    return torch.stack(matrices)


class _Predictions(nn.Module):
    """A module whose forward is a function of another module."""

    def __init__(self, module: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, sample: Any) -> Tensor:
        return self.function(self.module, sample)


def kronecker_factors(
    module: nn.Module, layers: Sequence[str], terms: Terms, samples: Sequence[Any], *, bias: bool
) -> tuple[Tensor, Tensor]:
    """A = mean of a aᵀ over the positions that have a gradient under some label, (G, I, I), with 1 appended to a for a
    bias; G = (1/N) Σ over samples, labels and positions of w g gᵀ, (G, O, O).

    Args:
        layers: names of the layers that use the weight; the positions of all their calls count.
    """
    copied = copy.deepcopy(module).double()
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        copied.get_submodule(layer).register_forward_hook(lambda m, args, out: calls.append((m, args[0], out)))
        for layer in layers
    ]
    inputs: Any = 0.0
    outputs: Any = 0.0
    count = 0
    for sample in map(doubled, samples):
        calls.clear()
        seen, reached = [], []
        for weight, loss in terms(copied, sample):
            here = []
            for layer, _, out in calls:
                (gradient,) = torch.autograd.grad(loss, out, retain_graph=True)
                here.append(_output_positions(layer, gradient.detach()))
            g = torch.cat(here, 1)  # (G, T, O)
            outputs = outputs + float(weight) * g.transpose(1, 2) @ g
            reached.append((g != 0).any(2))
        for layer, x, _ in calls:
            a = _input_positions(layer, x.detach())
            seen.append(torch.cat([a, torch.ones(*a.shape[:2], 1)], 2) if bias else a)
        a = torch.cat(seen, 1) * torch.stack(reached).any(0).unsqueeze(2)
        inputs = inputs + a.transpose(1, 2) @ a
        count = count + torch.stack(reached).any(0).sum(1).view(-1, 1, 1)
    for handle in handles:
        handle.remove()
    return inputs / count, outputs / len(samples)


def _input_positions(layer: nn.Module, x: Tensor) -> Tensor:
    """What the weight multiplies at each position of a batch of one, (G, T, I)."""
    if isinstance(layer, nn.Conv2d):
        windows = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (1, CK, L)
        return torch.stack(windows[0].T.chunk(layer.groups, 1))
    return x.reshape(1, -1, x.shape[-1])


def _output_positions(layer: nn.Module, g: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return torch.stack(g[0].flatten(1).T.chunk(layer.groups, 1))
    return g.reshape(1, -1, g.shape[-1])


def kronecker_matrix(
    a: Tensor,
    g: Tensor,
    weight: Tensor,
    gradients: Sequence[Sequence[tuple[float, Tensor]]] | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """K-FAC's A ⊗ G of one weight (and its bias after it, if A is that much larger), (P, P); with the gradients of
    `label_gradients` EK-FAC's, whose eigenvalues are (1/N) Σ w (Q_Gᵀ ∇W Q_A)².

    Args:
        transposed: the weight is kept as (inputs, outputs).
    """
    groups, outputs, inputs = len(a), g.shape[1], a.shape[1]
    places = torch.arange(weight.numel()).view(weight.shape)
    places = (places.T if transposed else places).reshape(groups, outputs, -1)
    if inputs > places.shape[2]:
        places = torch.cat([places, weight.numel() + torch.arange(groups * outputs).view(groups, outputs, 1)], 2)
    whole = torch.zeros(places.numel(), places.numel(), dtype=torch.float64)
    for k in range(groups):
        of_a, q_a = torch.linalg.eigh(a[k])
        of_g, q_g = torch.linalg.eigh(g[k])
        eigenvalues = torch.outer(of_g, of_a)
        if gradients is not None:
            eigenvalues = torch.zeros(outputs, inputs, dtype=torch.float64)
            for rows in gradients:
                for w, gradient in rows:
                    eigenvalues += w * (q_g.T @ gradient[places[k]] @ q_a) ** 2 / len(gradients)
        basis = torch.kron(q_g, q_a)  # rows by (o, i)
        at = places[k].flatten()
        whole[at[:, None], at] = (basis * eigenvalues.flatten()) @ basis.T
    return whole


def look_up_matrix(
    rows: Sequence[Sequence[tuple[float, Tensor]]], words: int, width: int, *, corrected: bool
) -> Tensor:
    """The same for an embedding (V, D): A the frequencies of words among samples, as far as a gradient reaches them; a
    word's places in a sample are one position, with their gradients summed. (VD, VD)."""
    counts, g = torch.zeros(words, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for labels in rows:
        tables = [gradient.view(words, width) for _, gradient in labels]
        counts += torch.stack([(table != 0).any(1) for table in tables]).any(0)
        for (w, _), table in zip(labels, tables, strict=True):
            g += w * table.T @ table / len(rows)
    of_g, q_g = torch.linalg.eigh(g)
    eigenvalues = torch.outer(counts / counts.sum(), of_g)
    if corrected:
        squares = [w * (gradient.view(words, width) @ q_g) ** 2 for labels in rows for w, gradient in labels]
        eigenvalues = torch.stack(squares).sum(0) / len(rows)
    return torch.block_diag(*[(q_g * values) @ q_g.T for values in eigenvalues])


def influence(query: Tensor, train: Tensor, curvature: Tensor, damping: float) -> Tensor:
    """gᵀ (H + λI)⁻¹ g for every query (Q, P) and sample (N, P)."""
    damped = curvature + damping * torch.eye(len(curvature), dtype=torch.float64)
    return query @ torch.linalg.solve(damped, train.T)


def generalized_change(hessian: Tensor, g: Tensor, inside: Tensor) -> Tensor:
    """argmin ‖H[:, K] δ − g‖ for every gradient (Q, P), zero outside K; `inside` (P,) says what is in K."""
    change = torch.zeros_like(g)
    change[:, inside] = torch.linalg.lstsq(hessian[:, inside], g.T, driver="gelsd").solution.T
    return change


def freezing_change(hessian: Tensor, g: Tensor, inside: Tensor) -> Tensor:
    """H[K, K]⁻¹ g_K, zero outside K."""
    change = torch.zeros_like(g)
    change[:, inside] = torch.linalg.solve(hessian[inside][:, inside], g[:, inside].T).T
    return change


def projected_change(hessian: Tensor, g: Tensor, inside: Tensor) -> Tensor:
    """[H⁻¹ g]_K, zero outside K."""
    return torch.linalg.solve(hessian, g.T).T * inside


def generalized_transform(hessian: Tensor, inside: Tensor) -> Tensor:
    """T = H[:, K] (H[K, :] H[:, K])⁻¹ of the K part of a vector, (P, P): `generalized_change` transposed."""
    columns, transform = hessian[:, inside], torch.zeros_like(hessian)
    transform[:, inside] = columns @ torch.linalg.inv(columns.T @ columns)
    return transform


def freezing_transform(hessian: Tensor, inside: Tensor) -> Tensor:
    """T = H[K, K]⁻¹, zero outside K, (P, P)."""
    transform = torch.zeros_like(hessian)
    transform[torch.outer(inside, inside)] = torch.linalg.inv(hessian[inside][:, inside]).flatten()
    return transform


def projected_transform(hessian: Tensor, inside: Tensor) -> Tensor:
    """T = H⁻¹ of the K part of a vector, (P, P)."""
    return torch.linalg.inv(hessian) * inside


def logistic_regression(
    x: Tensor, y: Tensor, decay: float, weights: Tensor | None = None, classes: int = 3, start: Tensor | None = None
) -> Tensor:
    """argmin of (1/N) Σ w_n ℓ_n + decay/2 |θ|² by Newton's method, θ (C, I + 1) with the biases last; leaving a sample
    out keeps the 1/N."""
    n = len(x)
    a = torch.cat([x, torch.ones(n, 1)], 1)
    weights = torch.ones(n) if weights is None else weights
    theta = torch.zeros(classes, a.shape[1], dtype=torch.float64) if start is None else start.clone()
    for _ in range(100):
        p = (a @ theta.T).softmax(1)
        error = (p - nn.functional.one_hot(y, classes)) * weights[:, None]
        gradient = (error.T @ a / n + decay * theta).flatten()
        if float(gradient.norm()) < 1e-13:
            return theta
        blocks = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        hessian = torch.einsum("n,noq,ni,nj->oiqj", weights.double(), blocks, a, a).reshape(2 * [theta.numel()]) / n
        hessian += decay * torch.eye(len(hessian), dtype=torch.float64)
        theta = theta - torch.linalg.solve(hessian, gradient).view_as(theta)
    raise AssertionError("Newton's method did not converge")
