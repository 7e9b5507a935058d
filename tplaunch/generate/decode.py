"""Tokens of some sequences together: their prompts in one pass, then a token of each a pass, through the pipeline's
ranks in turn. A sequence that ends makes room for one that waits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.generate.memory import most_pages
from tplaunch.generate.sample import Sampling, pick
from tplaunch.model.cache import Kept, Pages, Pass
from tplaunch.model.transformer import TransformerStage
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.parallel.relay import Relay
from tplaunch.recipe.schema import Recipe

_PROMPT_TOKENS = 2048  # of prompts that are read in one pass, if more than one is: what activations take is bounded


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
    """The cache of some sequences, and the passes that extend them.

    Args:
        model: the model.
        most: pages that the cache may have.
    """

    def __init__(self, model: StagedModel, most: int) -> None:
        self.model = model
        self.pages = Pages(most)
        self.relay = Relay(model.recipe, model.mesh, model.group)
        self._caches = {number: stage.cache() for number, stage in model.stages.items()}
        # What is trained later must not meet tensors of this mode, which tell nothing of their changes to anybody.
        self._trained = any(weight.requires_grad for stage in model.stages.values() for weight in stage.parameters())

    @property
    def last(self) -> int:
        """The pipeline rank that gets the logits."""
        return self.relay.ranks[-1]

    def logits(self, kept: Sequence[Kept], tokens: Sequence[Sequence[int]]) -> Tensor | None:
        """Run more tokens of sequences; every rank calls it alike.

        Args:
            kept: the sequences.
            tokens: of each; one, but in its first pass.

        Returns:
            [sequences, vocab], of what follows the last of each; None on pipeline ranks without the last stage.
        """
        with torch.no_grad() if self._trained else torch.inference_mode():
            return self._logits(kept, tokens)

    def _logits(self, kept: Sequence[Kept], tokens: Sequence[Sequence[int]]) -> Tensor | None:
        recipe, mesh = self.model.recipe, self.model.mesh
        counts = [len(more) for more in tokens]
        for sequence, count in zip(kept, counts, strict=True):
            sequence.grow(count, self.pages)
        now = Pass(kept, counts, self.pages.capacity, mesh.device)
        shape = torch.Size((sum(counts), 1, recipe.model.hidden_size))
        x = torch.tensor([[token for more in tokens for token in more]], device=mesh.device)
        for number, stage in self.model.stages.items():
            x = self.relay.receive(number, x, shape, COMPUTE_DTYPE[recipe.training.precision])
            self._caches[number].begin(now)
            x = stage.extend(x, self._caches[number])
            self.relay.send(number, x)
        return x[0] if mesh.coordinates.pp == self.last else None


@dataclass
class Speed:
    """What the passes took.

    Args:
        read: tokens of prompts, and `reading` the seconds of their passes.
        made: tokens made one after another, the first of each sequence not among them, and `making` likewise.
    """

    read: int = 0
    reading: float = 0.0
    made: int = 0
    making: float = 0.0


@dataclass(frozen=True)
class Made:
    """A token that was made.

    Args:
        prompt: number of the prompt that it follows.
        token: which.
        log_probability: its natural logarithm by the model's own logits; 0 where it is not asked for.
        finish: why no more come: "end" (a token that says so), "stop" or "length"; None while more do.
    """

    prompt: int
    token: int
    log_probability: float
    finish: str | None


@dataclass
class _Growing:
    """A sequence in the batch."""

    prompt: int
    random: torch.Generator
    tokens: list[int]  # to run next
    seen: Tensor | None  # bool [vocab], on the rank that chooses, where there is a penalty
    kept: Kept = field(default_factory=Kept)
    made: int = 0


def generate(
    model: StagedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int],
    ends: Collection[int],
    batch_size: int,
    log_probabilities: bool = False,
    stop: Callable[[int, int], bool] = lambda prompt, token: False,
    speed: Speed | None = None,
) -> Iterator[Made]:
    """Continue prompts, on every rank alike. What follows one does not depend on the others, but for rounding.

    Args:
        model: whose words they are.
        prompts: of at least one token each.
        max_tokens: tokens to make after each.
        sampling: how each is chosen.
        seeds: of the choice, of each prompt.
        ends: tokens after which there are no more.
        batch_size: sequences that grow together at most.
        stop: told the prompt's number and a token that follows it, whether it is the last; the same on every rank.
        speed: is added to.
    """
    batch_size = min(batch_size, len(prompts))
    decoder, mesh = Decoder(model, most_pages(list(map(len, prompts)), max_tokens, batch_size)), model.mesh
    chooser = mesh.topology.rank(pp=decoder.last)
    speed = Speed() if speed is None else speed
    waiting = deque(enumerate(prompts))
    running: list[_Growing] = []
    while waiting or running:
        began = time.perf_counter()
        entering: list[_Growing] = []
        room = _PROMPT_TOKENS
        while waiting and len(running) + len(entering) < batch_size and (room >= len(waiting[0][1]) or not entering):
            number, tokens = waiting.popleft()
            room -= len(tokens)
            seen = (
                _mark(model.recipe.model.vocab_size, tokens, mesh.device) if sampling.repetition_penalty != 1 else None
            )
            entering.append(_Growing(number, torch.Generator().manual_seed(seeds[number]), list(tokens), seen))
        growing = entering or running
        logits = decoder.logits([one.kept for one in growing], [one.tokens for one in growing])
        chosen = torch.zeros(2, len(growing), dtype=torch.int64, device=mesh.device)
        if logits is not None:
            picked = pick(
                logits, sampling, [one.random for one in growing], [one.seen for one in growing if one.seen is not None]
            )
            chosen[0] = picked
            if log_probabilities:
                found = logits.float().log_softmax(-1).gather(-1, picked[:, None])[:, 0]
                chosen[1] = found.double().view(torch.int64)  # its bits: one message for both
        if mesh.topology.world_size > 1:  # all go on with one choice: ranks that stop apart would hang
            dist.broadcast(chosen, src=chooser)
        chosen = chosen.cpu()
        picks, logs = chosen[0].tolist(), chosen[1].view(torch.float64).tolist()
        took = time.perf_counter() - began
        if entering:
            speed.read, speed.reading = speed.read + sum(len(one.tokens) for one in growing), speed.reading + took
        else:
            speed.made, speed.making = speed.made + len(growing), speed.making + took
        staying = running if entering else []
        for one, token, log in zip(growing, picks, logs, strict=True):
            one.made += 1
            one.tokens = [token]
            if one.seen is not None:
                one.seen[token] = True
            finish = "end" if token in ends else "length" if one.made == max_tokens else None
            if stop(one.prompt, token):
                finish = "stop"
            if finish is None:
                staying.append(one)
            else:
                one.kept.end(decoder.pages)
            yield Made(one.prompt, token, log, finish)
        running = staying


def _mark(vocab: int, tokens: Sequence[int], device: torch.device) -> Tensor:
    seen = torch.zeros(vocab, dtype=torch.bool, device=device)
    seen[torch.tensor(tokens, device=device)] = True
    return seen
