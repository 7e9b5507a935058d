"""What torchrun starts on every rank of a generation: `python -m tplaunch.generate.worker FOLDER`.

Reads recipe.yaml and request.json in FOLDER; rank 0 prints the text as it comes, and writes result.json.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.decode import generate
from tplaunch.generate.load import load_stage
from tplaunch.generate.sample import Sampling
from tplaunch.launch.orphans import die_with_parent
from tplaunch.parallel.mesh import Mesh, init_process_group, local_device
from tplaunch.recipe.load import load_recipe
from tplaunch.rundir import RunDir
from tplaunch.worker import topology_of


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        checkpoint: its directory.
        tokenizer: a tokenizer.json.
        prompts: token ids of each.
        max_tokens: tokens to make after each.
        temperature, top_k, top_p: see `Sampling`.
        seed: of the choice, the same for each prompt.
        show: print the text as it comes.
    """

    checkpoint: str
    tokenizer: str
    prompts: list[list[int]]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    show: bool


def main(folder: Path) -> None:
    """One rank, from start to end."""
    die_with_parent()
    request = Request(**json.loads((folder / "request.json").read_text()))
    recipe = load_recipe(RunDir(folder).recipe).recipe
    device = local_device(int(os.environ["LOCAL_RANK"]))
    init_process_group(device, recipe.launch.first_step_timeout)
    mesh = Mesh.from_recipe(recipe, topology_of(recipe), device)
    positions = max(map(len, request.prompts)) + request.max_tokens
    stage = load_stage(recipe, mesh, Path(request.checkpoint), positions)
    tokenizer = Tokenizer(request.tokenizer)
    sampling = Sampling(request.temperature, request.top_k, request.top_p)
    main_rank, results = dist.get_rank() == 0, []
    for prompt in request.prompts:
        began, made = time.perf_counter(), list[int]()
        tokens = generate(
            stage,
            mesh,
            prompt,
            most=request.max_tokens,
            sampling=sampling,
            seed=request.seed,
            end=tokenizer.eod,
        )
        for piece in _texts(tokenizer, prompt, tokens, made):
            if main_rank and request.show:
                print(piece, end="", flush=True)
        if main_rank and request.show:
            print(flush=True)
        text = tokenizer.decode(made)
        results.append({"tokens": made, "text": text, "seconds": round(time.perf_counter() - began, 3)})
    if main_rank:
        (folder / "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _texts(tokenizer: Tokenizer, prompt: list[int], tokens: Iterator[int], made: list[int]) -> Iterator[str]:
    """The prompt's text, then what each token adds; a character that is not whole yet waits for its other bytes."""
    shown = tokenizer.decode(prompt)
    yield shown
    text = shown
    for token in tokens:
        made.append(token)
        text = tokenizer.decode([*prompt, *made])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
