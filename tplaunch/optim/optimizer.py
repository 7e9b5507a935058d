"""The optimizer, on each rank's own shards: torch's fused AdamW, or SGD, on plain tensors that share memory with the
DTensors; or Muon for hidden matrices beside AdamW for the rest.

AdamW's and SGD's updates are element by element, so that they need no communication; Muon gathers matrices
(`tplaunch.optim.muon`). None needs DTensor dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tplaunch.model.build import Stage
from tplaunch.optim.adamw import NarrowAdamW
from tplaunch.optim.muon import HeldMatrix, Muon
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import gradient_dtype, state_dtype
from tplaunch.parallel.shard import ParameterShard, Sharding
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gradients import are_flat
from tplaunch.spec.lora import adapted
from tplaunch.spec.muon import DTYPE, matrix_shape, rounds
from tplaunch.spec.optimizer import Group, Kind, group_of, groups_of, slots
from tplaunch.spec.parameters import parameter_shapes
from tplaunch.spec.slices import kept


class ShardedOptimizer:
    """AdamW with decoupled decay on matrices only (Loshchilov & Hutter 2019, arXiv 1711.05101), SGD, or Muon and AdamW.

    Args:
        stages: this rank's stages.
        recipe: its optimizer, and what it is spread over.
        mesh: the mesh.

    Attributes:
        parts: torch's optimizers, by the kind of parameters that each updates.
    """

    def __init__(self, stages: list[Stage], recipe: Recipe, mesh: Mesh) -> None:
        self.settings = recipe.optimizer
        self.moments, self.gradients = state_dtype(recipe), gradient_dtype(recipe)
        self.shards: list[tuple[Sharding, ParameterShard, nn.Parameter]] = []
        # Of the whole model, in one order, so that ranks of all stages tell the same rates.
        self.groups: dict[Group, list[nn.Parameter]] = {
            group: [] for group in groups_of(self.settings, adapted(parameter_shapes(recipe.model), recipe.lora))
        }
        for stage in stages:
            for shard in stage.sharding.shards:
                if shard.parameter.trained:
                    weight = nn.Parameter(shard.weight)
                    if self.gradients != weight.dtype and are_flat(recipe.topology):
                        weight.grad_dtype = self.gradients
                    self.shards.append((stage.sharding, shard, weight))
                    if weight.numel():
                        self.groups[group_of(self.settings, shard.parameter)].append(weight)
        self.shardings = [stage.sharding for stage in stages]
        self.parts: dict[Kind, torch.optim.Optimizer] = {}
        for kind in dict.fromkeys(group.kind for group in self.groups):
            self.parts[kind] = self._make(kind, recipe, mesh)
        self._rates = dict.fromkeys((group.name for group in self.groups), self.settings.lr)

    def _make(self, kind: Kind, recipe: Recipe, mesh: Mesh) -> torch.optim.Optimizer:
        """The part for one kind of parameters."""
        settings = self.settings
        params: list[dict[str, Any]] = [
            {"params": weights, "decay": group.weight_decay, "weight_decay": group.weight_decay, "factor": group.factor}
            for group, weights in self.groups.items()
            if group.kind == kind
        ]
        if kind == "adamw":
            first, second = settings.betas
            if torch.bfloat16 in (self.moments, self.gradients):
                betas = first, second
                return NarrowAdamW(params, lr=settings.lr, betas=betas, eps=settings.eps, moments=self.moments)
            return torch.optim.AdamW(params, lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True)
        assert settings.momentum is not None
        if kind == "sgd":
            return torch.optim.SGD(params, lr=settings.lr, momentum=settings.momentum)
        matrices = [
            (shard.parameter, weight)
            for _, shard, weight in self.shards
            if group_of(settings, shard.parameter).kind == "muon"
        ]
        topology, layout = mesh.topology, recipe.topology
        rank = dist.get_rank() % topology.stage_size
        return Muon(
            params,
            momentum=settings.momentum,
            held=[
                HeldMatrix(weight, kept(parameter, topology, layout, rank), matrix_shape(parameter))
                for parameter, weight in matrices
            ],
            rounds=rounds([parameter for parameter, _ in matrices], topology, layout),
            rank=rank,
            group=mesh.stage_group() if topology.stage_size > 1 else None,
            dtype=getattr(torch, DTYPE[recipe.training.precision]),
            momentum_dtype=self.moments,
        )

    @property
    def scales(self) -> bool:
        """Whether `step` takes a divisor: AdamW's kernel divides by it while it reads the gradients, in fp32."""
        return self.settings.name == "adamw" and all(weight.dtype == torch.float32 for _, _, weight in self.shards)

    def step(
        self, lr: float, divisor: Tensor | float = 1.0, update: Tensor | None = None, *, decay: float = 1.0
    ) -> None:
        """Update every shard from its gradient, and let the model compute with the new weights.

        Args:
            lr: the learning rate.
            decay: what every group's weight decay is multiplied by.
            divisor: of the gradients, [] or a number; only where the optimizer `scales`.
            update: whether to update at all, bool []; by default, yes.
        """
        if update is not None:  # as torch.amp.GradScaler tells an optimizer
            part: Any = self.parts["adamw"]
            part.grad_scale = torch.as_tensor(divisor, dtype=torch.float32, device=update.device)
            part.found_inf = update.logical_not().float()
        for sharding, shard, weight in self.shards:
            weight.grad = sharding.gradient(shard) if weight.numel() else None
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"], group["weight_decay"] = lr * group["factor"], decay * group["decay"]
            part.step()
        self._rates = {group.name: lr * group.factor for group in self.groups}
        self.publish()

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of the last update, by the name of the group of parameters; the same on every rank."""
        return self._rates

    def settle(self) -> None:
        """Make ready for weights to be read from a file into the shards, or for the world's end."""
        for sharding in self.shardings:
            sharding.settle()

    def publish(self) -> None:
        """Let the model compute with the weights that the shards hold."""
        for sharding in self.shardings:
            sharding.publish()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for _, _, weight in self.shards:
            weight.grad = None
        for sharding in self.shardings:
            sharding.zero_grad()

    def state(self) -> Iterator[tuple[str, DTensor]]:
        """State with its name, "global name.slot", as DTensors laid out like the parameter and sharing the
        optimizer's memory.

        State that the first update has yet to make is made here, zero, so that a checkpoint can be read into it.
        """
        for _, shard, weight in self.shards:
            kind = group_of(self.settings, shard.parameter).kind
            state = self.parts[kind].state[weight]
            for slot in slots(self.settings, kind):
                if state.get(slot) is None:
                    state[slot] = torch.zeros_like(weight, dtype=self.moments)
                    if kind == "adamw":
                        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=weight.device))
                yield f"{shard.parameter.name}.{slot}", like_layout(shard.layout, state[slot])

    def set_updates(self, updates: int) -> None:
        """Set AdamW's step counter (bias correction) after loading a checkpoint."""
        for part in self.parts.values():
            for state in part.state.values():
                if "step" in state:
                    state["step"].fill_(updates)


def like_layout(source: DTensor, shard: Tensor) -> DTensor:
    """A DTensor laid out like another, over a shard of the same shape."""
    return DTensor.from_local(
        shard.detach(),
        source.device_mesh,
        source.placements,
        run_check=False,
        shape=source.shape,
        stride=source.stride(),
    )
