"""A checkpoint of adapters -> a folder that PEFT reads: `adapter_config.json` and `adapter_model.safetensors`, and a
card.

Where a family fuses matrices that have adapters of their own (`qkv_proj`, `c_attn`), its module gets one adapter of as
many times the rank: A is theirs, one below the other, and B has each one's columns in its own rows alone. Alpha grows
with the rank, so that the scale stays.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tplaunch.checkpoint import store
from tplaunch.errors import Problem, TplaunchError
from tplaunch.huggingface.card import CARD, adapter_card
from tplaunch.huggingface.config import is_model_folder
from tplaunch.huggingface.families import GPT2, family_of
from tplaunch.huggingface.tensors import HfTensor, Way, hf_tensors
from tplaunch.huggingface.ways import pack
from tplaunch.huggingface.whole import Whole
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.recipe.schema import Lora, Precision
from tplaunch.spec.lora import is_target

_OF_EXPERTS = {"gate_proj", "up_proj", "down_proj"}  # names that PEFT 0.21 moves to transformers' fused experts
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(checkpoint: Path, out: Path, *, precision: Precision, ema: bool = False) -> int:
    """Write the adapters of a checkpoint; the folder appears whole or not at all.

    Args:
        out: the folder to make.
        precision: of the numbers written.
        ema: the averages of the adapters.

    Returns:
        How many numbers were written.

    Raises:
        TplaunchError: `out` exists, the checkpoint is damaged or would run code, the model beneath is not there or was
            changed, no architecture of transformers is its model, or PEFT cannot name its adapters. Nothing is written
            then.
    """
    if out.exists():
        raise TplaunchError(Problem(f"{out} exists already", fix="name another folder, or remove it"))
    manifest = store.whole_manifest(checkpoint)
    whole = Whole(checkpoint, manifest.about, ema=ema)
    assert whole.lora is not None and whole.base is not None
    family = family_of(whole.model)
    every = hf_tensors(whole.model, family)
    adapted = [tensor for tensor in every if any(is_target(whole.lora, part) for part in tensor.parts)]
    if whole.model.moe is not None and (named := sorted({_leaf(tensor) for tensor in adapted} & _OF_EXPERTS)):
        why = f"in a model with experts PEFT takes {', '.join(named)} for theirs, in all layers"
        raise TplaunchError(Problem("PEFT cannot have these adapters", why, "export the whole model: --merge"))
    tensors: dict[str, Tensor] = {}
    for tensor in adapted:
        inner, outer = _factors(whole, whole.lora, tensor)
        module = f"base_model.model.{_module(tensor)}"
        dtype = COMPUTE_DTYPE[precision]
        tensors[f"{module}.lora_A.weight"] = inner.to(dtype).contiguous()
        tensors[f"{module}.lora_B.weight"] = outer.to(dtype).contiguous()
    config = _config(whole.lora, every, adapted, base=_base_name(whole.base), transposed=family == GPT2)
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    (temporary / WEIGHTS).chmod(0o644)  # the library's files are their owner's alone
    (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    count = sum(tensor.numel() for tensor in tensors.values())
    (temporary / CARD).write_text(adapter_card(checkpoint, manifest, out.name, config, count), encoding="utf-8")
    temporary.rename(out)
    return count


def _factors(whole: Whole, lora: Lora, tensor: HfTensor) -> tuple[Tensor, Tensor]:
    """A and B of a module: [rank, in] and [out, rank], the rank as many times the recipe's as it has adapters."""
    mine = [part for part in tensor.parts if is_target(lora, part)]
    inner, outer = zip(*(whole.factors(part) for part in mine), strict=True)
    columns = []
    for part in tensor.parts:
        wide = torch.zeros(part.shape[0], len(mine) * lora.rank, dtype=outer[0].dtype)
        if part in mine:
            place = mine.index(part)
            wide[:, place * lora.rank : (place + 1) * lora.rank] = outer[place]
        columns.append(wide)
    rows = sum(part.shape[0] for part in tensor.parts)
    # PEFT keeps B as [out, rank] beside a Conv1D, too.
    way = Way.ROWS if tensor.way is Way.COLUMNS else tensor.way
    return torch.cat(inner), pack(tensor._replace(way=way, shape=(rows, len(mine) * lora.rank)), columns)


def _config(
    lora: Lora, every: list[HfTensor], adapted: list[HfTensor], *, base: str | None, transposed: bool
) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    others = {_module(tensor) for tensor in every} - {_module(tensor) for tensor in adapted}
    times = {_target(tensor, others): sum(is_target(lora, part) for part in tensor.parts) for tensor in adapted}
    more = {name: number for name, number in times.items() if number > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": 0.0,
        "target_modules": sorted(times),
        "rank_pattern": {name: number * lora.rank for name, number in more.items()},
        "alpha_pattern": {name: _plain(number * lora.alpha) for name, number in more.items()},
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _module(tensor: HfTensor) -> str:
    return tensor.name.removesuffix(".weight")


def _leaf(tensor: HfTensor) -> str:
    return _module(tensor).rpartition(".")[2]


def _target(tensor: HfTensor, others: set[str]) -> str:
    """The end of a module's name, as short as no module without an adapter has it."""
    parts = _module(tensor).split(".")
    for length in range(1, len(parts)):
        end = ".".join(parts[-length:])
        if not any(f".{other}".endswith(f".{end}") for other in others):
            return end
    return _module(tensor)


def _base_name(base: Path) -> str | None:
    """Where transformers finds the model beneath: a Hugging Face folder, or that which a checkpoint was made from."""
    return str(base) if is_model_folder(base) else store.read_manifest(base).about.get("imported_from")
