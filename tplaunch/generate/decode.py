"""Tokens one after another: the prompt in one pass, then one token a pass, through the pipeline's ranks in turn."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.generate.sample import Sampling, pick
from tplaunch.model.cache import KeyValueCache
from tplaunch.model.transformer import TransformerStage
from tplaunch.parallel.mesh import Mesh


class Decoder:
    """One sequence, on this rank's stage.

    Args:
        stage: from `load_stage`.
        mesh: the mesh, without sequence parallelism.
        max_tokens: tokens of the sequence, prompt and all.
    """

    def __init__(self, stage: TransformerStage, mesh: Mesh, max_tokens: int) -> None:
        self.stage = stage
        self.mesh = mesh
        self.length = 0
        self._caches = [KeyValueCache(max_tokens) for _ in stage.layers]
        self._weight = next(stage.parameters())

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor | None:
        """Run more tokens of the sequence; every rank calls it.

        Args:
            tokens: int64 [1, s]; s is 1 but for the first call.

        Returns:
            [vocab], of what follows the last of them; None before the last pipeline rank.
        """
        rank, last, group = self.mesh.coordinates.pp, self.mesh.topology.pp - 1, self.mesh.pp_group
        x = tokens.to(self.mesh.device)
        if rank > 0:
            shape = (tokens.shape[1], 1, self.stage.spec.hidden_size)
            x = torch.empty(shape, dtype=self._weight.dtype, device=self.mesh.device)
            dist.recv(x, group=group, group_src=rank - 1)
        x = self._run(x, tokens.shape[1])
        self.length += tokens.shape[1]
        if rank < last:
            dist.send(x.contiguous(), group=group, group_dst=rank + 1)
            return None
        return x[0, 0]

    def _run(self, x: Tensor, count: int) -> Tensor:
        """Tokens [1, s] or hidden states [s, 1, h] -> hidden states, or logits [1, 1, vocab] of the last one."""
        stage, here = self.stage, slice(self.length, self.length + count)
        if stage.embedding is not None:
            x = stage.embed(x, torch.arange(here.start, here.stop, device=x.device)[None])
        for (number, block), cache in zip(stage.layers.items(), self._caches, strict=True):
            rope = stage.rope_of(number)
            x = block(x, None if rope is None else rope[:, here], None, cache)
        return x if stage.norm is None or stage.output is None else stage.output(stage.norm(x[-1:]), None)


def generate(
    stage: TransformerStage,
    mesh: Mesh,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    ends: Collection[int],
) -> Iterator[int]:
    """Continue a prompt, on every rank alike.

    Args:
        prompt: at least one token.
        max_tokens: tokens to make.
        sampling: how each is chosen.
        seed: of the choice.
        ends: tokens after which there are no more.
    """
    decoder = Decoder(stage, mesh, len(prompt) + max_tokens)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt])
    chosen = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    for _ in range(max_tokens):
        logits = decoder.logits(tokens)
        if logits is not None:
            chosen.fill_(pick(logits, sampling, random))
        if mesh.topology.pp > 1:
            dist.broadcast(chosen, group=mesh.pp_group, group_src=mesh.topology.pp - 1)
        token = int(chosen)
        yield token
        if token in ends:
            return
        tokens = torch.tensor([[token]])
