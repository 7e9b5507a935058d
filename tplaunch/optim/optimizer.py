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
from tplaunch.optim.gradients import local_grad
from tplaunch.recipe.schema import Optimizer

_DECAYED = frozenset({"matrix", "embedding", "position", "output"})


class ShardedOptimizer:
    """AdamW with decoupled decay on matrices only (Loshchilov & Hutter 2019, arXiv 1711.05101), or SGD.

    Args:
        stages: this rank's stages.
        settings: the recipe's section.
    """

    def __init__(self, stages: list[Stage], settings: Optimizer) -> None:
        self.settings = settings
        self.sources: list[tuple[str, DTensor]] = []  # (global name, parameter)
        self.shards: list[nn.Parameter] = []
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for stage in stages:
            for name, tensor in stage.module.named_parameters():
                assert isinstance(tensor, DTensor)
                parameter = stage.parameters[name]
                shard = nn.Parameter(tensor.to_local().detach())
                self.sources.append((parameter.name, tensor))
                self.shards.append(shard)
                if shard.numel():
                    groups[parameter.role in _DECAYED].append(shard)
        decays = {True: settings.weight_decay, False: 0.0}
        params = [{"params": shards, "weight_decay": decays[key]} for key, shards in groups.items() if shards]
        if settings.name == "adamw":
            first, second = settings.betas
            self.inner: torch.optim.Optimizer = torch.optim.AdamW(
                params, lr=settings.lr, betas=(first, second), eps=settings.eps, fused=True
            )
        else:
            self.inner = torch.optim.SGD(params, lr=settings.lr, momentum=settings.momentum)

    def step(self, lr: float) -> None:
        """One update of every shard, from the gradients that the parameters have."""
        for (_, source), shard in zip(self.sources, self.shards, strict=True):
            shard.grad = local_grad(source) if shard.numel() else None
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for (_, source), shard in zip(self.sources, self.shards, strict=True):
            source.grad = shard.grad = None

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
        for (name, source), shard in zip(self.sources, self.shards, strict=True):
            state = self.inner.state[shard]
            for slot in self.slots:
                if state.get(slot) is None:
                    state[slot] = torch.zeros_like(shard)
                    if self.settings.name == "adamw":
                        state.setdefault("step", torch.zeros((), dtype=torch.float32, device=shard.device))
                yield f"{name}.{slot}", _like(source, state[slot])

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
