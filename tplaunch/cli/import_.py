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
    from tplaunch.huggingface.import_ import import_model
    from tplaunch.huggingface.recipe import model_recipe

    checkpoint, read = import_model(folder, out)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    recipe = out / "model.yaml"
    recipe.write_text(model_recipe(folder, read.model, checkpoint.name, tokenizer=tokenizer.exists()), encoding="utf-8")
    typer.echo(f"{checkpoint}: {read.family.model_type}, takes sequences of up to {read.seq_len} tokens")
    typer.echo(f"train on from it: a recipe with `extends: {recipe}`")
