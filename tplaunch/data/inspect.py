"""What a corpus holds, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from tplaunch.data.corpus import Meta, refuse_other_tokenizer, tokenizer_path, verify_corpus
from tplaunch.data.indexed import loss_path, open_loss
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer

_SHOWN = 64  # tokens of a document
LEARNED = ("\u27e6", "\u27e7")  # brackets that text and templates hardly have; around tokens that are targets


def describe(prefix: Path, tokenizer: Path | None = None, *, whole: bool = False) -> dict[str, Any]:
    """Counts, origin and the beginnings of up to three documents: the first, the middle and the last.

    Tokens that are learned of a conversation stand in brackets (`LEARNED`).

    Args:
        prefix: of a .bin/.idx pair, which is checked.
        tokenizer: a tokenizer.json to decode with; default: the one beside the data, else token numbers are shown.
        whole: check all of it; else a sample of its blocks where it is large.

    Raises:
        TplaunchError: the files are damaged, or the tokenizer is another than they were made with.
    """
    if tokenizer is None and tokenizer_path(prefix).exists():
        tokenizer = tokenizer_path(prefix)
    decoder = Tokenizer(tokenizer) if tokenizer else None
    if decoder:
        refuse_other_tokenizer(prefix, decoder)
    vocab_size = decoder.vocab_size if decoder else None
    verified = verify_corpus(prefix, Progress(), vocab_size=vocab_size, whole=whole)
    corpus = verified.corpus
    meta = Meta.read(prefix)
    loss = open_loss(prefix, len(corpus.tokens)) if loss_path(prefix).exists() else None
    samples = []
    for number in sorted({0, len(corpus) // 2, len(corpus) - 1} & set(range(len(corpus)))):
        tokens = corpus.document(number)
        shown = tokens[:_SHOWN].tolist()
        if loss is None:
            text = _text(shown, decoder)
        else:
            start = corpus.document_start(number)
            text = _marked(shown, loss[start : start + len(shown)].tolist(), decoder)
        samples.append({"document": number, "tokens": len(tokens), "text": text})
    return {
        "prefix": str(prefix),
        "documents": len(corpus),
        "tokens": len(corpus.tokens),
        "sequences": len(corpus.lengths),
        "dtype": corpus.tokens.dtype.name,
        "learned": int(np.count_nonzero(loss)) if loss is not None else None,
        "largest_token": verified.largest if verified.whole else None,
        "checked": "whole" if verified.whole else "a sample; --verify checks the whole",
        "tokenizer": str(tokenizer) if tokenizer else None,
        "vocab_size": vocab_size,
        "sources": [source.name for source in meta.sources] if meta else None,
        "samples": samples,
    }


def _text(tokens: Sequence[int], decoder: Tokenizer | None) -> str:
    return decoder.decode(tokens, skip_special_tokens=False) if decoder else " ".join(map(str, tokens))


def _marked(tokens: Sequence[int], loss: Sequence[int], decoder: Tokenizer | None) -> str:
    """Tokens as text, those that are targets in brackets."""
    parts = []
    for learned, pairs in groupby(zip(tokens, loss, strict=True), key=lambda pair: bool(pair[1])):
        text = _text([token for token, _ in pairs], decoder)
        parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if learned else text)
    return ("" if decoder else " ").join(parts)
