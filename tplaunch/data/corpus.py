"""What is known of a prepared corpus (`PREFIX.meta.json`, beside .bin and .idx), and the check before it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tplaunch.data.blocks import BLOCK, SAMPLED, block_count, look, sample_of, whole_places
from tplaunch.data.indexed import IndexedTokens, bin_path, idx_path, loss_path, open_loss
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import sha256_file

if TYPE_CHECKING:
    from tplaunch.data.tokenizer import Tokenizer

_NAMED = 10  # damaged places in a message


def meta_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".meta.json")


def tokenizer_path(prefix: Path) -> Path:
    """The tokenizer that a corpus was prepared with, kept beside it."""
    return prefix.with_name(prefix.name + ".tokenizer.json")


class Origin(BaseModel):
    """An input that a corpus was made from.

    Attributes:
        sha256: of its content (`fingerprint.text_sha256`).
    """

    name: str
    bytes: int
    sha256: str


class ChatMeta(BaseModel):
    """What is known of a corpus of conversations, of which `PREFIX.loss` says what is learned.

    Attributes:
        template: SHA-256 of the chat template, or None: all of it is text.
        loss_on: assistant or all.
        targets: tokens that are learned.
        answers: of the assistant; 0 where all tokens are learned.
        unended: answers that do not end with a token that stops generation.
        merged: prompts whose end is in one token with the beginning of the completion.
        unanswered: conversations that were left out, as nothing in them is learned.
        loss_blocks: as `Meta.bin_blocks`, of that file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str | None
    loss_on: Literal["assistant", "all"]
    targets: int
    answers: int
    unended: int
    merged: int
    unanswered: int
    loss_blocks: list[str]


