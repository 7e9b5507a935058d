"""Parts of a block that are made again in its backward pass instead of being kept (`tplaunch.spec.recompute`).

What autograd saves within a block is looked at (`torch.autograd.graph.saved_tensors_hooks`): where it is what a part
that is made again gave, a note is saved in its place of how to make it, from what the part read, which may itself be a
note. So nothing runs twice but what a gradient needs, inside the backward pass of the operation that needs it, where
`torch.utils.checkpoint` runs all of a function again, with a graph. What is made is remembered until the last that
saved it has had it.

Every tensor-parallel rank makes the same again in the same order, for the order is that of its graph: collectives meet.
Weights are read when a part runs again, so that FSDP's are those that it has gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tplaunch.parallel.split_backward import reads_activations
from tplaunch.torch_private import storage_id, weak_storage

# Runs a part of a block: (part, function, *what it reads) -> what the function gives. Parts are those of a recipe, and
# exchanges among ranks that share a sequence (`tplaunch.model.block`).
Run = Callable[..., Any]


def run_once(part: str, function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a part that is not made again."""
    return function(*inputs)


class Recomputation:
    """Within a `with` block, one pass of a transformer block; as a function, a `Run`.

    Args:
        again: the parts that are made again.
        compiled: whether they run compiled.
    """

    def __init__(self, again: Set[str], *, compiled: bool = False) -> None:
        self.again = again
        self.compiled = compiled
        hooks: list[Callable[..., Any]] = [self._pack, _unpack]
        if compiled:  # what a compiled function calls would be compiled, too
            hooks = [torch.compiler.disable(hook) for hook in hooks]
        self._hooks = saved_tensors_hooks(*hooks)
        # By storage. It is not kept alive, but its number stays its own.
        self._made: dict[int, tuple[_Made, int, Any]] = {}

    def __enter__(self) -> Recomputation:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._made = {}  # what is saved holds this object

    def __call__(self, part: str, function: Callable[..., Any], *inputs: Any) -> Any:
        if part not in self.again:
            return function(*inputs)
        if part == "core_attention":  # no operation of ours: what it saves is not only what parts give
            core = _Core(function)
            outputs = _RunCore.apply(core, *inputs)
            function = core.run
        else:
            outputs = function(*inputs)
        self._note(function, inputs, _as_tuple(outputs))
        return outputs

    def note(self, part: str, function: Callable[..., Tensor], x: Tensor, output: Tensor) -> None:
        """Let what a part gave that has run already be made again.

        Args:
            function: x -> output.
        """
        if part in self.again:
            self._note(function, (x,), (output,))

    def gathered(
        self,
        begin: Callable[..., Tensor],
        end: Callable[[Tensor], tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
    ) -> Gathered:
        """Something that is gathered of some inputs now, and never kept; see `Gathered`."""
        return Gathered(begin, end, [self._find(x) or x.detach() for x in inputs])

    def enter(self, made: _Made, outputs: tuple[Tensor, ...]) -> None:
        """From now on, let what is saved of some outputs be made again."""
        for place, output in enumerate(outputs):
            number = storage_id(output)
            if number not in self._made:
                self._made[number] = made, place, weak_storage(output)

    def _note(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        read = {storage_id(x) for x in inputs}
        made = _Made(function, [self._find(x) or x.detach() for x in inputs], compiled=self.compiled)
        for place, output in enumerate(outputs):
            number = storage_id(output)
            if number not in read and number not in self._made:
                self._made[number] = made, place, weak_storage(output)

    def _find(self, x: Tensor) -> _View | None:
        found = self._made.get(storage_id(x))
        return None if found is None else _View(found[0], found[1], x)

    def _pack(self, x: Tensor) -> Tensor | _View:
        view = self._find(x)
        if view is None:
            return x.detach()  # x itself holds its node, which holds what is saved: nobody would ever free them
        view.made.users += 1
        return view


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    if not reads_activations():
        return saved.made.postpone()
    value = saved.value()
    saved.made.used()
    return value


class _Made:
    """What a part gives, to be made again.

    Args:
        function: makes it.
        inputs: what it is made from.
        compiled: made with a graph, which is thrown away: a compiled function is then the same as in the forward pass,
            bit for bit.
    """

    def __init__(self, function: Callable[..., Any], inputs: list[Tensor | _View], *, compiled: bool) -> None:
        self.function = function
        self.inputs = inputs
        self.compiled = compiled
        self.users = 0  # that have yet to have it in this backward pass
        self._later = 0  # in the next one, where a schedule splits it
        self._outputs: tuple[Tensor, ...] | None = None

    def outputs(self) -> tuple[Tensor, ...]:
        """Make it, if it is not there."""
        if self._outputs is not None:
            return self._outputs
        with torch.set_grad_enabled(self.compiled):
            given = self.function(*(x.detach().requires_grad_(self.compiled) for x in _values(self.inputs)))
        outputs = tuple(x.detach() for x in _as_tuple(given))
        if not self.users:  # the second half of a backward pass
            self.users, self._later = self._later, 0
        self._outputs = outputs if self.users else None
        return outputs

    def used(self) -> None:
        """One who saved it has had it."""
        self.users = max(0, self.users - 1)
        if not self.users:
            self._outputs = None

    def postpone(self) -> Tensor:
        """One who saved it needs it in the next backward pass only: here is something in its place."""
        self._later += 1
        self.used()
        return torch.empty(0)


class _View:
    """A tensor that lies in the memory of what a part gives."""

    def __init__(self, made: _Made, place: int, x: Tensor) -> None:
        self.made = made
        self.place = place
        self.size, self.stride, self.offset = x.size(), x.stride(), x.storage_offset()

    def value(self, outputs: tuple[Tensor, ...] | None = None) -> Tensor:
        """The tensor; of these outputs, where they are at hand."""
        outputs = self.made.outputs() if outputs is None else outputs
        return outputs[self.place].as_strided(self.size, self.stride, self.offset)


def _values(inputs: list[Tensor | _View]) -> list[Tensor]:
    """Tensors; those that one part gives are made once."""
    outputs: dict[_Made, tuple[Tensor, ...]] = {}
    for x in inputs:
        if isinstance(x, _View) and x.made not in outputs:
            outputs[x.made] = x.made.outputs()
    return [x if isinstance(x, Tensor) else x.value(outputs[x.made]) for x in inputs]


class Gathered(_Made):
    """What is gathered from several ranks, and again in the backward pass: at the same place of it on all of them, for
    which of them save what is gathered, and what of it, is their kernels' matter.

    Args:
        begin: starts to gather.
        end: waits for what `begin` gave.
        inputs: what `begin` reads.
    """

    def __init__(
        self, begin: Callable[..., Tensor], end: Callable[[Tensor], tuple[Tensor, ...]], inputs: list[Tensor | _View]
    ) -> None:
        super().__init__(begin, inputs, compiled=False)
        self.end = end
        self._under_way: Tensor | None = None

    @torch.no_grad()
    def start(self) -> None:
        """Called in the backward pass, before anything that may need it."""
        self._under_way = self.function(*_values(self.inputs))

    def outputs(self) -> tuple[Tensor, ...]:
        """What was gathered; outside of `start` and `stop`, in the second half of a backward pass, gathered now, by all
        ranks: there only parts of blocks ask for it."""
        with torch.no_grad():
            if self._under_way is not None:
                self._outputs, self._under_way = self.end(self._under_way), None
            return self.end(self.function(*_values(self.inputs))) if self._outputs is None else self._outputs

    def stop(self) -> None:
        """Called in the backward pass, after all that may need it."""
        if self._under_way is not None:  # nobody did
            self.end(self._under_way)
        self._under_way = self._outputs = None

    def used(self) -> None:
        """See `stop`."""

    def postpone(self) -> Tensor:
        """See `_Made`."""
        return torch.empty(0)


class _Core:
    """Attention's core and what it saves, run again once for all who need it: for its output's users and for its own
    backward pass.

    Args:
        function: queries, keys and values to the output, or several.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._awaited = True  # its own backward pass
        self._graph: tuple[tuple[Tensor, ...], list[Tensor]] | None = None

    def run(self, *inputs: Tensor) -> Any:
        """[...] of the function again; with the graph that its backward pass takes, if that has yet to come."""
        if not self._awaited:
            return self.function(*inputs)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = _as_tuple(self.function(*leaves))
        self._graph = outputs, leaves
        return tuple(output.detach() for output in outputs)

    def gradients(self, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Of queries, keys and values."""
        if self._graph is None:
            self._awaited = True
            self.run(*inputs)
        assert self._graph is not None
        outputs, leaves = self._graph
        self._graph, self._awaited = None, False
        return torch.autograd.grad(outputs, leaves, grads)


class _RunCore(torch.autograd.Function):
    """The core without a graph of its own."""

    @staticmethod
    def forward(ctx: Any, core: _Core, *inputs: Tensor) -> Any:
        ctx.core = core
        ctx.save_for_backward(*inputs)
        return core.function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.core.gradients(ctx.saved_tensors, grads)


def _as_tuple(given: Any) -> tuple[Tensor, ...]:
    return given if isinstance(given, tuple) else (given,)
