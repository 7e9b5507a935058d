"""The mean of checkpoints' weights: of steps of a run, or of runs (Izmailov et al. 2018, arXiv 1803.05407; as Llama 3,
arXiv 2407.21783, section 3.4.3, and OLMo 2, arXiv 2501.00656, section 4.1, end their training)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tplaunch.checkpoint import store
from tplaunch.checkpoint.fit import model_differences
from tplaunch.checkpoint.load import dtype_of, load_tensors
from tplaunch.checkpoint.metadata import Stored, read_metadata
from tplaunch.checkpoint.write import commit_weights, write_tensors
from tplaunch.data.beside import TOKENIZER, copy_text
from tplaunch.data.progress import Progress
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.recipe.schema import Model

_PIECE = 1 << 24  # numbers that are added in fp64 at a time


def average(
    checkpoints: Sequence[Path], out: Path, weights: Sequence[float] | None = None, tokenizer: Path | None = None
) -> Path:
    """Write `out/step-00000000`, whose weights are the mean of those of checkpoints of any topologies. Of each tensor
    the sum and one checkpoint's are held, one tensor at a time.

    Args:
        checkpoints: two or more, of one model.
        out: where it goes.
        weights: of each, above zero; default: all alike.
        tokenizer: a tokenizer.json to put beside it.

    Raises:
        TplaunchError: `out` exists, or they are damaged, of different models, or adapters alone. Nothing is written
            then.
    """
    if out.exists():
        raise TplaunchError(Problem(f"{out} exists already", fix="name another folder, or remove it", key="--output"))
    manifests = [_whole(path) for path in checkpoints]
    if alone := [path for path, one in zip(checkpoints, manifests, strict=True) if one.about.get("lora") is not None]:
        why = "a mean of factors is no factor of the mean, and what they belong to is elsewhere"
        fix = "average what `tplaunch export --merge` and `tplaunch import` make of them"
        raise TplaunchError(Problem(f"{alone[0]} holds adapters alone", why, fix))
    stored = [read_metadata(path) for path in checkpoints]
    model = Model.model_validate(manifests[0].about["model"])
    outlines = {name: _outline(name, stored) for name in stored[0].tensors if name.startswith("model.")}
    problems = []
    for path, manifest, tensors in zip(checkpoints, manifests, stored, strict=True):
        differ = model_differences(manifest.about["model"], model)
        problems += [f"{path} has {key}={theirs}, {checkpoints[0]} {ours}" for key, theirs, ours in differ]
        lacking = [
            name for name, whole in outlines.items() if name not in tensors.tensors or _size(tensors, name, whole)
        ]
        problems += [f"{path} has another {name} than {checkpoints[0]}" for name in lacking[:1] if not differ]
    if problems:
        raise TplaunchError(*(Problem(text, fix="average checkpoints of one model") for text in problems))
    given = [1.0] * len(checkpoints) if weights is None else list(weights)
    shares = [weight / sum(given) for weight in given]
    temporary = out / f"{store.checkpoint_name(0)}.tmp"
    temporary.mkdir(parents=True)
    try:
        with Progress().task(f"writing {out}", len(outlines)) as advance:

            def read(name: str) -> Tensor:
                advance(1)
                return _mean(name, checkpoints, stored, shares, outlines[name])

            write_tensors(temporary, outlines, read)
        if tokenizer is not None:
            if tokenizer.name == TOKENIZER:
                copy_text(tokenizer.parent, out)
            shutil.copyfile(tokenizer, out / TOKENIZER)
        about = manifests[0].about
        return commit_weights(
            temporary,
            model,
            seq_len=about["seq_len"],
            precision=about["precision"],
            origin={"averaged_from": _words(checkpoints, manifests, shares)},
        )
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _whole(path: Path) -> store.Manifest:
    manifest = store.open_checkpoint(path)
    if found := store.damage(path, manifest):
        raise TplaunchError(*(Problem(text) for text in found), code=Exit.FAILED)
    return manifest


def _outline(name: str, stored: Sequence[Stored]) -> Tensor:
    """Shape of a tensor, and the dtype that holds all of them."""
    dtype = dtype_of(stored[0].tensors[name])
    for other in stored[1:]:
        if name in other.tensors:
            dtype = torch.promote_types(dtype, dtype_of(other.tensors[name]))
    return torch.empty(stored[0].tensors[name].size, dtype=dtype, device="meta")


def _size(stored: Stored, name: str, whole: Tensor) -> bool:
    return stored.tensors[name].size != tuple(whole.shape)


def _mean(
    name: str, checkpoints: Sequence[Path], stored: Sequence[Stored], shares: Sequence[float], outline: Tensor
) -> Tensor:
    """The weighted sum of a tensor, in fp64, rounded once."""
    total = torch.zeros(outline.numel(), dtype=torch.float64)
    for path, tensors, share in zip(checkpoints, stored, shares, strict=True):
        one = torch.empty(outline.shape, dtype=dtype_of(tensors.tensors[name]))
        load_tensors({name: one}, path, alone=True)
        for sum_, part in zip(total.split(_PIECE), one.reshape(-1).split(_PIECE), strict=True):
            sum_.add_(part.double(), alpha=share)
    return total.to(outline.dtype).view(outline.shape)


def _words(
    checkpoints: Sequence[Path], manifests: Sequence[store.Manifest], shares: Sequence[float]
) -> list[dict[str, Any]]:
    rows = zip(checkpoints, manifests, shares, strict=True)
    return [{"path": str(path.absolute()), "step": one.step, "weight": share} for path, one, share in rows]
