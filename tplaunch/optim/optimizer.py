"""The optimizer, on each rank's own shards: torch's fused AdamW, or SGD, on plain tensors that share memory with the
DTensors.

The update is element by element, so that it needs no communication and no DTensor dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tplaunch.model.build import Stage
from tplaunch.parallel.shard import ParameterShard, Sharding
from tplaunch.recipe.schema import Optimizer

_DECAYED = frozenset({"matrix", "expert", "router", "embedding", "position", "output"})


class ShardedOptimizer:
    """AdamW with decoupled decay on matrices only (Loshchilov & Hutter 2019, arXiv 1711.05101), or SGD.

    Args:
        stages: this rank's stages.
        settings: the recipe's section.
    """

    def __init__(self, stages: list[Stage], settings: Optimizer) -> None:
        self.settings = settings
        self.shards: list[tuple[Sharding, ParameterShard, nn.Parameter]] = []
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for stage in stages:
            for shard in stage.sharding.shards:
                weight = nn.Parameter(shard.weight)
                self.shards.append((stage.sharding, shard, weight))
                if weight.numel():
                    groups[shard.parameter.role in _DECAYED].append(weight)
        self.shardings = [stage.sharding for stage in stages]
        decays = {True: settings.weight_decay, False: 0.0}
        names = {True: "decay", False: "no_decay"}
        params = [
            {"params": shards, "weight_decay": decays[key], "name": names[key]}
            for key, shards in groups.items()
            if shards
        ]
        if settings.name == "adamw":
            first, second = settings.betas
            self.inner: torch.optim.Optimizer = torch.optim.AdamW(
                params, lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
            )
        else:
            self.inner = torch.optim.SGD(params, lr=settings.lr, momentum=settings.momentum)

    @property
    def scales(self) -> bool:
        """Whether `step` takes a divisor: AdamW's kernel divides by it while it reads the gradients, in fp32."""
        return self.settings.name == "adamw" and all(weight.dtype == torch.float32 for _, _, weight in self.shards)

    def step(self, lr: float, divisor: Tensor | float = 1.0, update: Tensor | None = None) -> None:
        """Update every shard from its gradient, and let the model compute with the new weights.

        Args:
            lr: the learning rate.
            divisor: of the gradients, [] or a number; only where the optimizer `scales`.
            update: whether to update at all, bool []; by default, yes.
        """
        if update is not None:  # as torch.amp.GradScaler tells an optimizer
            divisor = torch.as_tensor(divisor, dtype=torch.float32, device=update.device)
            self.inner.grad_scale, self.inner.found_inf = divisor, update.logical_not().float()  # type: ignore[attr-defined]
        for sharding, shard, weight in self.shards:
            weight.grad = sharding.gradient(shard) if weight.numel() else None
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        self.publish()

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of the last update, by the name of the group of parameters."""
        return {group["name"]: group["lr"] for group in self.inner.param_groups}

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

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors that each parameter has."""
        if self.settings.name == "adamw":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum_buffer",) if self.settings.momentum else ()

    def state(self) -> Iterator[tuple[str, DTensor]]:
        """State with its name, "global name.slot", as DTensors laid out like the parameter and sharing the
        optimizer's memory.

        State that the first update has yet to make is made here, zero, so that a checkpoint can be read into it.
        """
        for _, shard, weight in self.shards:
            state = self.inner.state[weight]
            for slot in self.slots:
                if state.get(slot) is None:
                    state[slot] = torch.zeros_like(weight)
                    if self.settings.name == "adamw":
                        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=weight.device))
                yield f"{shard.parameter.name}.{slot}", _like(shard.layout, state[slot])

    def set_updates(self, updates: int) -> None:
        """Set AdamW's step counter (bias correction) after loading a checkpoint."""
        for state in self.inner.state.values():
            if "step" in state:
                state["step"].fill_(updates)


def _like(source: DTensor, shard: Tensor) -> DTensor:
    return DTensor.from_local(
        shard.detach(),
        source.device_mesh,
        source.placements,
        run_check=False,
        shape=source.shape,
        stride=source.stride(),
    )
