"""`tplaunch eval`: what a checkpoint makes of texts."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption
from tplaunch.cli.output import echo
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.checkpoint.origin import Origin


def eval_(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run directory (its newest), one, or a Hugging Face folder.")
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT",
            help="Text, JSONL or Parquet as in `data prepare`, or a .bin/.idx prefix. Repeatable.",
        ),
    ] = None,
    text_key: Annotated[
        str, typer.Option(metavar="NAME", help="Field or column of the text, such as meta.text.")
    ] = "text",
    seq_len: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that it sees at once; default: as trained.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json; default: the checkpoint's.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, metavar="N", help="GPUs that share each layer.")] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, metavar="N", help="Groups of consecutive layers.")] = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, metavar="N", help="Copies of the model, which share the text.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: its loss on texts, on TP x PP x DP ranks of this machine.

    A text is read in windows that do not overlap, documents one after the other, and each token is predicted once.
    What a run's checkpoint gets is kept in evaluations.jsonl of its directory.

    Example: tplaunch eval runs/quickstart --data held-out.txt --tp 2
    """
    from contextlib import ExitStack

    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.cli.views.evaluations import evaluations_text
    from tplaunch.data.endings import is_raw
    from tplaunch.evaluate.run import check, tokenizer_of
    from tplaunch.evaluate.text import ready_text, score_text
    from tplaunch.huggingface.folder import checkpoint_of

    texts = data or []
    if not texts:
        raise TplaunchError(Problem("there is nothing to measure", fix="name a text: --data FILE"))
    origin = origin_of(checkpoint_of(checkpoint))
    checked = check(origin, tp, pp, dp, seq_len=seq_len)
    needed = tokenizer is not None or origin.tokenizer is not None or any(map(is_raw, texts))
    words = tokenizer_of(origin, tokenizer) if needed else None
    with ExitStack() as stack:
        window = checked.recipe.training.seq_len
        ready = [stack.enter_context(ready_text(origin, path, words, text_key, window)) for path in texts]
        for warning in (warning for text in ready for warning in text.warnings):
            typer.echo(f"warning: {warning}", err=True)
        found = [_kept(origin, text.name, score_text(origin, checked, text).as_dict()) for text in ready]
    if as_json:
        echo_json(found)
    else:
        echo(evaluations_text(found, title=""))


def _kept(origin: Origin, data: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A result as a record, which is kept where the checkpoint is a run's."""
    from tplaunch.run.evaluations import append_evaluation

    record = {"step": origin.step, "time": round(time.time(), 3), "data": data, **figures}
    if origin.run is not None:
        append_evaluation(origin.run, record)
    return record
