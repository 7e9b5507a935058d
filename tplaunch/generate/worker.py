"""What torchrun starts on every rank of a generation: `python -m tplaunch.generate.worker FOLDER`.

Rank 0 prints the text as it comes, and answers with what it took (`launch.helper`).
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.decode import Speed, StagedModel, generate
from tplaunch.generate.load import load_model
from tplaunch.generate.sample import Sampling
from tplaunch.generate.writing import ShowJson, ShowText, Writings
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.rank import helper_rank
from tplaunch.streams import adapt_encoding

_PROGRESS_S = 10.0


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        checkpoint: its directory.
        tokenizer: a tokenizer.json.
        prompts: token ids of each.
        about: what its line of JSON says of each prompt.
        seeds: of the choice, of each.
        max_tokens: tokens to make after each.
        ends: tokens after which there are no more.
        stops: strings that end a text.
        batch_size: sequences that grow together at most.
        sampling: the fields of `Sampling`.
        log_probabilities: tell that of each token.
        as_json: print lines of JSON instead of text.
        output: the file that they are written to instead.
        ema: by the averaged weights.
    """

    checkpoint: str
    tokenizer: str
    prompts: list[list[int]]
    about: list[dict[str, Any]]
    seeds: list[int]
    max_tokens: int
    ends: list[int]
    stops: list[str]
    batch_size: int
    sampling: dict[str, Any]
    log_probabilities: bool
    as_json: bool
    output: str | None
    ema: bool = False


def main(folder: str) -> None:
    """One rank, from start to end."""
    adapt_encoding()
    with helper_rank(folder) as rank:
        request = Request(**rank.request)
        model = load_model(rank.recipe, Mesh.of(rank.recipe, rank.device), Path(request.checkpoint), ema=request.ema)
        rank.answer(asdict(_continue(model, request, show=rank.main)))


def _continue(model: StagedModel, request: Request, *, show: bool) -> Speed:
    """Continue all prompts; what follows is told as it comes, on the rank that is to show it."""
    # Every rank reads the text where the text says when to stop.
    writings = Writings(Tokenizer(request.tokenizer), request.prompts, request.stops)
    reads = show or bool(request.stops)
    speed, progress = Speed(), _Progress(len(request.prompts))
    with ExitStack() as held:
        shown: ShowJson | ShowText | None = None
        if show and request.as_json:
            out = (
                sys.stdout
                if request.output is None
                else held.enter_context(open(request.output, "w", encoding="utf-8"))
            )
            shown = ShowJson(writings, request.about, out, log_probabilities=request.log_probabilities)
        elif show:
            shown = ShowText(writings, sys.stdout)
        for made in generate(
            model,
            request.prompts,
            max_tokens=request.max_tokens,
            sampling=Sampling(**request.sampling),
            seeds=request.seeds,
            ends=request.ends,
            batch_size=request.batch_size,
            log_probabilities=request.log_probabilities,
            stop=writings.stop if reads else lambda prompt, token: False,
            speed=speed,
        ):
            if not reads:
                continue
            writings.all[made.prompt].log_probabilities.append(made.log_probability)
            if made.finish is not None:
                writings.end(made.prompt, made.finish)
            if shown is not None:
                shown.tell()
            if show and request.output is not None:
                progress.tell(ended=made.finish is not None)
    return speed


class _Progress:
    """Says now and then how far it is, where the output goes to a file."""

    def __init__(self, prompts: int) -> None:
        self.prompts, self.ended, self.tokens = prompts, 0, 0
        self._told = time.monotonic()

    def tell(self, *, ended: bool) -> None:
        self.tokens += 1
        self.ended += ended
        if time.monotonic() - self._told > _PROGRESS_S:
            self._told = time.monotonic()
            print(f"{self.ended:,} of {self.prompts:,} prompts, {self.tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
