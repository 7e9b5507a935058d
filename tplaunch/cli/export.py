"""`tplaunch export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tplaunch.cli.options import EmaOption
from tplaunch.errors import Problem, TplaunchError

PrecisionOption = Annotated[
    Literal["bf16", "fp16", "fp32", "fp64"] | None,
    typer.Option("--precision", help="Of the weights written; default: that of the training."),
]


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run (its newest), RUN@STEP, or its path.")
    ],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
    precision: PrecisionOption = None,
    ema: EmaOption = False,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Its tokenizer.json; default: that of the run.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a run with finetune.lora: the whole model, adapters merged into it.")
    ] = False,
) -> None:
    """Make a Hugging Face folder of a checkpoint's model.

    Safetensors, config.json, the tokenizer and a model card, for transformers, vLLM, TensorRT-LLM, NeMo and the hub. Of
    a run with finetune.lora its adapters, for PEFT, in fp32 unless --precision says otherwise; or with --merge the
    whole model.

    Example: tplaunch export runs/quickstart hf/quickstart
    """
    from tplaunch.checkpoint.origin import origin_of

    origin = origin_of(checkpoint, ema=ema)
    if merge and not origin.adapters:
        what = f"{origin.checkpoint} holds a whole model: there is nothing to merge"
        raise TplaunchError(Problem(what, fix="leave out --merge"))
    if origin.adapters and not merge:
        from tplaunch.huggingface.adapter import export_adapter

        numbers = export_adapter(origin.checkpoint, out, precision=precision or "fp32", ema=ema)
        typer.echo(f"{out}: {numbers:,} numbers of adapters, for PEFT (--merge: the whole model)")
        return
    from tplaunch.huggingface.export import export as write

    done = write(
        origin.checkpoint,
        out,
        precision=precision or origin.precision,
        seq_len=origin.seq_len,
        tokenizer=tokenizer or origin.tokenizer,
        ema=ema,
    )
    typer.echo(f"{out}: {done.parameters:,} parameters in {len(done.files)} file{'s' * (len(done.files) > 1)}")
    if not done.tokenizer:
        typer.echo(f"no tokenizer was found: put the run's tokenizer.json into {out}", err=True)
