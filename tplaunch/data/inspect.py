"""What a corpus holds, for people and for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tplaunch.data.corpus import Meta, refuse_other_tokenizer, tokenizer_path, verify_corpus
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer

_SHOWN = 64  # tokens of a document


def describe(prefix: Path, tokenizer: Path | None = None, *, whole: bool = False) -> dict[str, Any]:
    """Counts, origin and the beginnings of up to three documents: the first, the middle and the last.

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
    samples = []
    for number in sorted({0, len(corpus) // 2, len(corpus) - 1} & set(range(len(corpus)))):
        tokens = corpus.document(number)
        shown = tokens[:_SHOWN].tolist()
        text = decoder.decode(shown, skip_special_tokens=False) if decoder else " ".join(map(str, shown))
        samples.append({"document": number, "tokens": len(tokens), "text": text})
    return {
        "prefix": str(prefix),
        "documents": len(corpus),
        "tokens": len(corpus.tokens),
        "sequences": len(corpus.lengths),
        "dtype": corpus.tokens.dtype.name,
        "largest_token": verified.largest if verified.whole else None,
        "checked": "whole" if verified.whole else "a sample; --verify checks the whole",
        "tokenizer": str(tokenizer) if tokenizer else None,
        "vocab_size": vocab_size,
        "sources": [source.name for source in meta.sources] if meta else None,
        "samples": samples,
    }
