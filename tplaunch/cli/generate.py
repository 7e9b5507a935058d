"""`tplaunch generate`: text from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tplaunch.cli.options import EmaOption


def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A run (its newest), RUN@STEP, its path, or a Hugging Face folder."),
    ],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="What to continue. May be repeated.")
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts, one a line; of a .jsonl its `prompt` or `messages`, and its `seed`. -: from stdin.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Each prompt is what a user says, by the model's chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**6, metavar="N", help="Tokens to make of each.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Texts that are made together, at most.")] = 8,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, metavar="T", help="0 takes the likeliest token; larger is more random.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, metavar="K", help="Only the K likeliest tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="Only the likeliest, up to this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="P", help="Only those of this part of the likeliest's.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(min=0.01, metavar="R", help="Above 1 what is there already becomes less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends a text, and is no part of it. Repeatable.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Of the choice, for each prompt by itself: the same text again.")
    ] = 1234,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With --json: each token's log-probability by the model.")
    ] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, metavar="N", help="GPUs that share each layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, metavar="N", help="Groups of consecutive layers.")] = 1,
    ema: EmaOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line, one for each prompt.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write what --json prints to this file.")
    ] = None,
) -> None:
    """Continue texts, on TP x PP ranks of this machine.

    How tokens are chosen, where it is not said, is the model's generation_config.json, else 1.0, 0, 1.0, 0.0 and 1.0.

    Example: tplaunch generate runs/quickstart -p "ROMEO:" --temperature 0.8 --tp 2
    """
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.errors import Problem, TplaunchError
    from tplaunch.generate.prompts import Asked, read_prompts
    from tplaunch.generate.run import check, encode, run_generate, say_memory
    from tplaunch.huggingface.given import checkpoint_of

    as_json = as_json or output is not None
    asked = [Asked("--prompt", text) for text in prompts or []]
    asked += read_prompts(prompts_file) if prompts_file is not None else []
    if not asked:
        raise TplaunchError(Problem("there is no prompt", fix="-p TEXT, or --prompts FILE"))
    if logprobs and not as_json:
        raise TplaunchError(Problem("log-probabilities stand in JSON only", fix="add --json", key="--logprobs"))
    if "" in (stop or []):
        raise TplaunchError(Problem("an empty text ends every text", fix="leave it out", key="--stop"))
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        why = "it is a folder" if output.is_dir() else f"there is no folder {output.parent}"
        raise TplaunchError(Problem(f"{output} cannot be written", why=why, fix="name a file", key="--output"))
    origin = origin_of(checkpoint_of(checkpoint), ema=ema)
    given = encode(origin, asked, max_tokens, chat=chat)
    checked = check(origin, tp, pp)
    for warning in given.warnings:
        typer.echo(f"warning: {warning}", err=True)
    typer.echo(say_memory(checked.recipe, given.ids, max_tokens, batch_size), err=True)
    said = given.settings
    request = {
        "checkpoint": str(origin.checkpoint.absolute()),
        "tokenizer": str(origin.tokenizer),
        "prompts": given.ids,
        "about": [one.shown for one in asked],
        "seeds": [seed if one.seed is None else one.seed for one in asked],
        "max_tokens": max_tokens,
        "ends": given.ends,
        "stops": stop or [],
        "batch_size": batch_size,
        "sampling": {
            "temperature": _first(temperature, said.temperature, 1.0),
            "top_k": _first(top_k, said.top_k, 0),
            "top_p": _first(top_p, said.top_p, 1.0),
            "min_p": _first(min_p, said.min_p, 0.0),
            "repetition_penalty": _first(repetition_penalty, said.repetition_penalty, 1.0),
        },
        "log_probabilities": logprobs,
        "as_json": as_json,
        "output": None if output is None else str(output.absolute()),
        "ema": origin.ema,
    }
    speed = run_generate(checked, request)
    typer.echo(
        f"prompts: {speed['read']:,} tokens, {_rate(speed['read'], speed['reading'])} a second; "
        f"what follows: {speed['made']:,}, {_rate(speed['made'], speed['making'])} a second",
        err=True,
    )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / max(seconds, 1e-9):,.1f}"


def _first(*values: float | None) -> float | None:
    """The first that is given."""
    return next((value for value in values if value is not None), None)
