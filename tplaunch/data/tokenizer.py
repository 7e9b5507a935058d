"""Tokenizers: a Hugging Face `tokenizer.json`, given or trained as a byte-level BPE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from tplaunch.data.indexed import token_dtype
from tplaunch.errors import Problem, TplaunchError

END_OF_DOCUMENT = "<|endoftext|>"
# What published tokenizers call it, in order of preference: GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, Gemma.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        path: a `tokenizer.json`.

    Attributes:
        json: the file's text.
        vocab_size: one more than the largest id.
        dtype: in which its tokens are stored.
        eod: id of the token that ends a document.
        begin: ids that its post-processor puts before each text (begin-of-sequence); none for many tokenizers.
        fingerprint: sha256 of the file's meaning (its JSON, key order and spaces aside), in hex.

    Raises:
        TplaunchError: the file is missing, is not a tokenizer, or has no known end-of-document token.
    """

    def __init__(self, path: Path | str) -> None:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise TplaunchError(Problem(f"{path}: cannot read the tokenizer: {error.strerror}")) from None
        self._load(content, path)

    @classmethod
    def parse(cls, content: str, path: Path | str) -> Tokenizer:
        """From the text of a `tokenizer.json`; `path` is for messages."""
        made = cls.__new__(cls)
        made._load(content.encode(), path)
        return made

    def _load(self, content: bytes, path: Path | str) -> None:
        try:
            self.json = content.decode("utf-8")
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
        end = next((vocabulary[name] for name in _END_NAMES if name in vocabulary), None)
        if end is None:
            raise TplaunchError(
                Problem(
                    f"{path}: the tokenizer has no end-of-document token",
                    why=f"looked for {', '.join(_END_NAMES)}",
                    fix=f"add {END_OF_DOCUMENT} to it as a special token",
                )
            )
        self.eod = end
        self.begin = self._begin(vocabulary)
        self.dtype = token_dtype(self.vocab_size)
        canonical = json.dumps(json.loads(self.json), sort_keys=True)
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()

    def _begin(self, vocabulary: Iterable[str]) -> tuple[int, ...]:
        for text in ("a", *vocabulary):
            encoding = self._tokenizer.encode(text)
            if 0 in encoding.special_tokens_mask:
                return tuple(encoding.ids[: encoding.special_tokens_mask.index(0)])
        return ()

    def token_id(self, name: str) -> int | None:
        """Id of a token; None when there is no such token."""
        return self._tokenizer.token_to_id(name)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text, of type `dtype`, without any special token."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def encode(self, text: str) -> NDArray[np.integer]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is given, as transformers makes them: with what the post-processor adds before
        and after it, and names of special tokens read as these (a chat's turns)."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become the replacement character."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE (as GPT-2's) and write it as a `tokenizer.json`. Same texts, same file.

    Args:
        texts: what to learn from.
        vocab_size: at least 257: 256 bytes and the end of a document. A small text may yield fewer tokens.
        path: the file to write.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
