"""Loss, perplexity and bits per byte of a model on a text. Imports no torch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.build import tokenize
from tplaunch.data.corpus import refuse_other_tokenizer, verify_corpus
from tplaunch.data.endings import is_raw
from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.inputs import raw_files
from tplaunch.data.progress import Progress
from tplaunch.data.text import blocks
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError
from tplaunch.evaluate.rows import Windows
from tplaunch.evaluate.run import run_rows


@dataclass(frozen=True)
class Text:
    """A text that is made ready.

    Args:
        name: as it was given.
        corpus: its tokens.
        bytes: of the text whose tokens are predicted, in UTF-8; None where no tokenizer is known to tell.
        window: tokens that the model sees at once.
        warnings: what is likely not meant.
    """

    name: str
    corpus: IndexedTokens
    bytes: int | None
    window: int
    warnings: list[str]


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text.

    Args:
        loss: mean cross-entropy of the predicted tokens, in nats.
        perplexity: its exponential; infinite where no float holds it.
        bits_per_byte: all of the loss, in bits, by the bytes of the text.
        tokens: that are predicted.
        bytes: see `Text`.
        windows, window: how many there are, and their tokens.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    windows: int
    window: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"kind": "text", **asdict(self)}


@contextmanager
def ready_text(vocab_size: int, data: Path, tokenizer: Tokenizer | None, text_key: str, window: int) -> Iterator[Text]:
    """Make a text ready, for the length of a `with` block; nothing of it stays.

    Args:
        vocab_size: of the model.
        data: raw text, as `tplaunch data prepare` takes it, or the prefix of a .bin/.idx pair.
        tokenizer: needed for raw text.
        text_key: field or column of the text.
        window: tokens that the model sees at once.

    Raises:
        TplaunchError: it cannot be read, was made with another tokenizer, has tokens that the model has not, or none
            to predict.
    """
    show = Progress()
    with tempfile.TemporaryDirectory(prefix="tplaunch-eval-") as folder:
        if raw := is_raw(data):
            assert tokenizer is not None, "callers ask `tokenizer_of` first"
            files, prefix = raw_files([data], show), Path(folder) / "text"
            tokenize(files, prefix, tokenizer, text_key, show)
        else:
            files, prefix = [], data.absolute()
            if tokenizer is not None:
                refuse_other_tokenizer(prefix, tokenizer)
        corpus = verify_corpus(prefix, show, vocab_size=vocab_size, whole=True).corpus
        count = len(corpus.tokens)
        if count < 2:
            what = f"{data} has {count} token{'s' * (count != 1)}: of one, nothing is predicted"
            raise TplaunchError(Problem(what, fix="use more text"))
        size: int | None = None
        if tokenizer is not None:
            size = _raw_bytes(files, text_key, tokenizer) if raw else _decoded_bytes(corpus, tokenizer)
            size -= _bytes_of(tokenizer, corpus.tokens[:1].tolist())
        warnings = []
        if count <= window:
            warnings.append(f"{data} has {count:,} tokens, less than one window of {window:,} + 1")
        yield Text(str(data), corpus, size, window, warnings)


def _raw_bytes(files: Sequence[Path], text_key: str, tokenizer: Tokenizer) -> int:
    every = (block for path in files for block in blocks(path, text_key, tokenizer.cuts))
    return sum(len(text.encode()) for block in every for text in block.texts(text_key))


def _decoded_bytes(corpus: IndexedTokens, tokenizer: Tokenizer) -> int:
    return sum(_bytes_of(tokenizer, corpus.document(number).tolist()) for number in range(len(corpus)))


def _bytes_of(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Of their text; special tokens have none."""
    return len(tokenizer.decode(tokens).encode())


def score_text(origin: Origin, checked: Checked, text: Text) -> TextScore:
    """Score a text on the ranks of a recipe.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    windows = len(Windows(text.corpus, text.window).lengths)
    request = {"corpus": str(text.corpus.prefix), "window": text.window, "documents": origin.document_mask}
    found = run_rows(origin, checked, windows, request, Progress())
    return summarize_text([loss for loss, _ in found], len(text.corpus.tokens) - 1, text.bytes, text.window)


def summarize_text(losses: Sequence[float], tokens: int, size: int | None, window: int) -> TextScore:
    """What the windows of a text make together.

    Args:
        losses: of each window, summed.
        tokens: that are predicted.
        size: bytes of the text, where they are known.
        window: tokens of a window.
    """
    total = math.fsum(losses)
    loss = total / tokens
    return TextScore(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=total / math.log(2) / size if size else None,
        tokens=tokens,
        bytes=size,
        windows=len(losses),
        window=window,
    )
