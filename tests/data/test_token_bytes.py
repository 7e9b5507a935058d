"""The bytes of tokens add up to those of the text, wherever it is cut."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tplaunch.data.token_bytes import TokenBytes, token_bytes
from tplaunch.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe

TEXTS = ["Größe, Würde — “æther” 🎭🎭", "To be, or not\n\tto be", " begins with a space", "x"] * 3
EVERY = sorted({char for text in TEXTS for char in text})


def byte_level(path: Path) -> None:
    train_bpe(TEXTS, 300, path)


def sentencepiece(path: Path) -> None:
    """As Llama 2's: a mark for a space, bytes for what the vocabulary has not."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *"Tobernt,", "\u2581t", "\u2581to"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, [("\u2581", "t"), ("\u2581t", "o")], byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([AddedToken("</s>", special=True)])
    made.save(str(path))


def unigram(path: Path) -> None:
    """As T5's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["</s>", "<unk>"], unk_token="<unk>", initial_alphabet=EVERY, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.save(str(path))


def count(known: TokenBytes, tokens: list[int]) -> int:
    """Of tokens behind the first."""
    pairs = itertools.pairwise(tokens)
    return sum(int((known.at_start if was == known.before else known.sizes)[now]) for was, now in pairs)


@pytest.mark.parametrize("make", [byte_level, sentencepiece, unigram])
def test_they_add_up_to_the_text(tmp_path: Path, make: object) -> None:
    make(tmp_path / "t.json")  # type: ignore[operator]
    tokenizer = Tokenizer(tmp_path / "t.json")
    known = token_bytes(tokenizer, tokenizer.vocab_size + 5)
    assert known is not None
    row, sizes = [tokenizer.eod], []
    for text in TEXTS:
        row += [*tokenizer.encode(text).tolist(), tokenizer.eod]
        sizes.append(len(tokenizer.decode(tokenizer.encode(text)).encode()))
    assert count(known, row) == sum(sizes)
    for cut in range(1, len(row)):  # also inside of characters
        assert count(known, row[: cut + 1]) + count(known, row[cut:]) == sum(sizes)
    assert known.sizes[tokenizer.eod] == 0
    assert len(known.sizes) == tokenizer.vocab_size + 5
    assert not known.sizes[tokenizer.vocab_size :].any()


def test_an_unknown_way_of_joining_tokens_gives_none(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({END_OF_DOCUMENT: 0, "a": 1}, unk_token=END_OF_DOCUMENT))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    made.save(str(tmp_path / "t.json"))
    assert token_bytes(Tokenizer(tmp_path / "t.json"), 2) is None
