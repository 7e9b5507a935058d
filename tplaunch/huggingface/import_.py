"""A Hugging Face folder (safetensors and `config.json`) -> a checkpoint to train on from, on any topology."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tplaunch.checkpoint import store
from tplaunch.checkpoint.write import commit_weights, write_tensors
from tplaunch.data.progress import Progress
from tplaunch.huggingface.slices import Slices, refuse_nonfinite
from tplaunch.huggingface.source import Source


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
    before_commit()
    return commit_weights(
        temporary,
        source.read.model,
        seq_len=source.read.seq_len,
        precision=source.precision,
        origin={"imported_from": str(source.folder.absolute())},
    )


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
    with Progress().task(f"writing {final}", len(parts)) as advance:

        def read(name: str) -> Tensor:
            advance(1)
            whole = torch.empty_like(outlines[name], device="cpu")
            slices.fill(name.removeprefix("model."), whole, [0] * whole.dim())
            return whole

        write_tensors(temporary, outlines, read)
    refuse_nonfinite(slices.source.folder, slices.nonfinite)
