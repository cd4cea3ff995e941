"""Over which labels a curvature is taken: all of them, sampled ones or those observed; as objectives to differentiate.

The Fisher information of a sample is the mean of ∇ℓ ∇ℓᵀ over labels that the model itself would give; for the losses
watched here it equals the generalised Gauss–Newton matrix Jᵀ H_z J, H_z the Hessian of the loss in its input z
(Martens 2020, 1412.1193). So each objective is linear in z, with a fixed seed s at z, and over the objectives of a
sample Σ s sᵀ = H_z, exactly or on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from lightning_influence.errors import LossError
from lightning_influence.objective.counted_random import normals, uniforms
from lightning_influence.objective.loss_call import LossCall
from lightning_influence.objective.training import Objective

Labels: TypeAlias = Literal["exact", "sampled", "observed"]

MOST_EXACT = 32  # columns for each sample up to which all labels are taken
_SOFTMAX = {"cross_entropy", "nll_loss"}


def label_objectives(
    module: LightningModule,
    batch: object,
    found: Objective,
    sample_ids: Tensor,
    labels: Labels | None,
    *,
    seed: int,
    draw: int,
) -> tuple[Labels, Iterator[Objective]]:
    """The objectives of a batch whose per-sample gradients' outer products sum to each sample's Fisher information.

    Args:
        found: the training objective of the batch, whose forward pass has just run with the graph kept.
        sample_ids: (N,), to which sampled labels belong.
        labels: `"exact"`: all columns of H_z, as many backward passes; `"sampled"`: one label of the model's own for
            each position; `"observed"`: the given labels (the empirical Fisher). `None` chooses by what does not change
            from batch to batch: exact for a class of at most 32 a sample and for at most 32 outputs without classes,
            else sampled (a class for every token); observed where the loss tells no distribution.
        seed, draw: of the sampled labels.

    Returns:
        The labels that were really taken, and the objectives.

    Raises:
        LossError: the labels that are asked for do not go with this loss.
    """
    n = len(sample_ids)
    distribution = getattr(module, "predictive_distribution", None)
    if labels == "observed":
        return "observed", iter([found])
    if callable(distribution):
        return _from_distribution(distribution(batch), n, labels, sample_ids, seed, draw)
    call = found.call if found.is_one_call else None
    if call is None:
        if labels is None:
            return "observed", iter([found])
        raise LossError(
            f'labels="{labels}" needs the model\'s predictive distribution, which this loss does not tell',
            expected="a loss that is one call of cross_entropy, nll_loss, binary_cross_entropy or mse_loss",
            found="a loss of its own or of several parts",
            hint="define `predictive_distribution(batch) -> torch.distributions.Distribution` on the module, or take "
            'labels="observed"',
        )
    columns = _columns(call, n)
    if labels is None:
        by_token = call.name in _SOFTMAX and (call.input.ndim > 2 or len(call.input) > n)
        labels = "exact" if columns <= MOST_EXACT and not by_token else "sampled"
    if labels == "exact":
        return "exact", _exact(call, n, columns)
    return "sampled", iter([_seeded(call.input, _sampled(call, n, sample_ids, seed, draw), n)])


def _columns(call: LossCall, n: int) -> int:
    """Columns of a square root of H_z of one sample."""
    return call.input.numel() // max(1, n)


def _seeded(z: Tensor, seed: Tensor, n: int) -> Objective:
    """⟨seed, z⟩, whose gradient at z is the seed; in units of one sample's loss."""
    total = (z.to(torch.promote_types(z.dtype, torch.float32)) * seed.detach().to(z.device)).sum()
    return Objective(total, torch.ones(n, device=z.device))


