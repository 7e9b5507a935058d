"""The tensors of a Hugging Face folder: in which file, at which bytes, and what each says of ours. Torch-free: what a
folder lacks is said before any process starts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

from tplaunch.data.beside import blobs_of
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import Unsafe, inside, open_regular
from tplaunch.huggingface.config import CONFIG, Read, read_config
from tplaunch.huggingface.families import Family
from tplaunch.huggingface.tensors import HfTensor, embedding_name, hf_tensors, output_name
from tplaunch.recipe.schema import Precision
from tplaunch.spec.parameters import Parameter

_INDEX = "model.safetensors.index.json"
# What old files have beside the weights: masks, rotary tables, a tied matrix said twice.
_NO_WEIGHTS = (
    *(f".{module}.{mask}" for module in ("attn", "attention") for mask in ("bias", "masked_bias")),
    ".rotary_emb.inv_freq",
)
_MAX_HEADER = 10**8  # bytes; the format's own limit
_PIECE = 1 << 24  # bytes of two matrices, compared at a time
_PREFIX = "transformer."  # GPT-2's published files leave it out
_PRECISIONS: dict[str, Precision] = {"F64": "fp64", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}

UNTIED = (
    "config.json says tie_word_embeddings, but lm_head.weight differs from the embedding: "
    "imported untied (tie_embeddings: false), as transformers reads it"
)


class Stored(NamedTuple):
    """Where a tensor lies.

    Args:
        file: the file.
        key: its name there.
        dtype: as the format calls it.
        shape: its shape.
        begin: its first byte in the file; it lies in row-major order, without gaps.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Part(NamedTuple):
    """One of our parameters.

    Args:
        parameter: which.
        said: the tensors of the files that say it, each with its place among that tensor's parts.
    """

    parameter: Parameter
    said: list[tuple[HfTensor, int]]


class Source(NamedTuple):
    """A folder whose tensors are those of a model.

    Args:
        folder: the folder.
        read: what `config.json` says, with `tie_embeddings` as the weights have it.
        parts: ours, by name.
        stored: where the tensors of the files lie, by the name that transformers has for them.
        precision: the narrowest that holds them all exactly.
        warnings: what of the folder is taken otherwise than one may think.
    """

    folder: Path
    read: Read
    parts: dict[str, Part]
    stored: dict[str, Stored]
    precision: Precision
    warnings: list[str]


def open_folder(
    folder: Path, *, vocab_multiple: int | None = None, tied: bool | None = None, check: Callable[[Read], object] = bool
) -> Source:
    """Look at a folder: its `config.json`, and the headers of its files.

    Args:
        vocab_multiple: of which our vocabulary is padded to one (`model.make_vocab_size_divisible_by`).
        tied: whether its output matrix is the embedding, where that is known; else the two are compared, if both are
            there.
        check: told what `config.json` says before its tensors are compared with it.

    Raises:
        TplaunchError: see `read_config`; a file cannot be read; or tensors are missing, too many, of another shape, or
            no floating-point numbers; says all.
    """
    read, warnings = read_config(folder / CONFIG), []
    where = {found.key: found for path in _files(folder) for found in _header(path)}
    if read.left_out and any(key.startswith(read.left_out) for key in where):
        warnings.append("layers that predict further tokens are left out: the model predicts the next one alone")
    changes = {} if vocab_multiple is None else {"make_vocab_size_divisible_by": vocab_multiple}
    if read.model.tie_embeddings and (_head_is_its_own(where, read.family) if tied is None else not tied):
        warnings.append(UNTIED)
        changes["tie_embeddings"] = False
    read = read._replace(model=read.model.model_copy(update=changes))
    check(read)
    return _match(folder, read, where, warnings)


