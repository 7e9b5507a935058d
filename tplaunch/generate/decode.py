"""Tokens one after another: the prompt in one pass, then one token a pass, through the pipeline's ranks in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.generate.sample import Sampling, pick
from tplaunch.model.cache import KeyValueCache
from tplaunch.model.transformer import TransformerStage
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.parallel.relay import Relay
from tplaunch.recipe.schema import Recipe


@dataclass(frozen=True)
class StagedModel:
    """A model on the ranks of a mesh.

    Args:
        recipe: resolved.
        mesh: the mesh.
        stages: those of this rank, by number, in order; without sequence parallelism (`whole_sequences`).
        group: of the pipeline's ranks, for what goes between stages.
    """

    recipe: Recipe
    mesh: Mesh
    stages: Mapping[int, TransformerStage]
    group: dist.ProcessGroup


class Decoder:
    """One sequence.

    Args:
        model: the model.
        max_tokens: tokens of the sequence, prompt and all.
    """

    def __init__(self, model: StagedModel, max_tokens: int) -> None:
        self.model = model
        self.length = 0
        self.relay = Relay(model.recipe, model.mesh, model.group)
        self._caches = {
            number: [KeyValueCache(max_tokens) for _ in stage.layers] for number, stage in model.stages.items()
        }

    @property
    def last(self) -> int:
        """The pipeline rank that gets the logits."""
        return self.relay.ranks[-1]

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Run more tokens of the sequence; every rank calls it.

        Args:
            tokens: int64 [1, s]; s is 1 but for the first call.

        Returns:
            [vocab], of what follows the last of them; None on pipeline ranks without the last stage.
        """
        recipe, mesh = self.model.recipe, self.model.mesh
        count, dtype = tokens.shape[1], COMPUTE_DTYPE[recipe.training.precision]
        shape = torch.Size((count, 1, recipe.model.hidden_size))
        x = tokens.to(mesh.device)
        for number, stage in self.model.stages.items():
            x = self.relay.receive(number, x, shape, dtype)
            x = stage.extend(x, self._caches[number], self.length)
            self.relay.send(number, x)
        self.length += count
        return x[0, 0] if mesh.coordinates.pp == self.last else None


def generate(
    model: StagedModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    ends: Collection[int],
) -> Iterator[int]:
    """Continue a prompt, on every rank alike.

    Args:
        model: whose words they are.
        prompt: at least one token.
        max_tokens: tokens to make.
        sampling: how each is chosen.
        seed: of the choice.
        ends: tokens after which there are no more.
    """
    decoder, mesh = Decoder(model, len(prompt) + max_tokens), model.mesh
    chooser = mesh.topology.rank(pp=decoder.last)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt])
    chosen = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    for _ in range(max_tokens):
        logits = decoder.logits(tokens)
        if logits is not None:
            chosen.fill_(pick(logits, sampling, random))
        if mesh.topology.world_size > 1:  # all go on with one choice: ranks that stop apart would hang
            dist.broadcast(chosen, src=chooser)
        token = int(chosen)
        yield token
        if token in ends:
            return
        tokens = torch.tensor([[token]])
