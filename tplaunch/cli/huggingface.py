"""`tplaunch export` and `tplaunch import`: checkpoints to and from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from tplaunch.recipe.schema import Model

PrecisionOption = Annotated[
    Literal["bf16", "fp16", "fp32", "fp64"] | None,
    typer.Option("--precision", help="Of the weights written; default: that of the training."),
]


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run directory (its newest), or one.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    precision: PrecisionOption = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Its tokenizer.json; default: that of the run.")
    ] = None,
) -> None:
    """Write a checkpoint's model as safetensors and config.json, for transformers, vLLM, TensorRT-LLM, NeMo.

    Example: tplaunch export runs/quickstart hf/quickstart
    """
    from tplaunch.checkpoint.origin import origin_of

    origin = origin_of(checkpoint)
    from tplaunch.huggingface.export import export as write

    done = write(
        origin.checkpoint,
        out,
        precision=precision or origin.precision,
        seq_len=origin.seq_len,
        tokenizer=tokenizer or origin.tokenizer,
    )
    typer.echo(f"{out}: {done.parameters:,} parameters in {len(done.files)} file{'s' * (len(done.files) > 1)}")
    if not done.tokenizer:
        typer.echo(f"no tokenizer was found: put the run's tokenizer.json into {out}", err=True)


def import_(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="With config.json and safetensors files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Where the checkpoint goes.")],
) -> None:
    """Make a checkpoint of a Hugging Face folder's model, to train on from, and a recipe to extend.

    Example: tplaunch import Llama-3.1-8B imported/llama
    """
    from tplaunch.huggingface.import_ import import_model

    checkpoint, read = import_model(folder, out)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    recipe = out / "model.yaml"
    recipe.write_text(_recipe(folder, read.model, checkpoint.name, tokenizer=tokenizer.exists()), encoding="utf-8")
    typer.echo(f"{checkpoint}: {read.family.model_type}, takes sequences of up to {read.seq_len} tokens")
    typer.echo(f"train on from it: a recipe with `extends: {recipe}`")


def _recipe(folder: Path, model: Model, checkpoint: str, *, tokenizer: bool) -> str:
    """The part of a recipe that the model fills, as YAML; its paths are relative to it."""
    import yaml

    from tplaunch.recipe.tree import Dumper

    part: dict[str, Any] = {
        "model": model.model_dump(exclude_defaults=True),
        "checkpoint": {"initial": checkpoint},
    }
    if tokenizer:
        part["data"] = {"tokenizer": "tokenizer.json"}
    return f"# The model of {folder}, to be extended.\n{yaml.dump(part, Dumper=Dumper, sort_keys=False)}"
