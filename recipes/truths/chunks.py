"""Some models trained as the recipe says: many side by side, or one in torch's own way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from recipes.truths.samples import Samples
from recipes.truths.training import Recipe

Part = tuple[Tensor, Tensor]  # the indices (n,) that a model is trained on, and their weights (n,)
State = dict[str, Tensor]  # of many models, (M, *shape)


@dataclass(frozen=True)
class Run:
    """One model to train.

    Args:
        subset: the indices (n,) that it is trained on.
        weights: of these samples (n,).
        seed: of the batches.
    """

    subset: Tensor
    weights: Tensor
    seed: int


class Batches:
    """The batches of every model of a chunk, side by side: shorter ones are filled up with samples of weight 0."""

    def __init__(self, recipe: Recipe, parts: Sequence[Part]) -> None:
        self.recipe = recipe
        self.parts = parts
        self.steps = max(-(-len(subset) // recipe.batch_size) for subset, _ in parts)
        self.even = len({len(subset) for subset, _ in parts}) == 1

    def epoch(self, orders: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Indices and weights (steps, M, B), each weight over the batch's size, and which models step (steps, M)."""
        size = self.recipe.batch_size
        indices = torch.zeros(len(self.parts), self.steps * size, dtype=torch.long)
        shares = torch.zeros(len(self.parts), self.steps * size, dtype=torch.float64)
        counts = torch.zeros(len(self.parts), self.steps * size)
        for model, ((subset, weight), order) in enumerate(zip(self.parts, orders, strict=True)):
            indices[model, : len(subset)] = subset[order]
            shares[model, : len(subset)] = weight[order].double()
            counts[model, : len(subset)] = 1
        shape = len(self.parts), self.steps, size
        sizes = counts.view(shape).sum(2)  # (M, steps)
        shares = shares.view(shape) / sizes.clamp(min=1).unsqueeze(2)
        return indices.view(shape).transpose(0, 1), shares.transpose(0, 1), (sizes > 0).t()


def train_chunk(
    models: Sequence[nn.Module], recipe: Recipe, train: Samples, runs: Sequence[Run], after_epoch: Callable[[], object]
) -> None:
    """Train models in place; one alone takes torch's own steps, which is faster where the parameters are many.

    Raises:
        ValueError: the models draw random numbers, or write into buffers, or differ in buffers.
    """
    check_models(models, train.inputs_of(runs[0].subset[:2]))
    buffers = {name: value.clone() for name, value in models[0].named_buffers()}
    if len(models) == 1:
        _train_alone(models[0], recipe, train, runs[0], after_epoch)
    else:
        _train_together(models, recipe, train, runs, after_epoch)
    _check_constant(models[0], buffers)


def _train_alone(model: nn.Module, recipe: Recipe, train: Samples, run: Run, after_epoch: Callable[[], object]) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay,
        fused=True,
    )  # fmt: skip
    for order in recipe.orders(len(run.subset), run.seed):
        for places in torch.split(order, recipe.batch_size):
            batch = run.subset[places]
            optimizer.zero_grad()
            losses = F.cross_entropy(model(train.inputs_of(batch)), train.labels[batch], reduction="none")
            shares = (run.weights[places].double() / len(places)).to(losses.dtype)
            (losses * shares).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after_epoch()


def _train_together(
    models: Sequence[nn.Module], recipe: Recipe, train: Samples, runs: Sequence[Run], after_epoch: Callable[[], object]
) -> None:
    model = models[0]
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    stacked = {name: _stacked(models, name) for name, _ in model.named_parameters()}
    parameters = {name: stacked[name] for name in trained}
    fixed = {name: value for name, value in stacked.items() if name not in parameters}
    velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
    values, velocities = list(parameters.values()), list(velocity.values())
    batches = Batches(recipe, [(run.subset, run.weights) for run in runs])

    def loss(own: State, held: State, inputs: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        logits = functional_call(model, {**own, **held}, (inputs,))
        return (F.cross_entropy(logits, labels, reduction="none") * shares.to(logits.dtype)).sum()

    gradients = vmap(grad(loss))
    for orders in zip(*(recipe.orders(len(run.subset), run.seed) for run in runs), strict=True):
        for indices, shares, active in zip(*batches.epoch(orders), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the faster kernels of attention cannot be batched over models
                found = gradients(parameters, fixed, train.inputs_of(indices), train.labels[indices], shares)
            steps = [found[name] for name in trained]
            if recipe.weight_decay:
                torch._foreach_add_(steps, values, alpha=recipe.weight_decay)
            if batches.even:
                torch._foreach_mul_(velocities, recipe.momentum)
                torch._foreach_add_(velocities, steps)
                torch._foreach_add_(values, velocities, alpha=-recipe.learning_rate)
                continue
            for value, speed, step in zip(values, velocities, steps, strict=True):
                moves = active.view(-1, *(1,) * (value.dim() - 1))  # a model without a batch rests
                speed.copy_(torch.where(moves, speed * recipe.momentum + step, speed))
                value.sub_(speed * moves, alpha=recipe.learning_rate)
        after_epoch()
    with torch.no_grad():
        for name, value in parameters.items():
            for each, own in zip(models, value, strict=True):
                each.get_parameter(name).copy_(own)


def _stacked(models: Sequence[nn.Module], name: str) -> Tensor:
    return torch.stack([model.get_parameter(name).detach() for model in models])


def check_models(models: Sequence[nn.Module], inputs: Tensor) -> None:
    """Refuse models that are more than a fixed function of parameters and inputs."""
    for name, module in models[0].named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(
                f"Expected a model without dropout, found {name or type(module).__name__} with p = {module.p}. "
                "HINT: set dropout to 0, or retrain with a Trainer (recipes/retrain.py)."
            )
    for model in models[1:]:
        for name, value in model.named_buffers():
            if not torch.equal(value, models[0].get_buffer(name)):
                raise ValueError(
                    f"Expected buffers that are the same in all models, found another {name}. "
                    "HINT: a buffer whose value is random should be a parameter without gradient."
                )
    before = {name: value.clone() for name, value in models[0].named_buffers()}
    with torch.random.fork_rng(devices=()), torch.no_grad():
        state = torch.get_rng_state()
        models[0](inputs)
        drew = not torch.equal(state, torch.get_rng_state())
    if drew:
        raise ValueError(
            "Expected a forward pass without random numbers, found one that draws some. "
            "HINT: set dropout to 0, or retrain with a Trainer (recipes/retrain.py)."
        )
    _check_constant(models[0], before)


def _check_constant(model: nn.Module, before: dict[str, Tensor]) -> None:
    changed = [name for name, value in model.named_buffers() if not torch.equal(value, before[name])]
    if changed:
        raise ValueError(
            f"Expected a model without buffers that its forward pass changes, found {sorted(changed)}. "
            "HINT: use layers without state, or retrain with a Trainer (recipes/retrain.py)."
        )
