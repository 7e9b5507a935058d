"""What torchrun starts on every rank of a generation: `python -m tplaunch.generate.worker FOLDER`.

Rank 0 prints the text as it comes, and answers with it (`launch.helper`).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.decode import StagedModel, generate
from tplaunch.generate.load import load_model
from tplaunch.generate.sample import Sampling
from tplaunch.generate.stream import TextStream
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.rank import helper_rank
from tplaunch.streams import adapt_encoding


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        checkpoint: its directory.
        tokenizer: a tokenizer.json.
        prompts: token ids of each.
        max_tokens: tokens to make after each.
        ends: tokens after which there are no more.
        temperature, top_k, top_p: see `Sampling`.
        seed: of the choice, the same for each prompt.
        show: print the text as it comes.
    """

    checkpoint: str
    tokenizer: str
    prompts: list[list[int]]
    max_tokens: int
    ends: list[int]
    temperature: float
    top_k: int
    top_p: float
    seed: int
    show: bool


def main(folder: str) -> None:
    """One rank, from start to end."""
    adapt_encoding()
    with helper_rank(folder) as rank:
        request = Request(**rank.request)
        model = load_model(rank.recipe, Mesh.of(rank.recipe, rank.device), Path(request.checkpoint))
        tokenizer = Tokenizer(request.tokenizer)
        rank.answer([_continue(model, tokenizer, prompt, request, show=rank.main) for prompt in request.prompts])


def _continue(
    model: StagedModel, tokenizer: Tokenizer, prompt: list[int], request: Request, *, show: bool
) -> dict[str, Any]:
    """Continue one prompt; its text is printed as it comes where it is to be shown."""
    began = time.perf_counter()
    sampling = Sampling(request.temperature, request.top_k, request.top_p)
    tokens = generate(
        model,
        prompt,
        max_tokens=request.max_tokens,
        sampling=sampling,
        seed=request.seed,
        ends=request.ends,
    )
    stream = TextStream(tokenizer, prompt) if show and request.show else None
    if stream is not None:
        print(stream.shown, end="", flush=True)
    made = []
    for token in tokens:
        made.append(token)
        if stream is not None:
            print(stream.add(token), end="", flush=True)
    if stream is not None:
        print(stream.rest(), flush=True)
    return {"tokens": made, "text": tokenizer.decode(made), "seconds": round(time.perf_counter() - began, 3)}


if __name__ == "__main__":
    main(sys.argv[1])
