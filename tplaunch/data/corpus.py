"""What is known of a prepared corpus (`PREFIX.meta.json`, beside .bin and .idx), and the check before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tplaunch.data.cache import remembered
from tplaunch.data.indexed import IndexedTokens, bin_path, idx_path
from tplaunch.data.progress import Progress
from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import sha256_file

if TYPE_CHECKING:
    from tplaunch.data.tokenizer import Tokenizer


def meta_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".meta.json")


def tokenizer_path(prefix: Path) -> Path:
    """The tokenizer that a corpus was prepared with, kept beside it."""
    return prefix.with_name(prefix.name + ".tokenizer.json")


class Origin(BaseModel):
    """An input that a corpus was made from."""

    name: str
    bytes: int
    sha256: str


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
        bin_sha256, idx_sha256: checksums of the two files.
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
    bin_sha256: str
    idx_sha256: str

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


def verify_corpus(prefix: Path, cache: Path, progress: Progress) -> tuple[IndexedTokens, int]:
    """Open a corpus and check all of it: sizes, index, checksums where they are known, and that tokens are >= 0.

    The full reading is done once for as long as the files do not change; its result is kept in the cache.

    Returns:
        the corpus and its largest token.

    Raises:
        TplaunchError: with the file and the byte offset of what is wrong.
    """
    prefix = prefix.absolute()
    corpus = IndexedTokens.open(prefix)
    meta = Meta.read(prefix)
    checksums = {bin_path(prefix): meta.bin_sha256, idx_path(prefix): meta.idx_sha256} if meta else {}

    def check() -> int:
        corpus.verify()
        for path, checksum in checksums.items():
            if sha256_file(path) != checksum:
                raise TplaunchError(
                    Problem(
                        f"{path}: its sha256 is not the one in {meta_path(prefix).name}",
                        why="the file changed after it was prepared",
                        fix="copy the file again, or prepare the data again",
                    )
                )
        with progress.task(f"checking {prefix.name}", len(corpus.tokens)) as advance:
            return corpus.largest_token(advance)

    files = [bin_path(prefix), idx_path(prefix), *([meta_path(prefix)] if meta else [])]
    return corpus, remembered(cache, "largest token", files, check)


def refuse_other_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Check that a corpus was made with a tokenizer, and its documents begin as this one begins texts, where its
    maker is known.

    Raises:
        TplaunchError: it was made with another one, or its documents begin otherwise.
    """
    meta = Meta.read(prefix)
    if meta is None:
        return
    ours = f"use the one it was made with, {tokenizer_path(prefix)}"
    if meta.bos != tokenizer.begin:
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
