"""isolated(): a module runs in eval mode with gradients on, and afterwards nothing shows that it did."""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.listening import on_the_side
from lightning_influence.replay.remembered import Remembered

_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_MACHINERY = frozenset({"abc", "builtins", "lightning", "pytorch_lightning", "torch", "typing"})


@contextmanager
def isolated(module: LightningModule, trainer: Trainer | None = None) -> Iterator[list[Tensor]]:
    """Run the module without a trace, in eval mode and with gradients on.

    Restored on the way out, after an exception too: random states (torch, CUDA, numpy, python), the training flag and
    `requires_grad` of everything, buffers, weights that a look-up renormalises (`max_norm`), and the python attributes
    of every submodule (torchmetrics' states, counters, lists, generators), in place. Muted meanwhile: `log`,
    `log_dict`, loggers, and everything that would change an optimizer or a scheduler; they can be read. The losses
    given to `manual_backward` are collected in the list that is yielded. `torch.compile`d parts run eagerly, so that
    hooks fire.

    Attributes of the Trainer (`should_stop`, and whatever a step keeps there) are restored too, down to the contents of
    plain containers; its loops, strategy and callbacks are left alone.

    Raises:
        CaptureError: the forward pass changed a parameter in place.
    """
    manual_losses: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(on_the_side())
        stack.enter_context(_random_state())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        check_parameters = _unchanged_parameters(module)
        stack.callback(_remember_module(module).restore)
        stack.callback(_remember_trainers({trainer, module._trainer}).restore)
        if trainer is not None:
            stack.callback(setattr, trainer, "loggers", trainer.loggers)
            trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        _mute(module, manual_losses)
        for part in module.modules():
            part.training = False
        yield manual_losses
        check_parameters()


@contextmanager
def _random_state() -> Iterator[None]:
    """Put the global generators of torch, CUDA, numpy and python back on the way out, after an exception too."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


def _remember_module(module: LightningModule) -> Remembered:
    """Everything of a module that a forward pass could change."""
    classes = {kind for part in module.modules() for kind in type(part).__mro__}
    memory = Remembered({kind.__module__.split(".")[0] for kind in classes} - _MACHINERY)
    for part in module.modules():
        memory.attributes(part.__dict__, _MODULE_INTERNALS)
        memory.attributes(part._buffers, frozenset())  # the dictionary, and what is in it
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            memory.tensor(part.weight)
    for parameter in module.parameters():
        memory.flag(parameter)
    return memory


def _remember_trainers(trainers: set[Trainer | None]) -> Remembered:
    """The attributes of Trainers; of what those refer to, containers and values only."""
    memory = Remembered()
    for trainer in trainers - {None}:
        memory.attributes(vars(trainer), frozenset())
    return memory


def _unchanged_parameters(module: LightningModule) -> Callable[[], None]:
    """A check, for later, that no parameter has changed; a sum catches what goes through `.data` (target networks)."""
    renormalised = {
        id(part.weight)
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None
    }
    watched = [(name, p) for name, p in module.named_parameters() if id(p) not in renormalised]

    def states() -> list[tuple[int, int, str]]:
        return [(p._version, p.data_ptr(), repr(float(p.detach().sum(dtype=torch.float64)))) for _, p in watched]

    before = states()

    def check() -> None:
        for (name, _), old, new in zip(watched, before, states(), strict=True):
            if old != new:
                raise CaptureError(
                    f"the forward pass changed parameter '{name}' in place",
                    expected="a training_step that leaves the weights to the optimizer",
                    found="a changed parameter",
                    hint="move the change to on_train_batch_end, or define `per_sample_loss(batch) -> (N,)` without it",
                )

    return check


def _mute(module: LightningModule, manual_losses: list[Tensor]) -> None:
    """Shadow, in the instance, what a training step could change the run with."""
    own = module.__dict__
    attached = module._trainer is not None
    optimizers = _bystanders(type(module).optimizers(module)) if attached else _Bystander(None)
    schedulers = _bystanders(type(module).lr_schedulers(module)) if attached else _Bystander(None)
    own["optimizers"] = lambda *args, **kwargs: optimizers
    own["lr_schedulers"] = lambda *args, **kwargs: schedulers
    own["manual_backward"] = lambda loss, *args, **kwargs: manual_losses.append(loss)
    for name in (
        "log",
        "log_dict",
        "clip_gradients",
        *(() if attached else ("toggle_optimizer", "untoggle_optimizer")),
    ):
        own[name] = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _bystanders(real: Any) -> Any:
    if isinstance(real, list):
        return [_Bystander(each) for each in real] or _Bystander(None)
    return real if real is None else _Bystander(real)


class _Bystander:
    """Stands in for an optimizer or a scheduler: it can be read, and does nothing that it is asked to do.

    Without a real one (a module that has no Trainer) every rate reads as zero.
    """

    def __init__(self, real: Any) -> None:
        self._real = real

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies of the groups, so that a rate that is set by hand stays here."""
        return [defaultdict(float)] if self._real is None else [dict(group) for group in self._real.param_groups]

    @property
    def optimizer(self) -> _Bystander:
        return self

    def get_last_lr(self) -> list[float]:
        return [0.0] if self._real is None else list(self._real.get_last_lr())

    def toggle_model(self, sync_grad: bool = True) -> AbstractContextManager[None]:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        value = None if self._real is None else getattr(self._real, name)
        return _nothing if value is None or callable(value) else value
