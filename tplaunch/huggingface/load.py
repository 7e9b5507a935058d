"""A Hugging Face folder into the tensors of a run: each rank reads its own slices, and no checkpoint is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from tplaunch.checkpoint.load import load_by, load_tensors
from tplaunch.huggingface.config import is_model_folder
from tplaunch.huggingface.slices import Slices, refuse_nonfinite
from tplaunch.huggingface.source import open_folder
from tplaunch.recipe.schema import Model


def load_weights(tensors: dict[str, Any], path: Path, model: Model, *, alone: bool = False, ema: bool = False) -> None:
    """Fill tensors from a checkpoint or from a folder, in place. Every rank calls it, unless `alone`.

    Args:
        ema: of a checkpoint, the averages (`load_tensors`).

    Raises:
        TplaunchError: see `load_tensors` and `load_folder`.
    """
    if is_model_folder(path):
        load_folder(tensors, path, model, alone=alone)
    else:
        load_tensors(tensors, path, alone=alone, ema=ema)


def load_folder(
    tensors: dict[str, Any], folder: Path, model: Model, group: dist.ProcessGroup | None = None, *, alone: bool = False
) -> None:
    """Fill tensors from a folder, in place, as its import and a load of that would. Every rank calls it.

    Args:
        tensors: by global name (`checkpoint.state.named_tensors`); DTensors get their shards.
        folder: of the model, as far as its weights are concerned (`launch.initial`).
        model: the recipe's.
        group: the ranks that load; default: all.
        alone: only this process loads.

    Raises:
        TplaunchError: it has changed since the launch looked at it, is damaged, or holds numbers that are not finite;
            on every rank.
    """
    source = open_folder(folder, vocab_multiple=model.make_vocab_size_divisible_by, tied=model.tie_embeddings)
    with Slices(source) as slices:
        load_by(_Reader(slices), tensors, folder, group=group, alone=alone)
    everyone = [slices.nonfinite]
    if not alone:
        everyone *= dist.get_world_size(group)
        dist.all_gather_object(everyone, slices.nonfinite, group=group)
    found: dict[str, int] = {}
    for key, count in (pair for one in everyone for pair in one.items()):
        found[key] = max(found.get(key, 0), count)  # ranks that hold the same slice count the same numbers
    refuse_nonfinite(folder, found, key="checkpoint.initial")


class _Reader(StorageReader):
    """What DCP reads of a folder: each parameter as one piece, of which ranks ask for their slices."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: dict[str, Any] = {}
        for name, part in self._slices.source.parts.items():
            shape = torch.Size(part.parameter.shape)
            whole = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
            found[f"model.{name}"] = TensorStorageMetadata(TensorProperties(self._slices.dtype(name)), shape, [whole])
        return Metadata(state_dict_metadata=found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            self._slices.fill(item.storage_index.fqn.removeprefix("model."), target, item.storage_offsets)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
