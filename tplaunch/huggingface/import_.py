"""A Hugging Face folder (safetensors and `config.json`) -> a checkpoint to train on from, on any topology."""

from __future__ import annotations

import platform
import shutil
import warnings
from collections.abc import Callable
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
from tplaunch.data.progress import Progress
from tplaunch.huggingface.slices import Slices, refuse_nonfinite
from tplaunch.huggingface.source import Source
from tplaunch.spec.parameters import parameter_count


def import_model(source: Source, out: Path, before_commit: Callable[[], object]) -> Path:
    """Write `out/step-00000000`, a checkpoint with the weights of a Hugging Face folder and no optimizer state.

    Weights keep their dtype. One tensor is held at a time.

    Args:
        source: the folder.
        out: where the checkpoint goes.
        before_commit: called when the weights are written, before the checkpoint gets its name.

    Raises:
        TplaunchError: numbers are not finite, or a file cannot be read. Nothing is written then.
    """
    final = out / store.checkpoint_name(0)
    temporary = out / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    absent = [folder for folder in (out, *out.parents) if not folder.exists()]
    temporary.mkdir(parents=True)
    try:
        with Slices(source) as slices:
            _write(slices, temporary, final)
    except BaseException:
        shutil.rmtree(absent[-1] if absent else temporary, ignore_errors=True)
        raise
    files = {path.name: store.hash_file(path) for path in sorted(temporary.iterdir())}
    model = source.read.model
    about: dict[str, Any] = {
        "recipe_sha256": None,
        "topology": {},
        "model": model.model_dump(mode="json"),
        "seq_len": source.read.seq_len,
        "precision": source.precision,
        "parameters": parameter_count(model),
        "optimizer_state": [],
        "wandb_id": None,
        "imported_from": str(source.folder.absolute()),
        "tplaunch": tplaunch.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    state = {"progress": asdict(TrainingProgress()), "loss_scale": None}
    before_commit()
    return store.commit(temporary, store.Manifest(0, state, about, files))


def _write(slices: Slices, temporary: Path, final: Path) -> None:
    """Write every tensor.

    Raises:
        TplaunchError: some are not finite; says which.
    """
    parts = slices.source.parts
    outlines = {
        f"model.{name}": torch.empty(part.parameter.shape, dtype=slices.dtype(name), device="meta")
        for name, part in parts.items()
    }
    with Progress().task(f"writing {final}", len(parts)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        save(
            outlines,
            storage_writer=FileSystemWriter(str(temporary), single_file_per_rank=True, sync_files=True),
            planner=_OneByOne(slices, advance),
            no_dist=True,
        )
    refuse_nonfinite(slices.source.folder, slices.nonfinite)


class _OneByOne(DefaultSavePlanner):
    """Reads a tensor only when it is written."""

    def __init__(self, slices: Slices, advance: Any) -> None:
        super().__init__()
        self._slices = slices
        self._advance = advance

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        self._advance(1)
        name = index.fqn.removeprefix("model.")
        shape = self._slices.source.parts[name].parameter.shape
        whole = torch.empty(shape, dtype=self._slices.dtype(name))
        self._slices.fill(name, whole, [0] * len(shape))
        return whole
