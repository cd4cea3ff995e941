"""TracIn: gradients of queries and training samples, multiplied at every checkpoint; and its last-layer form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_influence.artifacts import ArtifactStore, Checkpoint, Shard, StepRange
from lightning_influence.errors import QueryError
from lightning_influence.estimators.estimator import (
    Estimator,
    Stage,
    Term,
    Transform,
    require_parameters,
    unchanged,
)
from lightning_influence.gradients import GradientBlock, Gradients, TargetParameters, meant, select

Preconditioner: TypeAlias = Literal["optimizer"] | None

_NEVER = 1 << 62


class TracIn(Estimator):
    """Trace a query's loss through the steps that lowered it (Pruthi et al. 2020, arXiv:2002.08484).

        score(q, z) = sum over c of eta_c < P_c grad m(q; theta_c), grad l(z; theta_c) >

    From a store written by replay, c runs over its checkpoints (TracInCP) and eta_c is the *sum* of the learning rates
    since the previous checkpoint, by parameter group. From records made in flight, c runs over the steps t, the
    query's gradient is that of the last checkpoint saved before t, and eta_c = eta_t / B_t. A frozen parameter takes
    the rate that all groups share. Scores rank; they are no amounts.

    Args:
        parameters: glob or globs over parameter names; `None` takes all that the store holds (if it holds none and the
            training data stream by, all that were trained); `TargetParameters` takes some entries of some of them.
        preconditioner: `"optimizer"` puts P_c = diag(1 / (sqrt(v_hat) + eps)) of Adam and relatives, as saved with the
            checkpoint, in place of the identity. In flight, where the first checkpoint precedes the optimizer's first
            step, it takes the denominators of the second.

    Raises:
        QueryError: the store lacks the parameters, checkpoints, records or second moments that are asked for.
        StoreError: a frozen parameter, and groups whose rates differ.
    """

    def __init__(
        self,
        parameters: str | Sequence[str] | TargetParameters | None = None,
        *,
        preconditioner: Preconditioner = None,
    ) -> None:
        if preconditioner not in (None, "optimizer"):
            raise QueryError(
                "unknown preconditioner", expected='None or "optimizer"', found=repr(preconditioner), hint="choose one"
            )
        self._target = parameters if isinstance(parameters, TargetParameters) else None
        names = parameters.names if isinstance(parameters, TargetParameters) else parameters
        self._globs = (names,) if isinstance(names, str) else names
        self._preconditioner = preconditioner

    def terms(self, stage: Stage) -> Sequence[Term]:
        """One term a checkpoint; in flight, one for each stretch between two checkpoints and each group of rates."""
        names, checkpoints = self.names(stage), stage.checkpoints
        query, train = self.sides(stage, names)
        if self._target is not None:
            self._target.check({name: spec.shape for name, spec in stage.store.manifest.parameters.items()})
            query = _masked(query, self._target)
        if stage.store.manifest.mode == "in_flight":
            return self._in_flight_terms(stage.store, names, query, train)
        terms = []
        for at in checkpoints:
            rates = {name: at.learning_rate(name) for name in names}
            transform = _preconditioned(query, self._denominators(stage.store, names, at))
            terms.append(Term(at, at, names, transform, train, stored_transform=_scaled_by(rates)))
        return terms

    def names(self, stage: Stage) -> tuple[str, ...]:
        """The parameters whose gradients take part, in the order of the store."""
        known = stage.parameters
        if self._globs is None:
            return stage.store.manifest.selected or (known if stage.module is None else _trained(stage.module, known))
        found = {glob: meant(glob, known) for glob in self._globs}
        require_parameters(stage, [glob for glob, names in found.items() if not names], type(self).__name__)
        return tuple(name for name in known if any(name in names for names in found.values()))

    def sides(self, stage: Stage, names: Sequence[str]) -> tuple[Transform, Transform]:
        """What the query's and the training gradients pass through, before rates and preconditioner."""
        return unchanged, unchanged

    def _in_flight_terms(
        self, store: ArtifactStore, names: Sequence[str], query: Transform, train: Transform
    ) -> list[Term]:
        recorded = [chunk.step for chunk in store.artifacts("in_flight")]
        checkpoints = store.checkpoints()
        terms = []
        for at, following in zip(checkpoints, (*checkpoints[1:], None), strict=True):
            end = _NEVER if following is None else following.step
            if not any(at.step < step <= end for step in recorded):
                continue  # nothing was trained from here: no query gradient is needed
            for groups, members in _by_groups(checkpoints, names).items():
                denominators = self._denominators(store, members, at, following)
                transform = _preconditioned(query, denominators)
                terms.append(Term(at, StepRange(at.step, end), tuple(members), transform, train, _step_weight(groups)))
        if not terms:
            raise QueryError(
                "the store holds no records made in flight",
                expected="at least one training step",
                found=str(store.root),
                hint="let the fit with GradientSnapshot(mode='in_flight') train",
            )
        return terms

    def _denominators(
        self, store: ArtifactStore, names: Sequence[str], at: Checkpoint, following: Checkpoint | None = None
    ) -> Mapping[str, Tensor] | None:
        if self._preconditioner is None:
            return None
        saved = {file.step for file in store.artifacts("optimizer")}
        source = following if following is not None and at.step == 0 and at.step not in saved else at
        found = store.preconditioner(source) if source.step in saved else {}
        missing = [name for name in names if name not in found]
        if missing:
            raise QueryError(
                'preconditioner="optimizer" needs the second moments of an Adam-like optimizer',
                expected=f"sqrt(v_hat) + eps of {', '.join(missing)} at step {source.step}",
                found=", ".join(sorted({group.optimizer for group in at.groups})) or "no optimizer",
                hint="leave the preconditioner out for SGD and for frozen parameters",
            )
        return found


