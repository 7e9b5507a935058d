"""Bytes that one rank's real trainer holds while it steps: every storage that an operation makes is counted."""

from __future__ import annotations

import weakref
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.recipes import resolved
from tplaunch.kernels import matmul
from tplaunch.model.build import build_stages
from tplaunch.optim.gradients import GradientFinalizer
from tplaunch.optim.optimizer import ShardedOptimizer
from tplaunch.parallel.mesh import Mesh
from tplaunch.train.batch import Batch
from tplaunch.train.step import TrainStep, make_pipeline


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of all live storages after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak = 0

    def add(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _, key=key: self.known.pop(key, None))

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for ref in list(self.known.values()) if (storage := ref()) is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.add(leaf._local_tensor if isinstance(leaf, DTensor) else leaf)
        self.peak = max(self.peak, self.bytes)
        return result


def measure(values: dict[str, Any]) -> dict[str, int]:
    """Run two steps of a recipe on this rank, on random tokens, and count.

    Matmuls are torch's own here, which write to where a product belongs, as on the GPUs that the planner counts for;
    oneDNN's have memory of their own first.

    Returns:
        Bytes: `weights`, `optimizer` and `gradients`, this rank's shards of them; `peak`, everything at the fullest
        moment of the second step.
    """
    recipe = resolved(values)
    layout, training = recipe.topology, recipe.training
    assert isinstance(layout.dp, int)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    with patch.object(matmul, "_onednn_is_faster", return_value=False), StorageCounter() as counter:
        stages = build_stages(recipe, mesh)
        pipeline = make_pipeline(stages, mesh, recipe)
        optimizer = ShardedOptimizer(stages, recipe, mesh)
        finalizer = GradientFinalizer(
            stages,
            mesh,
            schedule=layout.schedule,
            num_stages=pipeline.num_stages,
            tied=recipe.model.tie_embeddings,
        )
        share = training.global_batch_size // layout.dp
        torch.manual_seed(dist.get_rank())
        tokens = torch.randint(recipe.model.vocab_size, (share, training.seq_len))
        held = [(stage.sharding, shard) for stage in stages for shard in stage.sharding.shards]
        for _ in range(2):
            counter.peak = 0
            pipeline.train(Batch(tokens, tokens), 1.0 / training.global_batch_size)
            finalizer.complete()
            trained = [(sharding, shard) for sharding, shard in held if shard.parameter.trained]
            gradients = sum(sharding.gradient(shard).nbytes for sharding, shard in trained)
            optimizer.step(1e-3)
            optimizer.zero_grad()
        states = [
            t for part in optimizer.parts.values() for s in part.state.values() for t in s.values() if t.numel() > 1
        ]
        return {
            "weights": sum(shard.weight.nbytes for _, shard in held),
            "optimizer": sum(t.nbytes for t in states),
            "gradients": gradients,
            "peak": counter.peak,
        }


def peaks(values: dict[str, Any], counts: list[int]) -> list[int]:
    """Run a step of each of so many microbatches on this rank, one after the other, and count.

    Returns:
        Bytes at each step's fullest moment, without its tokens.
    """
    recipe = resolved(values)
    found = []
    with StorageCounter() as counter:
        step = TrainStep(recipe, Mesh.of(recipe, torch.device("cpu")))
        for count in [counts[0], *counts]:  # the first makes the optimizer's state
            shape = (count * recipe.training.micro_batch_size, recipe.training.seq_len)
            tokens = torch.randint(recipe.model.vocab_size, shape)
            counter.peak = 0
            step.run(Batch(tokens, tokens))
            found.append(counter.peak - tokens.nbytes)
    return found[1:]
