"""A checkpoint -> a folder that transformers, vLLM, TensorRT-LLM, NeMo and Megatron-Bridge read: safetensors,
`config.json`, a model card and, where it is known, the tokenizer and what was said beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from tplaunch.checkpoint import store
from tplaunch.data.beside import GENERATION, TOKENIZER, TOKENIZER_CONFIG, copy_text, read_beside
from tplaunch.data.mark import unmark
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.huggingface.card import CARD, model_card
from tplaunch.huggingface.config import write_config
from tplaunch.huggingface.families import family_of
from tplaunch.huggingface.tensors import HfTensor, hf_tensors
from tplaunch.huggingface.ways import pack
from tplaunch.huggingface.whole import Whole
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Precision

SHARD_BYTES = 5 * 10**9  # what transformers makes its own files of


class Exported(NamedTuple):
    """What was written.

    Args:
        files: safetensors files, in order.
        parameters: elements in them.
        tokenizer: whether a tokenizer lies beside them.
    """

    files: list[str]
    parameters: int
    tokenizer: bool


def export(
    checkpoint: Path,
    out: Path,
    *,
    precision: Precision,
    seq_len: int,
    tokenizer: Path | None,
    shard_bytes: int = SHARD_BYTES,
    ema: bool = False,
    fresh: bool = False,
) -> Exported:
    """Write the model of a checkpoint; the folder appears whole or not at all. Holds one file's tensors at a time.
    Adapters are merged into the model that they belong to.

    Args:
        checkpoint: a checkpoint directory.
        out: the folder to make.
        precision: of the weights written: fp64, fp32, bf16 or fp16.
        seq_len: positions that the model was trained on.
        tokenizer: a tokenizer.json to put beside them.
        shard_bytes: no file is larger, unless one tensor is, or a matrix of all experts of a layer.
        ema: the averages of the weights.
        fresh: the checkpoint has just been written, by this process: its checksums are not looked at, and no progress
            is shown.

    Raises:
        TplaunchError: `out` exists, the checkpoint is damaged or would run code, what its adapters belong to is not
            there, or no architecture of transformers is its model. Nothing is written then.
    """
    if out.exists():
        raise TplaunchError(Problem(f"{out} exists already", fix="name another folder, or remove it"))
    manifest = (store.open_checkpoint if fresh else store.whole_manifest)(checkpoint)
    whole = Whole(checkpoint, manifest.about, ema=ema)
    model = whole.model
    dtype = COMPUTE_DTYPE[precision]
    tokens = Tokenizer(tokenizer) if tokenizer is not None else None
    config = write_config(model, seq_len=seq_len, precision=precision, eod=tokens.eod if tokens else None)
    if tokenizer is not None and tokens is not None:
        config |= _special_tokens(tokenizer, tokens)
    tensors = hf_tensors(model, family_of(model))
    shards = list(_shards(tensors, dtype.itemsize, shard_bytes))
    temporary = out.with_name(out.name + ".tmp")
    dtypes = whole.dtypes(part for tensor in tensors for part in tensor.parts)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    names = [_file_name(number, len(shards)) for number in range(len(shards))]
    elements = sum(tensor.elements for tensor in tensors)
    try:
        with Progress(not fresh).task(f"writing {out.name}", elements) as advance:
            for name, shard in zip(names, shards, strict=True):
                save_file(_read(whole, shard, dtypes, dtype), temporary / name, metadata={"format": "pt"})
                (temporary / name).chmod(0o644)  # the library's files are their owner's alone
                advance(sum(tensor.elements for tensor in shard))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if len(shards) > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = {"total_size": sum(tensor.bytes(dtype.itemsize) for tensor in tensors), "total_parameters": elements}
        _write_json(temporary / "model.safetensors.index.json", {"metadata": total, "weight_map": where})
    _write_json(temporary / "config.json", config)
    if tokenizer is not None and tokens is not None:
        _write_text(temporary, tokenizer, tokens, seq_len)
    card = model_card(checkpoint, manifest, temporary, out.name, config, elements)
    (temporary / CARD).write_text(card, encoding="utf-8")
    temporary.rename(out)
    return Exported(names, elements, tokens is not None)


def _shards(tensors: list[HfTensor], itemsize: int, max_bytes: int) -> Iterator[list[HfTensor]]:
    """The tensors of each file. What is made of the same of ours stays together, so that ours are read once."""
    shard: list[HfTensor] = []
    size = 0
    for _, group in groupby(tensors, key=lambda tensor: tensor.parts):
        together = list(group)
        bytes_ = sum(tensor.bytes(itemsize) for tensor in together)
        if shard and size + bytes_ > max_bytes:
            yield shard
            shard, size = [], 0
        shard += together
        size += bytes_
    yield shard


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _read(whole: Whole, shard: list[HfTensor], dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one file, as they are written."""
    ours = whole.read((part for tensor in shard for part in tensor.parts), dtypes)
    last = {part.name: tensor for tensor in shard for part in tensor.parts}  # to be made of each
    found = {}
    for tensor in shard:
        names = [part.name for part in tensor.parts]
        kept = torch.promote_types(dtype, torch.float32) if tensor.wide else dtype
        found[tensor.name] = pack(tensor, [ours[name] for name in names]).to(kept).contiguous()
        for name in names:
            if last[name] is tensor:
                del ours[name]
    return found


def _special_tokens(tokenizer: Path, tokens: Tokenizer) -> dict[str, Any]:
    """What `config.json` says of them, as the folder said it that the tokenizer came from."""
    begin = {"bos_token_id": tokens.begin[0]} if tokens.begin else {}
    said = read_beside(tokenizer, GENERATION)
    return begin | {
        key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if said.get(key) is not None
    }


def _write_text(folder: Path, tokenizer: Path, tokens: Tokenizer, seq_len: int) -> None:
    """The tokenizer as it came, without our mark, and what lies beside it, unchanged; else what is known of it."""
    if tokenizer.name == TOKENIZER:
        copy_text(tokenizer.parent, folder)
    (folder / TOKENIZER).write_bytes(unmark(tokenizer.read_bytes().decode()).encode())
    begin = {"bos_token": tokens.decode(tokens.begin[:1], skip_special_tokens=False)} if tokens.begin else {}
    made = {
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **begin,
            "eos_token": tokens.decode([tokens.eod], skip_special_tokens=False),
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
        },
        GENERATION: {**({"bos_token_id": tokens.begin[0]} if tokens.begin else {}), "eos_token_id": tokens.eod},
    }
    for name, content in made.items():
        if not (folder / name).exists():
            _write_json(folder / name, content)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
