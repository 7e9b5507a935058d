"""A Hugging Face folder (safetensors and `config.json`) -> a checkpoint to train on from, on any topology."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tplaunch.checkpoint import store
from tplaunch.checkpoint.write import commit_weights, write_tensors
from tplaunch.data.beside import blobs_of
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import Unsafe, inside, open_regular
from tplaunch.huggingface.config import Read
from tplaunch.huggingface.families import Family
from tplaunch.huggingface.tensors import HfTensor, embedding_name, hf_tensors, output_name
from tplaunch.huggingface.ways import unpack
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Precision
from tplaunch.spec.parameters import Parameter

_INDEX = "model.safetensors.index.json"
# What old files have beside the weights: masks, rotary tables, a tied matrix said twice.
_NO_WEIGHTS = (
    *(f".{module}.{mask}" for module in ("attn", "attention") for mask in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)
_MAX_HEADER = 10**8  # bytes; the format's own limit
_ROWS = 4096  # of a matrix, compared at a time
_PREFIX = "transformer."  # GPT-2's published files leave it out


def import_model(folder: Path, out: Path, read: Read, before_commit: Callable[[], object]) -> Path:
    """Write `out/step-00000000`, a checkpoint with the weights of a Hugging Face folder and no optimizer state.

    Weights keep their dtype. One tensor is held at a time.

    Args:
        folder: with the safetensors files.
        out: where the checkpoint goes.
        read: the model in them.
        before_commit: called when the weights are written, before the checkpoint gets its name.

    Raises:
        TplaunchError: the folder holds no such model, or not all of it, or numbers that are not finite, or would have
            us read outside of it; or `out` holds a checkpoint already. Nothing is written then.
    """
    final = out / store.checkpoint_name(0)
    temporary = out / f"{final.name}.tmp"
    with ExitStack() as opened:
        tied = output_name(read.family) if read.model.tie_embeddings else None
        source = _Source(folder, hf_tensors(read.model, read.family), opened, tied=tied, left_out=read.left_out)
        shutil.rmtree(temporary, ignore_errors=True)
        absent = [folder for folder in (out, *out.parents) if not folder.exists()]
        temporary.mkdir(parents=True)
        try:
            _write(source, temporary, final)
        except BaseException:
            shutil.rmtree(absent[-1] if absent else temporary, ignore_errors=True)
            raise
    before_commit()
    origin = {"imported_from": str(folder.absolute())}
    return commit_weights(temporary, read.model, seq_len=read.seq_len, precision=source.precision, origin=origin)


def head_is_its_own(folder: Path, family: Family) -> bool:
    """Whether a folder has an output matrix that differs from its embedding: a fine-tuned head, under a
    `config.json` that ties the two. transformers then does not tie them.

    Raises:
        TplaunchError: a file cannot be read.
    """
    embedding, head = embedding_name(family), output_name(family)
    with ExitStack() as opened:
        files = [opened.enter_context(_open(path)) for path in _files(folder)]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)
        ours = embedding if embedding in where else embedding.removeprefix(_PREFIX)
        if ours not in where or head not in where:
            return False
        one, other = where[ours].get_slice(ours), where[head].get_slice(head)
        if one.get_shape() != other.get_shape():
            return True
        rows = range(0, one.get_shape()[0], _ROWS)
        return any(not torch.equal(one[at : at + _ROWS], other[at : at + _ROWS]) for at in rows)


def holds(folder: Path, prefixes: tuple[str, ...]) -> bool:
    """Whether a folder has tensors whose names begin like that.

    Raises:
        TplaunchError: a file cannot be read.
    """
    if not prefixes:
        return False
    with ExitStack() as opened:
        files = [opened.enter_context(_open(path)) for path in _files(folder)]
        return any(key.startswith(prefixes) for file in files for key in file.keys())  # noqa: SIM118 (no mapping)


def _write(source: _Source, temporary: Path, final: Path) -> None:
    """Write every tensor.

    Raises:
        TplaunchError: some are not finite; says which.
    """
    with Progress().task(f"writing {final}", len(source.parts)) as advance:

        def read(name: str) -> Tensor:
            advance(1)
            return source.read(name)

        write_tensors(temporary, {name: source.outline(name) for name in source.parts}, read)
    if source.nonfinite:
        said = [f"{count:,} of {key}" for key, count in sorted(source.nonfinite.items())]
        more = f", and of {len(said) - 3} tensors more" if len(said) > 3 else ""
        raise TplaunchError(Problem(f"{source.folder}: numbers are NaN or infinite: {', '.join(said[:3])}{more}"))


class _Source:
    """The tensors of a folder, by the names that they have in a checkpoint.

    Args:
        tied: an output matrix that may lie there, too, and is the embedding.
        left_out: how the names of others begin that may lie there.

    Attributes:
        nonfinite: of the tensors read so far, those with numbers that are NaN or infinite: how many.

    Raises:
        TplaunchError: some are missing, too many, of another shape, or no floating-point numbers; says all.
    """

    def __init__(
        self,
        folder: Path,
        tensors: list[HfTensor],
        opened: ExitStack,
        *,
        tied: str | None,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.folder = folder
        self.nonfinite: dict[str, int] = {}
        files = [opened.enter_context(_open(path)) for path in _files(folder)]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (no mapping)
        problems: list[str] = []
        self.parts: dict[str, tuple[Parameter, list[tuple[HfTensor, int]]]] = {}  # where each is said
        self._read: dict[str, tuple[Any, str]] = {}  # our tensor's name in the files -> (file, key)
        dtypes = set()
        for tensor in tensors:
            key = tensor.name if tensor.name in where else tensor.name.removeprefix(_PREFIX)
            if key not in where:
                problems.append(f"has no {tensor.name}")
                continue
            file = where.pop(key)
            found = file.get_slice(key)
            if tuple(found.get_shape()) != tensor.shape:
                problems.append(f"{key} is {found.get_shape()}, and config.json makes it {list(tensor.shape)}")
            if not tensor.wide:
                dtypes.add(found.get_dtype())
            self._read[tensor.name] = file, key
            for place, part in enumerate(tensor.parts):
                self.parts.setdefault(f"model.{part.name}", (part, []))[1].append((tensor, place))
        extra = [key for key in where if not key.endswith(_NO_WEIGHTS) and not key.startswith(left_out) and key != tied]
        problems += [f"{key} is none of the model's tensors" for key in extra]
        if other := dtypes - _PRECISIONS.keys():
            problems.append(f"holds {', '.join(sorted(other))}: quantized weights cannot be trained")
        if problems:
            raise TplaunchError(*(Problem(f"{folder}: {text}") for text in problems[:20]))
        # The dtype that holds them all exactly.
        self.precision: Precision = (
            _PRECISIONS[dtypes.pop()] if len(dtypes) == 1 else "fp64" if "F64" in dtypes else "fp32"
        )

    def outline(self, name: str) -> Tensor:
        """A tensor's shape and dtype, without its numbers."""
        part, said = self.parts[name]
        return torch.empty(part.shape, dtype=self._dtype(said[0][0]), device="meta")

    def _dtype(self, tensor: HfTensor) -> torch.dtype:
        dtype = COMPUTE_DTYPE[self.precision]
        return torch.promote_types(dtype, torch.float32) if tensor.wide else dtype

    def read(self, name: str) -> Tensor:
        """A tensor as our model has it; rows that pad the vocabulary are zero."""
        part, said = self.parts[name]
        whole, first = torch.empty(part.shape, dtype=self._dtype(said[0][0])), 0
        for tensor, place in said:
            file, key = self._read[tensor.name]
            mine = unpack(tensor, file.get_tensor(key), place)
            whole[first : first + len(mine)] = mine
            first += len(mine)
            if bad := mine.numel() - int(mine.isfinite().sum()):
                self.nonfinite[key] = self.nonfinite.get(key, 0) + bad
        whole[first:] = 0
        return whole


