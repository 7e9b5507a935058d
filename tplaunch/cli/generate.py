"""`tplaunch generate`: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run directory (its newest), one, or a Hugging Face folder.")
    ],
    prompts: Annotated[
        list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue. May be repeated.")
    ],
    max_tokens: Annotated[int, typer.Option(min=1, max=10**6, metavar="N", help="Tokens to make.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; larger is more random.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, metavar="K", help="Only the K likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="Only the likeliest, up to this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the choice: the same makes the same text.")] = 1234,
    tp: Annotated[int, typer.Option("--tp", min=1, metavar="N", help="GPUs that share each layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, metavar="N", help="Groups of consecutive layers.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, on TP x PP ranks of this machine.

    How tokens are chosen, where it is not said, is the model's generation_config.json, else 1.0, 0 and 1.0.

    Example: tplaunch generate runs/quickstart -p "ROMEO:" --temperature 0.8 --tp 2
    """
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.generate.run import check, encode, run_generate
    from tplaunch.huggingface.config import is_model_folder

    if is_model_folder(checkpoint):
        checkpoint = _imported(checkpoint)
    origin = origin_of(checkpoint)
    given = encode(origin, prompts, max_tokens)
    for warning in given.warnings:
        typer.echo(f"warning: {warning}", err=True)
    said = given.settings
    request = {
        "checkpoint": str(origin.checkpoint.absolute()),
        "tokenizer": str(origin.tokenizer),
        "prompts": given.ids,
        "max_tokens": max_tokens,
        "ends": given.ends,
        "temperature": _first(temperature, said.temperature, 1.0),
        "top_k": _first(top_k, said.top_k, 0),
        "top_p": _first(top_p, said.top_p, 1.0),
        "seed": seed,
        "show": not as_json,
    }
    found = run_generate(check(origin, tp, pp), request)
    if as_json:
        echo_json([{"prompt": prompt, **result} for prompt, result in zip(prompts, found, strict=True)])
        return
    tokens, seconds = sum(len(result["tokens"]) for result in found), sum(result["seconds"] for result in found)
    typer.echo(f"{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} a second", err=True)


def _first(*values: float | None) -> float | None:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _imported(folder: Path) -> Path:
    """A Hugging Face folder as a checkpoint in the cache, made on first use."""
    from tplaunch.data.cache import default_cache
    from tplaunch.huggingface.folder import cached_import

    return cached_import(folder, default_cache())
