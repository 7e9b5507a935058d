"""`tplaunch generate`: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run directory (its newest), or one.")],
    prompts: Annotated[
        list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue. May be repeated.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, max=10**6, metavar="N", help="Tokens to make.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; larger is more random.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="Only the K likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="P", help="Only the likeliest, up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the choice: the same makes the same text.")] = 1234,
    tp: Annotated[int, typer.Option("--tp", min=1, metavar="N", help="GPUs that share each layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, metavar="N", help="Groups of consecutive layers.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, on TP x PP ranks of this machine.

    Example: tplaunch generate runs/quickstart -p "ROMEO:" --temperature 0.8 --tp 2
    """
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.generate.run import check, encode, run_generate

    origin = origin_of(checkpoint)
    ids = encode(origin, prompts, max_tokens)
    request = {
        "checkpoint": str(origin.checkpoint.absolute()),
        "tokenizer": str(origin.tokenizer),
        "prompts": ids,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "show": not as_json,
    }
    found = run_generate(check(origin, tp, pp), request)
    if as_json:
        echo_json([{"prompt": prompt, **result} for prompt, result in zip(prompts, found, strict=True)])
        return
    tokens, seconds = sum(len(result["tokens"]) for result in found), sum(result["seconds"] for result in found)
    typer.echo(f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} a second", err=True)