class TracInLast(TracIn):
    """TracIn on the last linear layer: sum over c of eta_c (a . a')(e . e'), with a its input (1 appended for a bias)
    and e the gradient of its output (the usual baseline; Yeh et al. 2022, arXiv:2202.11844, say why it cancels).

    Args:
        preconditioner: as in `TracIn`.

    Raises:
        QueryError: the layer was not captured, or only as the word embedding that it is tied to.
    """

    def __init__(self, *, preconditioner: Preconditioner = None) -> None:
        super().__init__(None, preconditioner=preconditioner)

    def names(self, stage: Stage) -> tuple[str, ...]:
        """Weight and bias of the last linear layer."""
        if stage.module is None:
            raise QueryError(
                "TracInLast looks the last layer up in the model",
                expected="the module",
                found="none",
                hint="pass the module to InfluenceModule, or name its layer: TracIn(parameters='head.*')",
            )
        names = require_parameters(stage, select(stage.module, "last_layer").names, "TracInLast")
        tied = [name for name in names if name in look_ups(stage.store)]
        if tied:
            raise QueryError(
                f"the last layer is tied to the word embedding '{tied[0]}'",
                expected="gradients of the last layer's own use",
                found="gradients of the look-ups alone",
                hint="fit with GradientSnapshot(parameters='last_layer') into a store of its own",
            )
        return names


def _trained(module: LightningModule, known: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name, p in module.named_parameters() if p.requires_grad and name in known)


def look_ups(store: ArtifactStore) -> tuple[str, ...]:
    """Embedding weights of which the store holds the look-ups alone, without other uses such as a tied head."""
    found = store.manifest.settings.get("look_ups")
    return tuple(str(name) for name in found) if isinstance(found, (list, tuple)) else ()


def _preconditioned(prepare: Transform, denominators: Mapping[str, Tensor] | None) -> Transform:
    """An estimator's own transform, then the preconditioner."""
    if denominators is None:
        return prepare

    def transform(gradients: Gradients) -> Gradients:
        return {n: _wide(block).multiplied(denominators[n].reciprocal()) for n, block in prepare(gradients).items()}

    return transform


def _masked(prepare: Transform, target: TargetParameters) -> Transform:
    """An estimator's own transform, then zero outside the target parameters."""
    return lambda gradients: {n: block.multiplied(target.masks[n]) for n, block in prepare(gradients).items()}


def _scaled_by(rates: Mapping[str, float]) -> Transform:
    """The learning rates of the parameters."""

    def transform(gradients: Gradients) -> Gradients:
        return {
            name: _wide(block).scaled(torch.full((block.num_samples,), rates[name], dtype=torch.float64))
            for name, block in gradients.items()
        }

    return transform


def _wide(block: GradientBlock) -> GradientBlock:
    """The block in a type that can be scaled without loss."""
    return block.to(dtype=torch.promote_types(block.dtype, torch.float32))


def _by_groups(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> dict[tuple[int, ...], list[str]]:
    """The parameters by the indices of the groups that train them; a frozen one takes the rate that all share."""
    groups = checkpoints[-1].groups
    found: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        own = tuple(index for index, group in enumerate(groups) if name in group.parameters)
        if not own:
            for checkpoint in checkpoints:
                checkpoint.learning_rate(name)  # refuses where the groups disagree
        found.setdefault(own or (0,), []).append(name)
    return found


def _step_weight(groups: Sequence[int]) -> Callable[[Shard], Tensor]:
    """eta_t / B_t of every record made in flight, for parameters that these groups train."""

    def weight(shard: Shard) -> Tensor:
        rates = shard.records["rates"][:, list(groups)].sum(1)
        return rates / shard.records["batch_size"]

    return weight