def _match(folder: Path, read: Read, where: dict[str, Stored], warnings: list[str]) -> Source:
    """Which tensor of the files is which of the model's."""
    tied = output_name(read.family) if read.model.tie_embeddings else None
    problems: list[str] = []
    parts: dict[str, Part] = {}
    stored: dict[str, Stored] = {}
    dtypes, others = set(), set()
    for tensor in hf_tensors(read.model, read.family):
        key = tensor.name if tensor.name in where else tensor.name.removeprefix(_PREFIX)
        if key not in where:
            problems.append(f"has no {tensor.name}")
            continue
        found = stored[tensor.name] = where.pop(key)
        if found.shape != tensor.shape:
            problems.append(f"{key} is {list(found.shape)}, and config.json makes it {list(tensor.shape)}")
        if found.dtype not in _PRECISIONS:
            others.add(found.dtype)
        elif not tensor.wide:
            dtypes.add(found.dtype)
        for place, part in enumerate(tensor.parts):
            parts.setdefault(part.name, Part(part, [])).said.append((tensor, place))
    beside = (*read.left_out, *([tied] if tied else []))
    extra = [key for key in where if not key.endswith(_NO_WEIGHTS) and not key.startswith(beside)]
    problems += [f"{key} is none of the model's tensors" for key in extra]
    if others:
        problems.append(f"holds {', '.join(sorted(others))}: quantized weights cannot be trained")
    if problems:
        raise TplaunchError(*(Problem(f"{folder}: {text}") for text in problems[:20]))
    # The dtype that holds them all exactly.
    precision: Precision = _PRECISIONS[dtypes.pop()] if len(dtypes) == 1 else "fp64" if "F64" in dtypes else "fp32"
    return Source(folder, read, parts, stored, precision, warnings)


def _head_is_its_own(where: dict[str, Stored], family: Family) -> bool:
    """Whether there is an output matrix that differs from its embedding: a fine-tuned head, under a `config.json` that
    ties the two. transformers then does not tie them."""
    embedding, head = embedding_name(family), output_name(family)
    ours = embedding if embedding in where else embedding.removeprefix(_PREFIX)
    if ours not in where or head not in where:
        return False
    one, other = where[ours], where[head]
    if (one.shape, one.dtype) != (other.shape, other.dtype) or one.dtype not in _BYTES:
        return True
    size = prod(one.shape) * _BYTES[one.dtype]
    with open_regular(one.file) as mine, open_regular(other.file) as theirs:
        mine.seek(one.begin)
        theirs.seek(other.begin)
        steps = (min(_PIECE, size - at) for at in range(0, size, _PIECE))
        return any(mine.read(step) != theirs.read(step) for step in steps)


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


def _header(path: Path) -> Iterator[Stored]:
    """The tensors of a safetensors file: a header's length in eight bytes, the header (JSON), then the numbers.

    Raises:
        TplaunchError: it is none, or does not hold what its header says.
    """
    try:
        with open_regular(path) as file:
            length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise Unsafe(f"its first bytes promise a header of {length:,} bytes, in a file of {size:,}")
            header = json.loads(file.read(length))
        for key, said in header.items():
            if key != "__metadata__":
                yield _place(path, key, said, 8 + length, size)
    except Unsafe as error:
        raise TplaunchError(Problem(f"{path}: {error}")) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = str(error) if isinstance(error, OSError) else f"its header is damaged: {type(error).__name__}: {error}"
        fix = "download it again; files of pickled weights (.bin, .pth) are not read"
        raise TplaunchError(Problem(f"{path} cannot be read", why=why[:300], fix=fix)) from None


def _place(path: Path, key: str, said: dict[str, object], first: int, size: int) -> Stored:
    dtype, shape, (begin, end) = said["dtype"], said["shape"], said["data_offsets"]  # type: ignore[misc]
    numbers = [begin, end, *shape]  # type: ignore[has-type, misc]
    if not isinstance(dtype, str) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"{key} is no tensor")
    if not begin <= end <= size - first:  # type: ignore[has-type]
        raise ValueError(f"{key} ends beyond the file")
    if dtype in _BYTES and end - begin != prod(shape) * _BYTES[dtype]:  # type: ignore[has-type, arg-type]
        raise ValueError(f"{key} has {end - begin} bytes, and its shape has others")  # type: ignore[has-type]
    return Stored(path, key, dtype, tuple(shape), first + begin)  # type: ignore[has-type, arg-type]