def _exact(call: LossCall, n: int, columns: int) -> Iterator[Objective]:
    """One column after the other: class by class and position by position."""
    if call.name in _SOFTMAX:
        root = torch.sqrt(_softmax_weight(call, n))  # (N', positions...)
        p = _probabilities(call)
        classes = p.shape[1]
        positions = columns // classes
        at = _position(call, n)  # (N', positions...)
        for t in range(positions):
            here = root * (at == t)
            for c in range(classes):
                direction = _towards(call, p, torch.full_like(p[:, :1], c, dtype=torch.int64))
                yield _seeded(call.input, direction * (p[:, c].sqrt() * here).unsqueeze(1), n)
        return
    root = torch.sqrt(_elementwise(call, n))
    at = torch.arange(columns, device=root.device).expand(n, columns).reshape(root.shape)
    for k in range(columns):
        yield _seeded(call.input, root * (at == k), n)


def _sampled(call: LossCall, n: int, sample_ids: Tensor, seed: int, draw: int) -> Tensor:
    """The gradient at z of the loss towards sampled labels, times the root of what each counts."""
    ids = sample_ids.to(call.input.device)
    if call.name in _SOFTMAX:
        p = _probabilities(call)
        weight = _softmax_weight(call, n)
        u = uniforms(seed, draw, ids, weight.numel() // n).reshape(weight.shape)
        y = _chosen(p.movedim(1, -1), u)  # (N', positions...)
        return _towards(call, p, y.unsqueeze(1)) * weight.sqrt().unsqueeze(1)
    curvature = _elementwise(call, n)
    count = curvature.numel() // n
    if call.name == "binary_cross_entropy_with_logits":
        p = call.input.detach().to(curvature).sigmoid()
        y = (uniforms(seed, draw, ids, count).reshape(p.shape) < p).to(p)
        noise = (p - y) / (p * (1 - p)).sqrt().clamp_min(torch.finfo(p.dtype).tiny)  # of mean 0 and variance 1
    else:
        noise = normals(seed, draw, ids, count).reshape(curvature.shape).to(curvature)
    return curvature.sqrt() * noise


def _probabilities(call: LossCall) -> Tensor:
    z = call.input.detach().to(torch.promote_types(call.input.dtype, torch.float32))
    return z.softmax(1) if call.name == "cross_entropy" else z.exp()


def _towards(call: LossCall, p: Tensor, y: Tensor) -> Tensor:
    """Gradient at z of -log p_y, shaped like p; y with a 1 in place of the classes."""
    chosen = torch.zeros_like(p).scatter_(1, y, 1.0)
    return p - chosen if call.name == "cross_entropy" else -chosen


def _position(call: LossCall, n: int) -> Tensor:
    """Number of each entry among those of its sample, (N', positions...)."""
    shape = call.input.shape[:1] + call.input.shape[2:]
    count = shape.numel() // n
    return torch.arange(count, device=call.input.device).expand(n, count).reshape(shape)


def _softmax_weight(call: LossCall, n: int) -> Tensor:
    """What each position counts in its sample's loss: class weight over mass, 0 for padding; (N', positions...)."""
    shape = call.input.shape[:1] + call.input.shape[2:]
    kind = torch.promote_types(call.input.dtype, torch.float32)
    target, weight = call.target, call.arguments.get("weight")
    smoothing = float(call.arguments.get("label_smoothing", 0.0))
    of_class: Tensor = call.input.new_ones(call.input.shape[1], dtype=kind) if weight is None else weight.to(kind)
    of_class = (1 - smoothing) * of_class + smoothing * of_class.mean()  # what a label of that class spreads over all
    if not target.is_floating_point():
        valid = target != call.arguments["ignore_index"]
        counts: Tensor = valid.to(kind) * of_class[torch.where(valid, target, 0)]
    else:
        counts = (target.to(kind).movedim(1, -1) * of_class).sum(-1)
    return (counts.reshape(n, -1) / _mass(call, n)[:, None]).reshape(shape)


def _elementwise(call: LossCall, n: int) -> Tensor:
    """Second derivative of the sample's loss in each entry of z, shaped like z."""
    if call.name == "l1_loss":
        raise LossError(
            "l1_loss has no curvature in its input",
            expected="a loss such as cross_entropy, binary_cross_entropy or mse_loss",
            found="a second derivative of 0 everywhere",
            hint='take labels="observed", or define `predictive_distribution(batch)` on the module',
        )
    kind = torch.promote_types(call.input.dtype, torch.float32)
    z = call.input.detach().to(kind).requires_grad_()
    if call.name == "binary_cross_entropy":  # the Fisher information of p: the second derivative depends on the label
        p, weight = z.detach(), call.arguments.get("weight")
        second = (1 if weight is None else weight.to(kind)) / (p * (1 - p)).clamp_min(torch.finfo(kind).tiny)
    else:
        with torch.enable_grad():
            first = torch.autograd.grad(call.with_input(z).elements().sum(), z, create_graph=True)[0]
            second = torch.autograd.grad(first.sum(), z)[0]
    return (second.detach().clamp_min(0).reshape(n, -1) / _mass(call, n)[:, None]).reshape(z.shape)


def _mass(call: LossCall, n: int) -> Tensor:
    """Denominator of every sample's own loss, (N,)."""
    if call.reduction == "sum":
        return torch.ones(n, device=call.input.device)
    mass = call.mass(n)
    return torch.where(mass > 0, mass, torch.inf)


def _from_distribution(
    predictive: Distribution,
    n: int,
    labels: Labels | None,
    sample_ids: Tensor,
    seed: int,
    draw: int,
) -> tuple[Labels, Iterator[Objective]]:
    """By `log_prob`: weighted over the support where it is small and finite, else of one sampled label."""
    support = predictive.enumerate_support(expand=True) if predictive.has_enumerate_support else None
    small = support is not None and support.shape[0] <= MOST_EXACT and predictive.batch_shape.numel() == n
    if labels == "exact" and not small:
        raise LossError(
            'labels="exact" needs a distribution with few values for each sample',
            expected=f"one whose support can be listed, of at most {MOST_EXACT} values",
            found=repr(predictive),
            hint='take labels="sampled"',
        )
    scale = torch.ones(n, device=sample_ids.device)

    def of(label: Tensor, weight: Tensor | None = None) -> Objective:
        log_probability = predictive.log_prob(label).reshape(n, -1).sum(1)
        weighted = log_probability if weight is None else log_probability * weight
        return Objective(-weighted.sum(), scale)

    if small and labels != "sampled":
        assert support is not None
        return "exact", (of(y, predictive.log_prob(y).detach().exp().sqrt().reshape(n)) for y in support)
    return "sampled", iter([of(_drawn(predictive, sample_ids, seed, draw))])


def _drawn(predictive: Distribution, sample_ids: Tensor, seed: int, draw: int) -> Tensor:
    """A label of every sample; of an unknown distribution they are drawn for the batch as a whole."""
    known, n = predictive, len(sample_ids)
    while isinstance(known, Independent):
        known = known.base_dist
    if isinstance(known, Categorical):
        p = known.probs.detach()
        return _chosen(p, uniforms(seed, draw, sample_ids, p[..., 0].numel() // n).reshape(p.shape[:-1]))
    if isinstance(known, Bernoulli):
        p = known.probs.detach()
        return (uniforms(seed, draw, sample_ids, p.numel() // n).reshape(p.shape) < p).to(p)
    if isinstance(known, Normal):
        noise = normals(seed, draw, sample_ids, known.loc.numel() // n).reshape(known.loc.shape)
        return (known.loc + known.scale * noise.to(known.loc)).detach()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(uniforms(seed, draw, sample_ids[:1].cpu(), 1).sum() * 2**52))
        return predictive.sample()


def _chosen(p: Tensor, u: Tensor) -> Tensor:
    """Classes that numbers u (...) in (0, 1) choose of p (..., C)."""
    return (p.double().cumsum(-1) < u.unsqueeze(-1)).sum(-1).clamp_max(p.shape[-1] - 1)
