"""Writing the tensors of a checkpoint from one process, one tensor after the other."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

import tplaunch
from tplaunch.checkpoint import store
from tplaunch.checkpoint.state import TrainingProgress
from tplaunch.recipe.schema import Model, Precision
from tplaunch.spec.parameters import parameter_count


def write_tensors(folder: Path, outlines: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write tensors into a folder, as DCP does; one is held at a time.

    Args:
        outlines: their shapes and dtypes by name, on the meta device.
        read: gives one; called when it is written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        save(
            dict(outlines),
            storage_writer=FileSystemWriter(str(folder), single_file_per_rank=True, sync_files=True),
            planner=_OneByOne(read),
            no_dist=True,
        )


def commit_weights(
    temporary: Path, model: Model, *, seq_len: int, precision: Precision, origin: Mapping[str, Any]
) -> Path:
    """Give a folder of written weights its manifest and its name: step 0, no optimizer state.

    Args:
        temporary: the folder, `step-00000000.tmp`.
        origin: more facts for the manifest: where they are from.
    """
    files = {path.name: store.hash_file(path) for path in sorted(temporary.iterdir())}
    about: dict[str, Any] = {
        "recipe_sha256": None,
        "topology": {},
        "model": model.model_dump(mode="json"),
        "seq_len": seq_len,
        "precision": precision,
        "parameters": parameter_count(model),
        "optimizer_state": [],
        "wandb_id": None,
        **origin,
        "tplaunch": tplaunch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    state = {"progress": asdict(TrainingProgress()), "loss_scale": None}
    return store.commit(temporary, store.Manifest(0, state, about, files))


class _OneByOne(DefaultSavePlanner):
    """Reads a tensor only when it is written."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._read(index.fqn)
