"""A finetuning run as what a gradient is pulled back through: what it trained, what it froze, and what lies between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_influence.artifacts import Checkpoint, StageLink
from lightning_influence.curvature import Curvature, Damping, LossOperator, RecordedCurvature, TrainingEvidence
from lightning_influence.curvature.block_diagonal import BlockDiagonal
from lightning_influence.curvature.parameter_space import ParameterSpace
from lightning_influence.errors import CaptureError, QueryError
from lightning_influence.estimators.estimator import Queries, Stage
from lightning_influence.gradients import Dense, GradientBlock, Gradients, accumulation_dtype, select
from lightning_influence.replay import TrainingData
from lightning_influence.stages import Answer, Held, Link, Trained


@dataclass(frozen=True)
class FinetuningProblem:
    """What a gradient is pulled back through.

    Attributes:
        stage: the finetuning run.
        link: what its store says of the shared parameters.
        found, damping: ∇²_yy F and λ.
        form: how finetuning answers.
        held: 2α of the tuned shared parameters (of all trained ones for `Source`).
    """

    stage: Stage
    link: StageLink
    found: RecordedCurvature
    damping: Damping
    form: Link
    held: Held

    @property
    def curvature(self) -> Curvature:
        """∇²_yy F."""
        return self.found.curvature

    @property
    def trained(self) -> tuple[str, ...]:
        """y, as far as the curvature knows it."""
        return tuple(name for name in self.curvature.parameters if name not in self.link.frozen)

    @property
    def tuned(self) -> tuple[str, ...]:
        """The shared parameters among them."""
        return tuple(name for name in self.trained if name in self.link.shared)

    def answer(self, v: Gradients) -> Answer:
        """x and h of a gradient of the trained parameters."""
        with self.stage.at(self.found.at):
            return self.form.answer(Trained(self.curvature, self.damping, self.held, self.tuned), v)

    def as_trained(self) -> Any:
        """The module with the parameters frozen that were so, as a context."""
        assert self.stage.module is not None
        return trained_as(self.stage.module, self.link.frozen)

    def cross(self, frozen: Collection[str], data: TrainingData) -> Callable[[Gradients], Gradients]:
        """x -> ∇²_{W_f y}F x, by double backward of the finetuning loss: no approximation of the curvature has it."""
        module = self.stage.module
        assert module is not None

        def product(x: Gradients) -> Gradients:
            names = [*x, *frozen]
            with _thawed(module, names):
                selection = select(module, names)
                space = ParameterSpace({name: tuple(p.shape) for name, p in selection.parameters.items()})
                evidence = TrainingEvidence(
                    module, selection, data, per_sample_loss=self.stage.per_sample_loss, reduction=self.stage.reduction
                )
                like = torch.empty(0, dtype=accumulation_dtype(*selection.parameters.values()), device=module.device)
                flat = space.rows(x, like)
                return space.named(LossOperator(evidence, "hessian").matvec(flat), list(frozen), x)

        return product

    def check(self, *, needs_all: bool) -> None:
        """Refuse a curvature that does not know what has to be solved for.

        Args:
            needs_all: whether the answer of new parameters matters too.

        Raises:
            QueryError: tuned shared parameters, or new ones that matter, are missing in it; or it is of frozen ones.
        """
        known, frozen = set(self.curvature.parameters), set(self.link.frozen)
        blocks = isinstance(self.curvature, BlockDiagonal)
        trained = [name for name in self.stage.store.manifest.parameters if name not in frozen]
        missing = [name for name in trained if name not in known]
        lost = [name for name in missing if name in self.link.shared]
        if lost or (missing and (needs_all or not blocks)) or (known & frozen and not blocks):
            wrong = lost or missing or sorted(known & frozen)
            raise QueryError(
                f"the curvature {self.found.name!r} of the finetuning run cannot answer for {', '.join(wrong[:5])}",
                expected=f"the curvature of what was trained: {', '.join(trained[:8])}",
                found=f"that of {', '.join(self.curvature.parameters[:8])}",
                hint="take MultiStage(..., finetuned=InfluenceFunction(MatrixFree())), or a dense curvature of all "
                "trained parameters; in scores of pretraining samples alone, ignore_cross_terms=True leaves out the "
                "answer of new parameters that cannot be solved for",
            )


@contextmanager
def trained_as(module: nn.Module, frozen: Collection[str]) -> Iterator[None]:
    """The parameters `frozen` do not require gradients and all others do, for a while."""
    with _flags(module, {name: name not in frozen for name, _ in module.named_parameters()}):
        yield


@contextmanager
def _thawed(module: nn.Module, names: Collection[str]) -> Iterator[None]:
    """These parameters require gradients, for a while."""
    with _flags(module, dict.fromkeys(names, True)):
        yield


@contextmanager
def _flags(module: nn.Module, wanted: dict[str, bool]) -> Iterator[None]:
    parameters = dict(module.named_parameters())
    before = {name: parameters[name].requires_grad for name in wanted if name in parameters}
    try:
        for name in before:
            parameters[name].requires_grad_(wanted[name])
        yield
    finally:
        for name, flag in before.items():
            parameters[name].requires_grad_(flag)


def reached_gradients(
    stage: Stage, queries: Queries, at: Checkpoint, trained: Collection[str], frozen: Collection[str]
) -> Gradients:
    """∇m of trained and of frozen parameters. Frozen ones that m does not reach, as an old head, have a gradient of 0.

    Raises:
        CaptureError: of a trained parameter there is none, or a gradient cannot be captured.
        QueryError: no parameter is reached; frozen layers ran without a graph.
    """
    lost, silent = list[str](), set[nn.Module]()
    with ExitStack() as hooks:
        while len(lost) < len(trained) + len(frozen):
            wanted = [*trained, *(name for name in frozen if name not in lost)]
            try:
                found = queries.gradients_at(at, wanted)
            except CaptureError as error:
                missing = [name for name in frozen if error.what.startswith(f"no gradient of {name!r} was captured")]
                if not missing or missing[0] in lost or str(error.found).startswith("only uses"):
                    raise
                found = {}
                if not lost and stage.module is not None:  # from now on, see which layers run without gradients
                    for layer in stage.module.modules():
                        note = lambda layer, _: None if torch.is_grad_enabled() else silent.add(layer)  # noqa: E731
                        hooks.callback(layer.register_forward_pre_hook(note).remove)
                lost += missing[:1]
            _refuse_silent(stage.module, silent, lost)
            if found:
                like, shapes = next(iter(found.values())), stage.store.manifest.parameters
                return {**found, **{name: zeros(like, shapes[name].shape) for name in lost}}
    raise QueryError(
        "the queries reach no parameter that finetuning took over",
        expected=f"a measurement that depends on some of {', '.join(lost[:5])}",
        found="gradients of none",
        hint="ask with a measurement of the model that was finetuned",
    )


def zeros(like: GradientBlock, shape: Sequence[int]) -> Dense:
    """Gradients of 0 of a parameter, of as many samples as `like` has; they take no memory."""
    return Dense(torch.zeros((), dtype=like.dtype, device=like.device).expand(like.num_samples, *shape))


def _refuse_silent(module: nn.Module | None, silent: Collection[nn.Module], names: Collection[str]) -> None:
    """Refuse frozen parameters whose layers ran under `torch.no_grad()`: what they do to m is not nothing."""
    if module is None or not silent:
        return
    own = {id(p) for layer in silent for p in layer.parameters(recurse=False)}
    parameters = dict(module.named_parameters())
    if unseen := [name for name in names if id(parameters[name]) in own]:
        raise QueryError(
            f"the layer of {unseen[0]!r} runs under torch.no_grad(), so that a query has no gradient there",
            expected="frozen layers that run with gradients enabled, their parameters with requires_grad=False",
            found="a forward pass without a graph",
            hint="take torch.no_grad() away around the frozen layers (requires_grad_(False) alone keeps them, at no "
            "more cost), and ask again; the fit need not be repeated",
        )
