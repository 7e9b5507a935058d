"""`tplaunch import`: a Hugging Face folder as a checkpoint, and a recipe to extend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="With config.json and safetensors files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the checkpoint goes.")],
) -> None:
    """Make a checkpoint of a Hugging Face folder's model.

    To train on from, with a recipe to extend.

    Example: tplaunch import Llama-3.1-8B imported/llama
    """
    from tplaunch.huggingface.folder import import_folder

    done = import_folder(folder, out)
    for text in done.warnings:
        typer.echo(f"warning: {text}", err=True)
    typer.echo(f"{done.checkpoint}: {done.read.family.model_type}, takes sequences of up to {done.read.seq_len} tokens")
    typer.echo(f"train on from it: a recipe with `extends: {done.recipe}`")
