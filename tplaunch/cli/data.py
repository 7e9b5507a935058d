"""`tplaunch data`: text to token files, and a look into them."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption
from tplaunch.errors import Problem, TplaunchError

app = typer.Typer(help="Make text into token files, and look into them.", no_args_is_help=True)


class Kind(str, Enum):
    """What inputs hold."""

    text = "text"
    chat = "chat"


class LossOn(str, Enum):
    """Tokens of conversations that are learned."""

    assistant = "assistant"
    all = "all"


@app.command()
def prepare(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PREFIX", help="Write PREFIX.bin and PREFIX.idx.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[INPUT]...",
            help=".txt, .jsonl, .json (each also as .gz, .zst, .bz2 or .xz) or .parquet files; folders and quoted "
            "patterns of them, read in the order of their names; - for standard input.",
        ),
    ] = None,
    files_from: Annotated[Path | None, typer.Option(metavar="LIST", help="More files: one name a line.")] = None,
    kind: Annotated[
        Kind, typer.Option(help="chat: conversations, JSON lines of messages, or of prompt and completion.")
    ] = Kind.text,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja that renders messages; default: the template beside the tokenizer."),
    ] = None,
    loss_on: Annotated[LossOn, typer.Option(help="Tokens of conversations that are learned.")] = LossOn.assistant,
    tokenizer: Annotated[Path | None, typer.Option(metavar="FILE", help="A tokenizer.json.")] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=257, max=10**6, metavar="N", help="Train a byte-level BPE of this size instead.")
    ] = None,
    text_key: Annotated[
        str, typer.Option(metavar="NAME", help="Field or column of the text, such as meta.text.")
    ] = "text",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out, and count, what has no text.")] = False,
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Begin documents with begin-of-sequence; default: when the tokenizer does."
        ),
    ] = None,
    eod: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="End documents with it; default: what the tokenizer's folder says."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tokenize text into Megatron .bin/.idx files. Run it again to go on after an interruption.

    Example: tplaunch data prepare books/*.txt --output data/books --vocab-size 4096
    """
    choice = [given for given in (tokenizer, vocab_size) if given is not None]
    if len(choice) != 1:
        raise TplaunchError(Problem("give either --tokenizer FILE or --vocab-size N"))
    if eod is not None and tokenizer is None:
        raise TplaunchError(Problem("--eod names a token of --tokenizer FILE", fix="leave it out"))
    is_chat = kind is Kind.chat
    if not is_chat and (chat_template is not None or loss_on is not LossOn.assistant):
        raise TplaunchError(Problem("--chat-template and --loss-on are of conversations", fix="--kind chat"))
    if is_chat and (tokenizer is None or bos is not None):
        what = "--vocab-size and --bos are not of conversations"
        why = "they need the tokenizer of the model that is tuned, whose template begins them"
        raise TplaunchError(Problem(what, why, fix="--tokenizer FILE alone"))
    from tplaunch.data import inputs as given
    from tplaunch.data.build import Chat, build

    listed = given.files_from(files_from) if files_from else []
    if listed:
        typer.echo(f"{files_from}: {len(listed):,} files in the order of the list", err=True)
    wanted = [*(inputs or []), *listed]
    if not wanted:
        raise TplaunchError(Problem("give INPUT, or --files-from LIST"))
    with given.stdin_as_file(wanted, output, sys.stdin.buffer) as files:
        chat = Chat(chat_template, loss_on.value) if is_chat else None
        meta = build(files, output, choice[0], text_key, bos=bos, eod=eod, skip_bad=skip_bad, chat=chat)
    if as_json:
        blocks = {"block_bytes": True, "bin_blocks": True, "idx_blocks": True, "chat": {"loss_blocks"}}
        echo_json(meta.model_dump(mode="json", exclude=blocks, exclude_none=True))  # type: ignore[arg-type]
    elif meta.chat:
        learned = f"{meta.chat.targets:,} of {meta.tokens:,} tokens learned"
        left_out = f", {meta.chat.unanswered:,} left out: nothing in them is learned" if meta.chat.unanswered else ""
        typer.echo(f"{output}: {meta.documents:,} conversations, {learned}{left_out}")
        typer.echo(f"in a recipe: data: {{kind: chat, train: {output}, tokenizer: {tokenizer}}}")
    else:
        typer.echo(f"{output}: {meta.documents:,} documents, {meta.tokens:,} tokens, vocabulary {meta.vocab_size:,}")
        typer.echo(f"in a recipe: data: {{train: {output}, tokenizer: {output}.tokenizer.json}}")


@app.command()
def inspect(
    prefix: Annotated[Path, typer.Argument(metavar="PREFIX", help="The path of a .bin/.idx pair without the ending.")],
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A tokenizer.json; default: the one beside the data.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of a large corpus, on all cores; default: a sample of it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check token files, and print what is in them.

    Counts, and the beginnings of some documents.

    Example: tplaunch data inspect data/books --verify
    """
    from tplaunch.data.inspect import describe

    report = describe(prefix, tokenizer, whole=verify)
    if as_json:
        echo_json(report)
    else:
        typer.echo("\n".join(_lines(report)))


def _lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    from tplaunch.data.inspect import LEARNED

    samples, is_chat = report.pop("samples"), report["learned"] is not None
    lines = [f"{name.replace('_', ' '):>14}  {_value(value)}" for name, value in report.items() if value is not None]
    for sample in samples:
        lines += ["", f"document {sample['document']:,}, {sample['tokens']:,} tokens:", sample["text"]]
    if is_chat:
        lines += ["", f"{LEARNED[0]}what is learned stands so{LEARNED[1]}"]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return ", ".join(value) if isinstance(value, list) else str(value)
