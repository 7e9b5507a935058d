"""Microbatches through several pipeline stages, in the order that a schedule states (`spec.orders`).

What a rank holds depends on the microbatches in flight, never on their number:

    a stage's input      from the receive that was posted for it to its backward pass
    its output           until it is sent; the backward pass needs its place in the graph alone
    a gradient received  from the receive that was posted for it to the end of the backward pass that it begins
"""

from __future__ import annotations

import torch
from torch import Tensor

from tplaunch.model.build import Stage
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.messages import Transfer, made, needed, with_messages
from tplaunch.spec.orders import Action, actions_of
from tplaunch.train.backward import Pass
from tplaunch.train.batch import Batch
from tplaunch.train.exchange import Exchange
from tplaunch.train.pipeline import Pipeline, hidden_states


class ScheduledPipeline(Pipeline):
    """Runs batches through the stages of pp > 1 ranks."""

    def __init__(self, stages: list[Stage], mesh: Mesh, recipe: Recipe) -> None:
        super().__init__(stages, mesh, recipe)
        self._like = hidden_states(recipe, mesh)
        self._program: list[Action | Transfer] = []
        self._microbatches = 0  # of the program

    def train(self, batch: Batch, loss_scale: float) -> Tensor:
        """See `Pipeline.train`."""
        self.set_training(True)
        parts = self.microbatches(batch)
        if len(parts) != self._microbatches:
            self._program, self._microbatches = self._make_program(len(parts)), len(parts)
        for stage in self.stages:
            stage.sharding.begin_step(len(parts))
        step = _Step(self.stages, self.num_stages, Exchange(self.group, self._like, self.mesh.device))
        for item in self._program:
            if isinstance(item, Transfer):
                step.exchange.move(item)
            elif item.kind == "F":
                step.forward(item, parts[item.microbatch], loss_scale)
            else:
                step.backward(item)
        step.exchange.finish()
        self.reshard()
        return self.sum_losses(step.losses)

    def _make_program(self, microbatches: int) -> list[Action | Transfer]:
        """This rank's passes, sends and receives."""
        layout = self.recipe.topology
        orders = [
            actions_of(layout.schedule, rank, layout.pp, layout.virtual_stages, microbatches)
            for rank in range(layout.pp)
        ]
        return with_messages(orders, layout.schedule, self.num_stages)[self.mesh.coordinates.pp]


class _Step:
    """The microbatches in flight.

    Args:
        stages: this rank's.
        num_stages: of all ranks.
        exchange: what goes between stages.
    """

    def __init__(self, stages: list[Stage], num_stages: int, exchange: Exchange) -> None:
        self.modules = {stage.index: stage.module for stage in stages}
        self.last = num_stages - 1
        self.exchange = exchange
        self.losses: list[Tensor] = []
        self._passes: dict[tuple[int, int], Pass] = {}  # (stage, microbatch) -> in flight

    def forward(self, action: Action, part: Batch, loss_scale: float) -> None:
        """Run a forward pass."""
        need = needed(action, self.last)
        x = part.tokens if need is None else self.exchange.take(need).requires_grad_()
        output = self.modules[action.stage](x, part.labels, part.positions, loss_scale)
        self._passes[action.stage, action.microbatch] = Pass(x, output)
        message = made(action, self.last)
        if message is None:
            self.losses.append(output.detach())
        else:
            self.exchange.put(message, output.detach())

    def backward(self, action: Action) -> None:
        """Run a backward pass, or a half of one."""
        place = action.stage, action.microbatch
        if action.kind == "W":
            self._passes.pop(place).weight_half()
            return
        need = needed(action, self.last)
        grad = torch.ones_like(self.losses[action.microbatch]) if need is None else self.exchange.take(need)
        if action.kind == "B":
            grad_x = self._passes.pop(place).whole(grad)
        else:
            grad_x = self._passes[place].input_half(grad)
        message = made(action, self.last)
        if message is not None:
            assert grad_x is not None
            self.exchange.put(message, grad_x)