class Meta(BaseModel):
    """The content of `PREFIX.meta.json`; corpora of other makers have none.

    Attributes:
        format: of this file.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: of the tokenizer.
        eod: the token that ends each document.
        bos: the tokens that begin each document.
        documents, tokens: counts.
        sources: the inputs, in order.
        block_bytes, bin_blocks, idx_blocks: SHA-256 of each block of so many bytes of the two files.
        bin_sha256, idx_sha256: checksums of the whole files, in place of those, of earlier versions.
        chat: of conversations; None: it is text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    tokenizer: str
    vocab_size: int
    eod: int
    bos: tuple[int, ...] = ()
    documents: int
    tokens: int
    sources: list[Origin]
    block_bytes: Annotated[int, Field(ge=4096, multiple_of=8)] = BLOCK
    bin_blocks: list[str] = []
    idx_blocks: list[str] = []
    bin_sha256: str | None = None
    idx_sha256: str | None = None
    chat: ChatMeta | None = None

    @classmethod
    def read(cls, prefix: Path) -> Meta | None:
        """None where there is no such file.

        Raises:
            TplaunchError: it does not describe a corpus.
        """
        path = meta_path(prefix)
        if not path.exists():
            return None
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            why = ": ".join([*map(str, first["loc"]), first["msg"]])
            raise TplaunchError(
                Problem(f"{path}: does not describe a corpus", why=why, fix="prepare the data again")
            ) from None


@dataclass(frozen=True)
class Verified:
    """A corpus that was found in order.

    Attributes:
        whole: whether all of it was read, or a sample of its blocks.
        largest: token that was seen; -1 where there is none.
    """

    corpus: IndexedTokens
    whole: bool
    largest: int


def verify_corpus(
    prefix: Path, progress: Progress, *, vocab_size: int | None = None, whole: bool = False, sample: int = SAMPLED
) -> Verified:
    """Open a corpus and check it: sizes, header, index, and by block its checksums, where they are known, and tokens.

    Args:
        vocab_size: tokens must be below it.
        whole: read all blocks, on all cores; else a few, so that a start takes no longer with a larger corpus.
        sample: so many of each file, all where it has no more.

    Raises:
        TplaunchError: with the file and the byte offset of what is wrong.
    """
    prefix = prefix.absolute()
    corpus, meta = IndexedTokens.open(prefix), Meta.read(prefix)
    block = meta.block_bytes if meta else BLOCK
    loss = loss_path(prefix)
    sums = {bin_path(prefix): meta.bin_blocks, idx_path(prefix): meta.idx_blocks} if meta else {}
    if meta and meta.chat:
        sums[loss] = meta.chat.loss_blocks
    known = {bin_path(prefix): meta.bin_sha256, idx_path(prefix): meta.idx_sha256} if meta else {}
    files = [idx_path(prefix), bin_path(prefix)]
    if loss.exists() or loss in sums:
        open_loss(prefix, len(corpus.tokens))
        files.append(loss)
    counts = {path: block_count(path, block) for path in files}
    chosen = {path: list(range(count)) if whole else sample_of(count, sample) for path, count in counts.items()}
    corpus.verify(sample=len(chosen[idx_path(prefix)]) < counts[idx_path(prefix)])
    largest = -1
    with progress.task(f"checking {prefix.name}", sum(map(len, chosen.values()))) as advance:
        for path, numbers in chosen.items():
            dtype = {bin_path(prefix): corpus.tokens.dtype, loss: np.dtype(np.uint8)}.get(path)
            damaged = []
            for found in look(path, numbers, dtype, block=block, advance=advance):
                expected = sums.get(path)
                if expected and (found.number >= len(expected) or expected[found.number] != found.sha256):
                    damaged.append(found.number)
                elif path == loss:
                    if found.largest > 1:
                        damaged.append(found.number)
                    continue
                elif found.smallest < 0 or (vocab_size is not None and found.largest >= vocab_size):
                    corpus.refuse_tokens(found.number * block, block, vocab_size)
                largest = max(largest, found.largest)
            if damaged:
                raise _damaged(path, whole_places(damaged, block, path.stat().st_size))
            all_read = len(numbers) == counts[path]
            if all_read and known.get(path) not in (None, sha256_file(path)):
                raise _damaged(path, [(0, path.stat().st_size)])
    return Verified(corpus, chosen[bin_path(prefix)] == list(range(counts[bin_path(prefix)])), largest)


def _damaged(path: Path, places: list[tuple[int, int]]) -> TplaunchError:
    ranges = ", ".join(f"{begin:,} to {end - 1:,}" for begin, end in places[:_NAMED])
    more = f" and {len(places) - _NAMED:,} places more" if len(places) > _NAMED else ""
    return TplaunchError(
        Problem(
            f"{path}: bytes {ranges}{more} are not what was prepared",
            why=f"their sha256 is not the one in {path.stem}.meta.json: the file changed since",
            fix="copy the file again, or prepare the data again",
        )
    )


def refuse_other_kind(prefix: Path, kind: Literal["text", "chat"]) -> None:
    """Check that a corpus is text, or conversations, as is wanted.

    Raises:
        TplaunchError: it is the other one.
    """
    if kind == "text" and loss_path(prefix).exists():
        why = f"{loss_path(prefix).name} says what is to be learned of them"
        raise TplaunchError(Problem(f"{prefix} holds conversations", why=why, fix="data.kind: chat"))
    if kind == "chat" and not loss_path(prefix).exists():
        why = f"there is no {loss_path(prefix).name} that says what is to be learned"
        fix = "prepare them with `tplaunch data prepare --kind chat`, name the .jsonl files, or data.kind: text"
        raise TplaunchError(Problem(f"{prefix} holds no conversations", why=why, fix=fix))


def refuse_other_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Check that a corpus was made with a tokenizer, and its documents begin as this one begins texts, where its
    maker is known.

    Raises:
        TplaunchError: it was made with another one, or its documents begin otherwise.
    """
    meta = Meta.read(prefix)
    if meta is None:
        return
    begins = tokenizer.begin if meta.chat else meta.bos  # conversations begin as their template begins them
    ours = f"use the one it was made with, {tokenizer_path(prefix)}"
    if begins != tokenizer.begin:
        again = f"prepare it again with --{'' if tokenizer.begin else 'no-'}bos"
        raise TplaunchError(
            Problem(
                f"{prefix}: its documents do not begin as this tokenizer begins texts",
                why=f"they begin with {_tokens(meta.bos)}, its texts with {_tokens(tokenizer.begin)}",
                fix=again if meta.tokenizer == tokenizer.fingerprint else f"{ours}, or {again}",
            )
        )
    if meta.tokenizer != tokenizer.fingerprint:
        raise TplaunchError(
            Problem(
                f"{prefix} was made with another tokenizer",
                why=f"its sha256 is {meta.tokenizer[:16]}..., not {tokenizer.fingerprint[:16]}...",
                fix=ours,
            )
        )


def _tokens(ids: tuple[int, ...]) -> str:
    return f"token {', '.join(map(str, ids))}" if ids else "no token of their own"
