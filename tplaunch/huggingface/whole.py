"""The weights of a checkpoint, read a few whole tensors at a time; of adapters, those of the model beneath them, with
what the adapters add."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tplaunch.checkpoint.load import averages_name, dtype_of, load_tensors
from tplaunch.checkpoint.metadata import read_metadata
from tplaunch.errors import Problem, TplaunchError
from tplaunch.huggingface.base import base_of
from tplaunch.huggingface.config import is_model_folder
from tplaunch.huggingface.load import load_weights
from tplaunch.huggingface.slices import Slices
from tplaunch.huggingface.source import open_folder
from tplaunch.recipe.schema import Lora, Model
from tplaunch.spec.lora import adapters, is_target
from tplaunch.spec.parameters import Parameter


class Whole:
    """Reads them, on one process alone.

    Args:
        checkpoint: its directory.
        about: what its manifest says.
        ema: the averages of its weights are meant; of adapters, theirs.

    Raises:
        TplaunchError: what its adapters belong to is not there, or was changed.
    """

    def __init__(self, checkpoint: Path, about: dict[str, Any], *, ema: bool = False) -> None:
        self.checkpoint, self.ema = checkpoint, ema
        self.model = Model.model_validate(about["model"])
        self.base = base_of(checkpoint, about)
        self.lora = None if self.base is None else Lora.model_validate(about["lora"])

    def dtypes(self, parameters: Iterable[Parameter]) -> dict[str, torch.dtype]:
        """The dtype that holds each parameter as `read` gives it, by its name.

        Raises:
            TplaunchError: one is missing.
        """
        path = self.base or self.checkpoint
        if is_model_folder(path):
            with Slices(_open(path, self.model)) as slices:
                found = {name: slices.dtype(name) for name in slices.source.parts}
        else:
            stored = read_metadata(path)
            ema = self.ema and self.base is None
            found = {
                name.removeprefix("model."): dtype_of(stored.tensors[averages_name(name, stored) if ema else name])
                for name in stored.tensors
                if name.startswith("model.")
            }
        asked = list(parameters)
        if missing := [parameter.name for parameter in asked if parameter.name not in found]:
            raise TplaunchError(Problem(f"{path} has no model.{missing[0]} ({len(missing)} of {len(asked)} missing)"))
        return {
            p.name: torch.promote_types(found[p.name], torch.float32) if self._adapted(p) else found[p.name]
            for p in asked
        }

    def read(self, parameters: Iterable[Parameter], dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """Some parameters, whole, by name.

        Args:
            dtypes: of them (`dtypes`).
        """
        asked = {parameter.name: parameter for parameter in parameters}
        tensors = {f"model.{name}": torch.empty(p.shape, dtype=dtypes[name]) for name, p in asked.items()}
        load_weights(tensors, self.base or self.checkpoint, self.model, alone=True, ema=self.ema and self.base is None)
        for name, parameter in asked.items():
            if self.lora is not None and self._adapted(parameter):
                inner, outer = self.factors(parameter)
                weight = tensors[f"model.{name}"]
                weight.addmm_(outer.to(weight.dtype), inner.to(weight.dtype), alpha=self.lora.alpha / self.lora.rank)
        return {name: tensors[f"model.{name}"] for name in asked}

    def factors(self, parameter: Parameter) -> list[Tensor]:
        """A and B of a matrix that has an adapter."""
        assert self.lora is not None
        stored = read_metadata(self.checkpoint).tensors
        made = {f"model.{p.name}": p for p in adapters(self.lora, parameter)}
        tensors = {name: torch.empty(p.shape, dtype=dtype_of(stored[name])) for name, p in made.items()}
        load_tensors(tensors, self.checkpoint, alone=True, ema=self.ema)
        return [*tensors.values()]

    def _adapted(self, parameter: Parameter) -> bool:
        return self.lora is not None and is_target(self.lora, parameter)


def _open(folder: Path, model: Model) -> Any:
    return open_folder(folder, vocab_multiple=model.make_vocab_size_divisible_by, tied=model.tie_embeddings)
