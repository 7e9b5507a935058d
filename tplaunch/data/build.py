"""Raw text to `.bin/.idx`: in bounded memory, whole or not at all, going on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.answers import ChatReader, LossOn, chat_reader
from tplaunch.data.begin import with_begin
from tplaunch.data.blocks import block_sums
from tplaunch.data.cache import owned
from tplaunch.data.conversations import chat_blocks
from tplaunch.data.corpus import ChatMeta, Meta, Origin, meta_path, tokenizer_path
from tplaunch.data.encode import encode_all
from tplaunch.data.fingerprint import text_sha256
from tplaunch.data.indexed import IndexedWriter, Written, idx_path
from tplaunch.data.inputs import raw_files, shown
from tplaunch.data.made import FORMAT
from tplaunch.data.progress import Progress
from tplaunch.data.text import Block, blocks
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import write_atomic

_CUTTING = 3  # raise it when the same text would give other blocks
_SYNC_EVERY = 64  # blocks between the points from which an interrupted preparation goes on
_SHOWN = 5  # documents left out that are named, before they are only counted
_TRAINING_BYTES = 1 << 30  # a tokenizer is trained on this much text at most


class Chat(NamedTuple):
    """How conversations are read.

    Args:
        template: a file that renders messages; None: what lies beside the tokenizer does.
        loss_on: what is learned.
    """

    template: Path | None = None
    loss_on: LossOn = "assistant"


def build(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: Path | int,
    text_key: str = "text",
    progress: bool = True,
    bos: bool | None = None,
    eod: str | None = None,
    skip_bad: bool = False,
    chat: Chat | None = None,
) -> Meta:
    """Tokenize raw text into `OUTPUT.bin`, `.idx`, `.meta.json` and `.tokenizer.json`.

    A .txt file is one document; so is a line of a .jsonl file and a row of a .parquet file. Empty ones are left
    out. Each begins as the tokenizer begins texts, and ends with its end-of-document token. The .idx comes last:
    where it is, the corpus is complete. After an interruption the same call goes on where the last one had synced.

    Args:
        inputs: files, folders and patterns, read in this order and in the order of names.
        output: the prefix to write.
        tokenizer: a tokenizer.json, or the vocabulary size of a byte-level BPE to train on the inputs.
        text_key: field or column that holds the text.
        progress: show bars, on a terminal.
        bos: whether documents begin with begin-of-sequence, whatever the tokenizer does; the one that is kept beside
            the corpus does the same.
        eod: the token that ends documents; default: see `Tokenizer`.
        skip_bad: leave out, and count, lines and rows that cannot be read.
        chat: they hold conversations, one a line, of which `OUTPUT.loss` says what is learned.

    Raises:
        TplaunchError: an input or the tokenizer cannot be read, or the output exists already.
    """
    show = Progress(progress)
    inputs = raw_files(inputs, show)
    with owned(output, show):
        if idx_path(output).exists():
            raise TplaunchError(Problem(f"{idx_path(output)} exists already", fix="remove it, or name another output"))
        if isinstance(tokenizer, int):
            train_tokenizer(inputs, tokenizer, text_key, tokenizer_path(output), show, skip_bad)
            tokenizer, bos, eod = tokenizer_path(output), bos or None, None
        loaded = Tokenizer(tokenizer, eod) if bos is None else with_begin(tokenizer, bos, eod)
        reader = chat_reader(tokenizer, loaded, chat.template, chat.loss_on) if chat else None
        write_atomic(tokenizer_path(output), loaded.json)
        return tokenize(inputs, output, loaded, text_key, show, skip_bad, reader)


def train_tokenizer(
    inputs: Sequence[Path], vocab_size: int, text_key: str, path: Path, show: Progress, skip_bad: bool = False
) -> None:
    """Train a byte-level BPE on at most 1 GiB of the inputs, the same amount of each."""
    share = _TRAINING_BYTES // len(inputs)

    def texts(advance: Callable[[int], None]) -> Iterator[str]:
        for source in inputs:
            read = 0
            for block in blocks(source, text_key, skip_bad=skip_bad):
                yield from block.texts(text_key, [] if skip_bad else None)
                advance(block.read)
                read += block.read
                if read >= share:
                    break

    with show.task("training the tokenizer", sum(min(path.stat().st_size, share) for path in inputs)) as advance:
        temporary = path.with_name(path.name + ".tmp")
        train_bpe(texts(advance), vocab_size, temporary)
        temporary.replace(path)


def tokenize(
    inputs: Sequence[Path],
    output: Path,
    tokenizer: Tokenizer,
    text_key: str,
    show: Progress,
    skip_bad: bool = False,
    chat: ChatReader | None = None,
) -> Meta:
    """Write the corpus, with the tokenizer that lies beside it already. The caller owns the output.

    Args:
        chat: the inputs are conversations, which this makes tokens of.
    """
    sources = [Origin(name=path.name, bytes=path.stat().st_size, sha256=text_sha256(path)) for path in inputs]
    size = sum(source.bytes for source in sources)
    task = [FORMAT, _CUTTING, [source.sha256 for source in sources], tokenizer.fingerprint, text_key, skip_bad]
    begins = () if chat else tokenizer.begin  # conversations begin as their template says
    journal = _Journal(output, [*task, *begins, *(chat.about() if chat else [])])
    done, written, bad, counts = journal.read()
    writer = IndexedWriter(output, tokenizer.dtype, written, loss=chat is not None)
    begin, opened = np.array(begins, tokenizer.dtype), written.open_tokens > 0

    def add(tokens: NDArray[np.integer], loss: NDArray[np.bool_] | None) -> None:
        """Append to a document, which opens with its first tokens."""
        nonlocal opened
        if len(tokens) and not opened:
            tokens, opened = np.concatenate([begin, tokens]) if len(begin) else tokens, True
        writer.add(tokens, loss)

    try:
        with (
            chat.tokenizer.names_read() if chat else nullcontext(),
            show.task(f"tokenizing {output.name}", size) as advance,
        ):
            if chat is None:
                every = (blocks(path, text_key, tokenizer.cuts, skip_bad) for path in inputs)
            else:
                every = (chat_blocks(path) for path in inputs)
            rest = _after(done, chain.from_iterable(every), advance)
            encoded_blocks = encode_all(rest, tokenizer, text_key, skip_bad, chat)
            for number, encoded in enumerate(encoded_blocks, done + 1):
                start, loss = 0, encoded.loss
                for end in encoded.ends:
                    add(encoded.tokens[start:end], None if loss is None else loss[start:end])
                    writer.end_document()
                    start, opened = end, False
                add(encoded.tokens[start:], None if loss is None else loss[start:])
                counts.update(encoded.counts)
                for problem in encoded.bad:
                    bad += 1
                    if bad <= _SHOWN:
                        show.say(f"left out: {problem.where}: {problem.what}")
                if number % _SYNC_EVERY == 0:
                    journal.write(number, writer.sync(), bad, counts)
                advance(encoded.read)
        if bad:
            show.say(f"left out {bad:,} lines or rows that cannot be read")
        total = writer.sync()
        if not total.documents:
            names = ", ".join(str(shown(path)) for path in inputs)
            why = f"{counts['unanswered']:,} conversations have nothing that the assistant says" if chat else ""
            raise TplaunchError(Problem(f"no {'answer' if chat else 'text'} in {names}", why=why))
        bin_file, idx_file = writer.compose()
        meta = Meta(
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            bos=begins,
            documents=total.documents,
            tokens=total.tokens,
            sources=sources,
            bin_blocks=block_sums(bin_file),
            idx_blocks=block_sums(idx_file),
            chat=_chat_meta(chat, counts, writer.loss_file) if chat else None,
        )
        write_atomic(meta_path(output), meta.model_dump_json(indent=1) + "\n")
        journal.remove()  # from here on there is nothing to go on with: the files are moved away
        writer.commit()
    finally:
        writer.close()
    return meta


def _chat_meta(chat: ChatReader, counts: Counter[str], loss: Path) -> ChatMeta:
    names = ("targets", "answers", "unended", "merged", "unanswered")
    template = hashlib.sha256(chat.template.text.encode()).hexdigest() if chat.template else None
    return ChatMeta(
        template=template,
        loss_on=chat.loss_on,
        loss_blocks=block_sums(loss),
        **{name: counts[name] for name in names},
    )


def _after(done: int, every: Iterable[Block], advance: Callable[[int], None]) -> Iterator[Block]:
    """The blocks of all inputs, less the first `done`."""
    for number, block in enumerate(every):
        if number < done:
            advance(block.read)
        else:
            yield block


class _Journal:
    """How far a preparation has come, in a file beside its output, for the same task only."""

    def __init__(self, output: Path, task: list[Any]) -> None:
        self._path = output.with_name(output.name + ".journal.tmp")
        self._task = task

    def read(self) -> tuple[int, Written, int, Counter[str]]:
        """Blocks done, what was written of them, documents left out, and counts of conversations."""
        if self._path.exists():
            entry = json.loads(self._path.read_text(encoding="utf-8"))
            if entry["task"] == self._task:
                return entry["blocks"], Written(**entry["written"]), entry["bad"], Counter(entry.get("counts"))
        return 0, Written(), 0, Counter()

    def write(self, blocks_done: int, written: Written, bad: int, counts: Counter[str]) -> None:
        entry = {
            "task": self._task,
            "blocks": blocks_done,
            "written": asdict(written),
            "bad": bad,
            "counts": dict(counts),
        }
        write_atomic(self._path, json.dumps(entry))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
