"""GradientCapture: the per-sample gradients of selected parameters, taken from a forward and a backward as
they pass.

A forward hook on every selected layer puts a tensor hook on the layer's output; when the gradient arrives
there, the layer's rule turns it into a block at once. The user's layers are not wrapped and no ``.grad`` is
touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.hooks import RemovableHandle

from lightning_influence.errors import CaptureError
from lightning_influence.gradients.blocks import GradientBlock
from lightning_influence.gradients.functional import FunctionalUses, LayerUse
from lightning_influence.gradients.listening import depth
from lightning_influence.gradients.rules import LayerCall, apply_rule, rule_for, runs_again
from lightning_influence.gradients.selection import Selection

Consumer: TypeAlias = Callable[[str, GradientBlock], None]


class GradientCapture:
    """Captures d(total)/d(parameter) of every sample while it is attached.

    ::

        with GradientCapture(select(module, "all")) as capture:
            for batch in loader:
                capture.begin(num_samples=len(batch))
                loss = module.training_step(batch, 0)
                capture.backward(loss)
                gradients = capture.collect()          # Gradients: full parameter name → block of B samples

    With a mean loss each row is 1/B of the sample's own gradient: ``collect`` returns units of the total
    given, and the caller multiplies by B. Instead of ``backward`` the user's own backward may run: the hooks
    fire in either.

    Frozen layers that are selected are captured too: their outputs are made to require a gradient. Layers
    inside activation checkpointing are captured where they are recomputed. The gradients of several backward
    passes before ``collect`` add up; ``discard`` drops those of a backward that is not meant. Several that are
    wanted apart, over one forward, are collected one by one::

        for output in outputs:                         # scalars, one for every class say
            capture.backward(output, retain_graph=True)
            gradients = capture.collect()              # of this backward alone

    Args:
        selection: what ``select`` returned.
        functional: also capture F.linear, F.embedding and convolutions that use a selected parameter outside
            its layer's own call (``F.linear(h, embedding.weight)``).
        consumer: called with the name of a parameter and a block the moment that a gradient arrives, once for every
            use of the parameter; the block is not kept, ``collect`` returns none, and what the layer had read is let
            go. Not every value that it sees has been found finite.
        factored: keep the weights of linear layers, convolutions and attentions as ``Factored``, inputs and output
            gradients at every position, whatever that costs; a layer that is called twice has the positions of
            both calls. Otherwise every block comes in its smaller form. Parameters that are used in other ways
            too (a tied head, an attention with ``bias_k``) are Dense either way.

    Attributes:
        outputs: graph edges of the hooked outputs since ``begin``; ``inputs=`` for a backward of the caller's
            own. They hold the graph, and ``collect`` lets them go unless the last ``backward`` retained it.
        left_out: parameter name → uses that are seen and not captured: on purpose (the tied head of word
            embeddings) or because they lie out of reach (``h @ weight.T``). The sum of the captured rows is
            the parameter's gradient only for names that are not in here.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        functional: bool = True,
        factored: bool = False,
        consumer: Consumer | None = None,
    ) -> None:
        self.selection, self.functional, self.factored, self.consumer = selection, functional, factored, consumer
        self.outputs: list[GradientEdge] = []
        self.left_out: dict[str, set[str]] = {}
        self._num_samples: int | None = None
        self._pending: list[_Pending] = []
        self._blocks: dict[str, GradientBlock] = {}
        self._called: set[str] = set()
        self._consumed: set[str] = set()
        self._inside: list[nn.Module] = []
        self._paused = False
        self._retained = False
        self._depth = 0
        self._handles: list[RemovableHandle] = []
        self._mode: FunctionalUses | None = None

    def __enter__(self) -> GradientCapture:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def attach(self) -> None:
        """Put the hooks on the selected layers; ``with`` does it."""
        if self._handles:
            return
        self._depth = depth()
        for layer in self.selection.layers:
            if self.functional and isinstance(layer, nn.Embedding) and rule_for(type(layer)) is None:
                continue  # a subclass: the look-up inside its forward is captured, whatever the forward does to it
            self._handles.append(layer.register_forward_pre_hook(self._enter_layer))
            self._handles.append(layer.register_forward_hook(self._watch_layer, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leave_layer, always_call=True))
        if self.functional:
            self._mode = FunctionalUses(self.selection, self._is_own_call, self._watch_function, self.left_out)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def detach(self) -> None:
        """Take every hook away and forget what was not collected; also after an exception."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._mode is not None:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._forget()
        self._num_samples = None

    def forward_is_over(self) -> None:
        """Look at no more functions until the next ``attach``: there is nothing to find in what comes after a forward
        pass, unless a checkpointed part that uses selected parameters by functions is run again in the backward."""
        if self._mode is not None and not self._mode.found:
            mode, self._mode = self._mode, None
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def begin(self, num_samples: int) -> None:
        """Start a batch of ``num_samples`` samples; what an earlier one left uncollected is dropped."""
        self._forget()
        self._num_samples = num_samples

    def backward(self, total: Tensor, *, retain_graph: bool = False) -> None:
        """Backpropagate ``total`` (a scalar) to the hooked outputs and no further: no ``.grad`` is touched.

        Reentrant activation checkpointing does not allow that. Where it is found, a whole backward runs, and
        every ``.grad`` is put back afterwards as it was (gradient hooks of parameters do fire).

        Args:
            retain_graph: keep the graph, through ``collect`` too, for another ``backward`` over the same forward.
                ``begin``, ``detach`` or a ``backward`` without it let go.
        """
        if not total.requires_grad:
            raise CaptureError(
                "the loss does not depend on anything that requires a gradient",
                expected=f"a loss that depends on {', '.join(self.selection.names[:3])}",
                found="a loss without a graph",
                hint="run the forward with gradients enabled and inside the capture, after begin()",
            )
        self._retained = retain_graph
        reached = list(self.outputs)
        try:
            if any(node.name() == "CheckpointFunctionBackward" for node in _graph(total)):
                with _gradients_kept(self.selection.module, total):
                    torch.autograd.backward(total, retain_graph=retain_graph)
            elif reached:  # if there are none, collect() says which layers never fired
                torch.autograd.grad(total, reached, retain_graph=retain_graph, allow_unused=True)
        finally:
            self.outputs = reached  # not what was recomputed on the way: the next backward recomputes it again

    def discard(self) -> None:
        """Drop the gradients that came so far and go on listening to the same forward."""
        self._blocks.clear()
        self._consumed.clear()
        for pending in self._pending:
            pending.grads.clear()
        self._pending.clear()

    def collect(self, *, require_all: bool = True, require_finite: bool = True) -> dict[str, GradientBlock]:
        """The gradients since ``begin`` or the last ``collect``: full parameter name → block, in the order of the
        selection.

        Args:
            require_all: raise if a selected parameter got none; otherwise it is missing from the result.
            require_finite: raise if a value is NaN or infinite; otherwise the caller looks (a gradient scaler skips
                such steps).

        Errors:
            CaptureError: a selected parameter whose layer never fired, or to which no gradient came; NaN or
                infinite values, with the name.
        """
        try:
            for pending in self._pending:
                self._apply(pending)
            missing = [n for n in self.selection.names if n not in self._blocks and n not in self._consumed]
            if missing and require_all:
                raise self._never_fired(missing)
            for name, block in self._blocks.items():
                if require_finite and not block.all_finite():
                    raise _not_finite(name, block)
            return {name: self._blocks[name] for name in self.selection.names if name in self._blocks}
        finally:
            self.discard()
            if not self._retained:
                self.outputs = []

    # hooks

    def _enter_layer(self, layer: nn.Module, args: Any) -> None:
        self._inside.append(layer)

    def _leave_layer(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._inside and self._inside[-1] is layer:
            self._inside.pop()

    def _is_own_call(self, name: str) -> bool:
        """True while a layer that answers for this parameter is running, or while a rule is."""
        return self._paused or any(name in self.selection.layers[layer].values() for layer in self._inside)

    def _watch_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self._watch(LayerUse(layer, self.selection.layers[layer], args, kwargs), output)

    def _watch_function(self, use: LayerUse, output: Tensor) -> Any:
        watched = self._watch(use, output)
        return output if watched is None else watched

    def _watch(self, use: LayerUse, output: Any) -> Any:
        """Hook the floating-point outputs of one use; returns the output to go on with, None for the same
        one."""
        if self._paused or self._num_samples is None or not torch.is_grad_enabled() or depth() != self._depth:
            return None
        leaves, spec = tree_flatten(output)
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        frozen = not any(leaves[k].requires_grad for k in places)
        again = runs_again(type(use.layer))
        pending = _Pending(use, [leaves[k] for k in places] if again or len(places) > 1 else [], self._num_samples)
        self._called |= set(use.names.values())
        changed = False
        for place, k in enumerate(places):
            leaf = leaves[k]
            if frozen:
                leaves[k] = leaf.detach().requires_grad_().clone()  # no leaf: in-place successors stay legal
            elif leaf.requires_grad and (again or len(places) > 1 or leaf._is_view()):
                # A view that is changed in place silences its hook. Of several outputs one may be made of
                # another: behind a clone each sees only what comes from outside. A second run is compared
                # with the original.
                leaves[k] = leaf.clone()
            changed |= leaves[k] is not leaf
            if leaves[k].requires_grad:
                leaves[k].register_hook(self._arrival(pending, place, at_once=len(places) == 1))
                self.outputs.append(get_gradient_edge(leaves[k]))
        return tree_unflatten(leaves, spec) if changed else None

    def _arrival(self, pending: _Pending, place: int, *, at_once: bool) -> Callable[[Tensor], None]:
        batch = self._blocks

        def arrived(grad: Tensor) -> None:
            if self._blocks is not batch:
                return  # a batch that was given up: begin() or detach() came first
            pending.add(place, grad.detach())
            if at_once:
                self._apply(pending)
            elif pending not in self._pending:
                self._pending.append(pending)  # its other outputs may still get theirs

        return arrived

    def _apply(self, pending: _Pending) -> None:
        call = pending.call(factored=self.factored)
        with self._pause(), torch.autocast(call.output_grad.device.type, enabled=False):  # a backward may run inside it
            for local, block in apply_rule(call).items():
                name = pending.names[local]
                if self.consumer is not None:
                    self.consumer(name, block)
                    self._consumed.add(name)
                    continue
                whole = self._blocks[name].plus(block) if name in self._blocks else block
                self._blocks[name] = whole if self.factored else whole.compact()
        if self.consumer is not None and not self._retained:
            pending.release()

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _forget(self) -> None:
        self.outputs, self._retained = [], False
        self._pending, self._blocks, self._called, self._consumed = [], {}, set(), set()
        self._inside.clear()

    def _never_fired(self, missing: list[str]) -> CaptureError:
        name = missing[0]
        what = f"no gradient of {name!r} was captured" + (f" (nor of {len(missing) - 1} more)" if missing[1:] else "")
        if name in self._called:
            found = "its layer was called, but the loss does not depend on that call"
        elif name in self.left_out:
            found = f"only uses that are out of reach: {', '.join(sorted(self.left_out[name]))}"
        else:
            found = "its layer was never called with gradients enabled"
        return CaptureError(
            what,
            expected="a call of every selected layer that the loss depends on",
            found=found,
            hint="leave the parameter out of the selection, or call its layer as a module in the step; under "
            "torch.compile hooks may not fire: capture the module that was not compiled",
        )


class _Pending:
    """One use of selected parameters, waiting for the gradients at its outputs."""

    def __init__(self, use: LayerUse, outputs: list[Tensor], num_samples: int) -> None:
        self.layer, self.names, self.num_samples = use.layer, use.names, num_samples
        self.args, self.kwargs = tree_map(_detached, (use.args, use.kwargs))
        self.outputs = [output.detach() for output in outputs]
        tensors = [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if isinstance(leaf, Tensor)]
        self.versions = [(tensor, tensor._version) for tensor in tensors]
        device = tensors[0].device.type if tensors else "cpu"
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.grads: dict[int, Tensor] = {}

    def add(self, place: int, grad: Tensor) -> None:
        """A gradient at one of the outputs; those of several backward passes add up until the rule is
        applied."""
        self.grads[place] = self.grads[place] + grad if place in self.grads else grad

    def release(self) -> None:
        """Let go of what the layer had read: the use has been dealt with."""
        self.args, self.kwargs, self.outputs, self.versions = (), {}, [], []

    def call(self, *, factored: bool) -> LayerCall:
        """What the rule is given. The gradients are used up."""
        if any(tensor._version != version for tensor, version in self.versions):
            names = ", ".join(map(repr, sorted(self.names.values())))
            raise CaptureError(
                f"the input of the layer of {names} was changed in place after the layer had read it",
                expected="an input that stays as it was until the backward",
                found="a later in-place operation on the same tensor",
                hint="write x = x + y instead of x += y there, or leave the layer out of the selection",
            )
        grads, self.grads = self.grads, {}
        arrived = tuple(
            grads[k] if k in grads else torch.zeros_like(self.outputs[k]) for k in range(max(1, len(self.outputs)))
        )
        return LayerCall(
            self.layer,
            self.args,
            self.kwargs,
            arrived,
            self.num_samples,
            self.names,
            tuple(self.outputs),
            self.autocast,
            factored,
        )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _graph(total: Tensor) -> Iterator[Node]:
    """Every node of the graph behind ``total``."""
    waiting, seen = [total.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


@contextlib.contextmanager
def _gradients_kept(module: nn.Module, total: Tensor) -> Iterator[None]:
    """Puts every ``.grad`` that a whole backward can reach back as it was."""
    leaves: dict[Tensor, Tensor | None] = {parameter: parameter.grad for parameter in module.parameters()}
    for node in _graph(total):
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.setdefault(variable, variable.grad)
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in leaves.items():
            leaf.grad = grad


def _not_finite(name: str, block: GradientBlock) -> CaptureError:
    bad = (~torch.isfinite(block.norm())).nonzero().squeeze(1).tolist()
    shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
    return CaptureError(
        f"the gradient of {name!r} is NaN or infinite",
        expected="finite gradients",
        found=f"non-finite values in the samples at places {shown} of the batch" if bad else "non-finite values",
        hint="look at these samples and at the loss scale; a run that has diverged has no influence to measure",
    )
