"""A microbatch's backward pass through a stage, whole or in two halves, from the graph alone.

A stage's output is not kept: the backward pass begins at its place in the graph (Megatron's
`deallocate_pipeline_outputs` does the same through the C++ engine).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge


class Pass:
    """What a forward pass has left for its backward pass.

    Args:
        x: the stage's input; a leaf that wants a gradient, or tokens.
        output: what the stage made of it.
    """

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self._x: Tensor | None = x if x.requires_grad else None
        # Kept to the end of a second half, too: up to torch 2.12 a node of an autograd function lives no longer than
        # what stands above it. Above all weights that is next to nothing.
        # None: nothing before it is trained (frozen layers before the first adapter).
        self._output = get_gradient_edge(output) if output.requires_grad else None
        self._grad: Tensor | None = None
        self._waiting: list[_Waiting] = []

    def whole(self, grad: Tensor) -> Tensor | None:
        """Add the gradients of weights to theirs.

        Args:
            grad: of the output.

        Returns:
            The gradient of the input; None for tokens.
        """
        if self._output is not None:
            torch.autograd.backward(self._output, grad)
        return None if self._x is None else self._x.grad

    def input_half(self, grad: Tensor) -> Tensor | None:
        """As `whole`, without the gradients of weights: `weight_half` must follow. All is left to that where the input
        wants no gradient."""
        if self._x is None:
            self._grad = grad
            return None
        assert self._output is not None  # it is made of x
        self._waiting = _weights_of(self._output.node, self._x)
        handles = [waiting.node.register_prehook(waiting.note) for waiting in self._waiting]
        try:
            (grad_x,) = torch.autograd.grad(self._output, self._x, grad, retain_graph=True)
        finally:
            for handle in handles:
                handle.remove()
        return grad_x

    def weight_half(self) -> None:
        """Add the gradients of weights to theirs."""
        if self._grad is not None:
            self.whole(self._grad)
        while self._waiting:
            self._waiting.pop().add_gradients()


class _Waiting:
    """A node of the graph that lies on the way to the stage's input, and has weights beside it."""

    def __init__(self, node: Node, leaves: list[Any]) -> None:
        self.node, self.leaves = node, leaves
        self._grads: tuple[Tensor | None, ...] = ()

    def note(self, grads: tuple[Tensor | None, ...]) -> None:
        """Keep the gradients of the node's outputs."""
        self._grads = grads

    def add_gradients(self) -> None:
        """Go from the node to its weights."""
        there = [(GradientEdge(self.node, i), grad) for i, grad in enumerate(self._grads) if grad is not None]
        edges = [GradientEdge(leaf, 0) for leaf in self.leaves]
        grads = torch.autograd.grad([edge for edge, _ in there], edges, [grad for _, grad in there])
        for leaf, grad in zip(self.leaves, grads, strict=True):
            weight = leaf.variable
            if weight.grad is None:
                weight.grad = grad
            else:
                weight.grad += grad


def _weights_of(root: Node, x: Tensor) -> list[_Waiting]:
    """The nodes below `root` that lie on the way to x, with the leaves beside that way; those nearest x first."""
    to_x: dict[Node, bool] = {}  # node -> whether it leads to x
    leaves: dict[Node, list[Any]] = {}  # node beside the way -> leaves that it leads to
    found: list[_Waiting] = []
    owner: dict[Node, Node] = {}

    def close(node: Node, below: list[Node]) -> None:
        """All that is below a node is known."""
        if hasattr(node, "variable"):
            to_x[node] = node.variable is x
            leaves[node] = [] if to_x[node] else [node]
            return
        to_x[node] = any(to_x[child] for child in below)
        beside = [leaf for child in below if not to_x[child] for leaf in leaves[child]]
        leaves[node] = [] if to_x[node] else beside
        if to_x[node] and beside:
            for leaf in beside:
                assert owner.setdefault(leaf, node) is node, "a weight that a stage uses in two places"
            found.append(_Waiting(node, list(dict.fromkeys(beside))))

    _walk(root, close)
    return found


def _walk(root: Node, close: Callable[[Node, list[Node]], None]) -> None:
    """Call for each node once, after those below it."""
    open_: list[tuple[Node, list[Node] | None]] = [(root, None)]
    seen: set[Node] = set()
    while open_:
        node, below = open_.pop()
        if below is not None:
            close(node, below)
        elif node not in seen:
            seen.add(node)
            below = [child for child, _ in node.next_functions if child is not None]
            open_ += [(node, below), *((child, None) for child in below)]