_PRECISIONS: dict[str, Precision] = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def _files(folder: Path) -> list[Path]:
    """The files with the weights."""
    blobs = blobs_of(folder)
    index, names = folder / _INDEX, ["model.safetensors"]
    try:
        if index.exists():
            inside(folder, _INDEX, also=blobs)
            with open_regular(index) as file:
                names = list(json.loads(file.read())["weight_map"].values())
        return [inside(folder, name, also=blobs) for name in sorted(set(names))]
    except Unsafe as error:
        raise TplaunchError(Problem(f"{index if index.exists() else folder} {error}")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TplaunchError(Problem(f"{index} cannot be read", why=f"{type(error).__name__}: {error}")) from None


def _open(path: Path) -> Any:
    try:
        _check_header(path)
        return safe_open(path, framework="pt")
    except Unsafe as error:
        raise TplaunchError(Problem(f"{path}: {error}")) from None
    except (OSError, SafetensorError) as error:
        fix = "download it again; files of pickled weights (.bin, .pth) are not read"
        raise TplaunchError(Problem(f"{path} cannot be read", why=str(error), fix=fix)) from None


def _check_header(path: Path) -> None:
    """Refuse a header that cannot be: its length is the file's first eight bytes, and the reader makes room for it."""
    with open_regular(path) as file:
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
        raise Unsafe(f"its first bytes promise a header of {length:,} bytes, in a file of {size:,}")
