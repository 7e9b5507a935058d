"""Tokenizers: a Hugging Face `tokenizer.json`, given or trained as a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers, trainers

from tplaunch.data.beside import GENERATION, TOKENIZER_CONFIG, read_beside, token_text
from tplaunch.data.cuts import Cuts, byte_level
from tplaunch.data.indexed import token_dtype
from tplaunch.data.mark import MARK, mark
from tplaunch.errors import Problem, TplaunchError

END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call it, in order of preference: GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, Gemma,
# DeepSeek.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: a `tokenizer.json`.
        eod: the token that ends documents; default: the one that is marked in the file, else what
            `tokenizer_config.json` or `generation_config.json` beside it names, else a known name.

    Attributes:
        json: the file's text, in which the end of documents is marked where its names do not tell it.
        vocab_size: one more than the largest id.
        dtype: in which its tokens are stored.
        eod: id of the token that ends a document.
        cuts: where its texts may be cut.
        begin: ids that its post-processor puts before each text (begin-of-sequence); none for many tokenizers.
        fingerprint: sha256 of the file's meaning (its JSON, key order and spaces aside), in hex.

    Raises:
        TplaunchError: the file is missing, is not a tokenizer, or has no known end-of-document token.
    """

    def __init__(self, path: Path | str, eod: str | None = None) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise TplaunchError(Problem(f"{path}: cannot read the tokenizer: {error.strerror}")) from None
        self._load(content, Path(path), eod)

    @classmethod
    def parse(cls, content: str, path: Path | str) -> Tokenizer:
        """From the text of a `tokenizer.json`; `path` is for messages."""
        made = cls.__new__(cls)
        made._load(content.encode(), None, None, path)
        return made

    def _load(self, content: bytes, file: Path | None, eod: str | None, path: Path | str = "") -> None:
        path = path or file or ""
        try:
            self.json = content.decode("utf-8")
            del content
            # Before the library's own object is made: what Python's takes meanwhile is free for it then.
            self.fingerprint, added = _facts(self.json)
            self._tokenizer = tokenizers.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises bare Exception on a file that it cannot parse
            raise TplaunchError(
                Problem(f"{path}: not a tokenizer.json", why=str(error), fix="give a Hugging Face tokenizer.json")
            ) from None
        # Names of special tokens inside a text are text: a document cannot end itself.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._end(vocabulary, added, file, eod, path)
        self.begin = self._begin(vocabulary)
        self.dtype = token_dtype(self.vocab_size)

    def _end(
        self,
        vocabulary: dict[str, int],
        added: list[dict[str, Any]],
        file: Path | None,
        asked: str | None,
        path: Path | str,
    ) -> None:
        """Find the token that ends documents, and mark it where the file alone would not tell it."""
        marked = [token["content"] for token in added if token.get(MARK)]
        alone = next((name for name in (*marked, *_END_NAMES) if name in vocabulary), None)
        if asked is not None and asked not in vocabulary:
            raise TplaunchError(
                Problem(f"{path}: the tokenizer has no token {asked!r}", fix="name one that it has, or leave it out")
            )
        end = asked or alone
        if file and not asked and not marked:
            # The ids that transformers gives a model that names none may be pieces of text.
            whole = {token["content"] for token in added}
            end = next((name for name in _said_beside(file, vocabulary) if name in whole), alone)
        if end is None:
            raise TplaunchError(
                Problem(
                    f"{path}: the tokenizer has no end-of-document token",
                    why=f"no file beside it names one, and it has none of {', '.join(_END_NAMES)}",
                    fix="name the token: --eod TOKEN, or data.eod in a recipe",
                )
            )
        self.eod = vocabulary[end]
        if end != alone:
            if not any(token["content"] == end for token in added):
                raise TplaunchError(
                    Problem(f"{path}: {end!r} is a piece of text", fix="name one of the tokenizer's added tokens")
                )
            self.json = mark(self.json, end)
            self.fingerprint, _ = _facts(self.json)

    def _begin(self, vocabulary: Iterable[str]) -> tuple[int, ...]:
        for text in ("a", *vocabulary):
            encoding = self._tokenizer.encode(text)
            if 0 in encoding.special_tokens_mask:
                return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])
        return ()

    def vocabulary(self) -> dict[str, int]:
        """Every token's id, added tokens too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def token_id(self, name: str) -> int | None:
        """Id of a token; None when there is no such token."""
        return self._tokenizer.token_to_id(name)

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids of special tokens."""
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self._tokenizer)

    def encode_batch(self, texts: Sequence[str], before: str = "") -> list[NDArray[np.integer]]:
        """Ids of each text, of type `dtype`, without any special token.

        Args:
            texts: whole ones, or what stands behind a cut.
            before: the character in front of the cut.
        """
        encodings = self._tokenizer.encode_batch_fast([before + text for text in texts], add_special_tokens=False)
        skipped = len(self.encode(before)) if before else 0
        return [np.array(encoding.ids[skipped:], self.dtype) for encoding in encodings]

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str, *, whole: bool = False) -> list[int]:
        """Ids of a text that a model is given, as transformers makes them: with what the post-processor adds before
        and after it, unless it is `whole` already, and names of special tokens read as these (a chat's turns)."""
        with self.names_read():
            return self.encode_given([text], whole=whole)[0].ids

    @contextmanager
    def names_read(self) -> Iterator[None]:
        """Read names of special tokens in texts as these tokens, in all threads."""
        self._tokenizer.encode_special_tokens = False
        try:
            yield
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_given(self, texts: Sequence[str], *, whole: bool, places: bool = True) -> list[tokenizers.Encoding]:
        """Tokens of texts, as `encode_prompt` makes them, within `names_read`.

        Args:
            places: and the characters that each stands for.
        """
        encode = self._tokenizer.encode_batch if places else self._tokenizer.encode_batch_fast
        return encode(texts, add_special_tokens=not whole)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become the replacement character."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def _facts(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The fingerprint of a tokenizer.json, and its added tokens."""
    content = json.loads(text)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(), content.get("added_tokens") or []


def _said_beside(file: Path, vocabulary: dict[str, int]) -> Iterator[str]:
    """Ends of texts that the files beside a `tokenizer.json` name."""
    name = token_text(read_beside(file, TOKENIZER_CONFIG).get("eos_token"))
    if name is not None:
        yield name
    ids = read_beside(file, GENERATION).get("eos_token_id")
    for number in ids if isinstance(ids, list) else [ids]:
        yield from (name for name, known in vocabulary.items() if number is not None and known == number)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE (as GPT-2's) and write it as a `tokenizer.json`. Same texts, same file.

    Args:
        texts: what to learn from.
        vocab_size: at least 257: 256 bytes and the end of a document. A small text may yield fewer tokens.
        path: the file to write.
    """
    tokenizer = byte_level()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
