"""`tplaunch eval`: what a checkpoint makes of texts, and of questions with choices."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import EmaOption, JsonOption
from tplaunch.cli.output import echo
from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.checkpoint.origin import Origin


def eval_(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A run (its newest), RUN@STEP, its path, or a Hugging Face folder."),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT", help="Text, JSONL or Parquet as in `data prepare`, or a .bin/.idx prefix. Repeatable."
        ),
    ] = None,
    choices: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="JSON lines of question, choices and answer. Repeatable."),
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
    ema: EmaOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a model on texts and on questions.

    On TP x PP x DP ranks of this machine. A text is read in windows that do not overlap, documents one after the other,
    and each token is predicted once. Questions are answered as lm-eval has it: by the likeliest choice (acc), a
    character (acc_norm), a byte (acc_bytes). What a run's checkpoint gets is kept in its evaluations.jsonl, and sent to
    its W&B run.

    Example: tplaunch eval runs/quickstart --data held-out.txt --choices questions.jsonl --tp 2
    """
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.cli.views.table import columns
    from tplaunch.data.endings import is_raw
    from tplaunch.data.pairs import Words
    from tplaunch.data.questions import ask
    from tplaunch.evaluate.choices import score_choices
    from tplaunch.evaluate.run import check, tokenizer_of
    from tplaunch.evaluate.text import ready_text, score_text
    from tplaunch.huggingface.given import checkpoint_of
    from tplaunch.report.evaluations import evaluation_table

    texts, questions = data or [], choices or []
    if not texts and not questions:
        fix = "name a text, --data FILE, or questions, --choices FILE"
        raise TplaunchError(Problem("there is nothing to measure", fix=fix))
    origin = origin_of(checkpoint_of(checkpoint), ema=ema)
    checked = check(origin, tp, pp, dp, seq_len=seq_len)
    window = checked.recipe.training.seq_len
    file = tokenizer or origin.tokenizer
    needed = file is not None or questions or any(map(is_raw, texts))
    loaded = tokenizer_of(origin, file) if needed else None
    with ExitStack() as stack:
        asked = []
        if questions:
            assert loaded is not None and file is not None, "else `tokenizer_of` has said so"
            words = Words(loaded, file, window)
            asked = [(str(path), ask(path, words)) for path in questions]
        ready = [
            stack.enter_context(ready_text(origin.model.vocab_size, path, loaded, text_key, window)) for path in texts
        ]
        warnings = [*(text.warnings for text in ready), *(some.warnings for _, some in asked)]
        for warning in (one for some in warnings for one in some):
            typer.echo(f"warning: {warning}", err=True)
        found = [_kept(origin, text.name, score_text(origin, checked, text).as_dict()) for text in ready]
        found += [_kept(origin, name, score_choices(origin, checked, some).as_dict()) for name, some in asked]
    if origin.run is not None:
        from tplaunch.observe.evaluations import send_evaluations

        if why := send_evaluations(origin.run, found):
            typer.echo(f"warning: W&B has not got the results: {why}", err=True)
    if as_json:
        echo_json(found)
    else:
        echo(columns("", *evaluation_table(found), frozenset((1,))))


def _kept(origin: Origin, data: str, figures: dict[str, Any]) -> dict[str, Any]:
    """A result as a record, which is kept where the checkpoint is a run's."""
    from tplaunch.files import as_json
    from tplaunch.run.evaluations import append_evaluation

    data = f"{data} (averaged weights)" if origin.ema else data
    record = as_json({"step": origin.step, "time": round(time.time(), 3), "data": data, **figures})
    if origin.run is not None:
        append_evaluation(origin.run, record)
    return record
