"""Tokens of a prepared corpus are the library's on the whole text, for each kind of tokenizer and of file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from tplaunch.data import encode, text
from tplaunch.data.build import build
from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.tokenizer import Tokenizer, train_bpe

PLAY = (Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt").read_text()
ODD = (
    *(
        "日本語の文章です。次の行へ。\n",
        "مرحبا بالعالم، كيف حالك؟\n",
        "😀👩‍👩‍👧\n",
        "line\r\nother\r\n",
        " " * 90,
        "\n\n\n",
    ),
    *("</s><s> <tool> x\n", "a\u3000\nb\u00a0c\n", "1234567890" * 9, "};\n// comment\n/usr/bin\n", "e\u0301 \u0301x\n"),
    *("नमस्ते दुनिया\n", "=" * 150 + "\n/", "\t\tif (x) {\n\t\t\treturn;\n\t\t}\n", "x" * 300 + "\n", "don't I'LL\n"),
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def odd_text(size: int = 60_000, seed: int = 0) -> str:
    dice, parts, held = random.Random(seed), [], 0
    while held < size:
        start = dice.randrange(len(PLAY))
        parts.append(dice.choice(ODD) if dice.random() < 0.4 else PLAY[start : start + dice.randrange(1, 300)])
        held += len(parts[-1])
    return "".join(parts)


def byte_level(path: Path) -> None:
    train_bpe([odd_text()], 1500, path)


def split(*patterns: str) -> Callable[[Path], None]:
    """Llama 3's kind, Qwen's with NFC, DeepSeek's with several."""

    def make(path: Path) -> None:
        tokenizer = Library(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
        trainer = trainers.BpeTrainer(
            vocab_size=1500, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        tokenizer.train_from_iterator([odd_text(), "//x\n/y " * 9], trainer)
        tokenizer.save(str(path))

    return make


def sentencepiece(
    *, prepend: bool = True, metaspace: bool = False, added: tuple[str, ...] = ()
) -> Callable[[Path], None]:
    """Llama 2's and Mistral's kind: pieces, no pre-tokenizer that splits; Gemma's with tokens of several lines."""

    def make(path: Path) -> None:
        learned = Library(models.BPE(unk_token="<unk>"))
        learned.normalizer = normalizers.Replace(" ", "▁")
        learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        pieces = trainers.BpeTrainer(vocab_size=1200, special_tokens=["<unk>"], max_token_length=16)
        learned.train_from_iterator([odd_text().replace("\n", " ")], pieces)
        model = json.loads(learned.to_str())["model"]
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        names += [piece for piece in model["vocab"] if piece not in ("<unk>", "日", "章")]
        merges = [tuple(merge) for merge in model["merges"] if not set("日章") & set("".join(merge))]
        vocabulary = {name: number for number, name in enumerate(names)}
        tokenizer = Library(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Prepend("▁")] if prepend and not metaspace else []
        if metaspace:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
        tokenizer.add_tokens([AddedToken(one, normalized=False) for one in added])
        tokenizer.save(str(path))

    return make


KINDS = {
    "byte-level": byte_level,
    "llama 3": split(LLAMA3),
    "deepseek": split(r"\p{N}{1,3}", "[一-龥぀-ヿ]+", LLAMA3),
    "o200k": split(O200K),
    "mistral": sentencepiece(),
    "llama 2": sentencepiece(metaspace=True),
    "gemma": sentencepiece(prepend=False, added=("\n\n", "\n\n\n", "▁▁", "<tool>")),
    "added": sentencepiece(added=("<tool>",)),
}


def library_ids(path: Path, document: str) -> list[int]:
    library = Library.from_file(str(path))
    library.encode_special_tokens = True
    return library.encode(document, add_special_tokens=False).ids


def write(folder: Path, kind: str, documents: list[str]) -> list[Path]:
    """A file for each document, or one with all."""
    if kind == "txt":
        paths = [folder / f"{number}.txt" for number in range(len(documents))]
        for path, document in zip(paths, documents, strict=True):
            path.write_bytes(document.encode())
        return paths
    path = folder / f"d.{kind}"
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": documents}), path)
    else:
        lines = [json.dumps({"id": n, "text": d, "z": "x"}, ensure_ascii=n % 2 == 0) for n, d in enumerate(documents)]
        path.write_text("\n".join(lines) + "\n")
    return [path]


@pytest.mark.parametrize("format_", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, format_: str
) -> None:
    monkeypatch.setattr(text, "BLOCK", 700)
    KINDS[kind](tmp_path / "tokenizer.json")
    documents = [odd_text(seed=1), "short", odd_text(5000, seed=2)]
    paths = write(tmp_path, format_, documents)
    blocks = [
        block for path in paths for block in text.blocks(path, "text", Tokenizer(tmp_path / "tokenizer.json").cuts)
    ]
    assert len(blocks) > 40 and max(len(block.payload) for block in blocks) < 6000  # pieces, not documents
    build(paths, tmp_path / "c", tmp_path / "tokenizer.json")
    corpus = IndexedTokens.open(tmp_path / "c")
    for number, document in enumerate(documents):
        assert corpus.document(number)[:-1].tolist() == library_ids(tmp_path / "tokenizer.json", document)


@pytest.mark.parametrize("block", [700, text.BLOCK])
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_gets_little_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, block: int
) -> None:
    """It takes more than a hundred bytes for one of text, on each core; also where a block is a whole document."""
    monkeypatch.setattr(text, "BLOCK", block)
    monkeypatch.setattr(encode, "_TOGETHER", 300)
    sizes: list[int] = []
    real = Tokenizer.encode_batch

    def counted(self: Tokenizer, texts: Sequence[str], before: str = "") -> list[NDArray[np.integer]]:
        sizes.append(sum(map(len, texts)))
        return real(self, texts, before)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    KINDS[kind](tmp_path / "tokenizer.json")
    documents = [odd_text(seed=3), *(odd_text(n, seed=n) for n in range(1, 400, 17)), odd_text(5000, seed=4)]
    (path,) = write(tmp_path, "jsonl", documents)
    build([path], tmp_path / "c", tmp_path / "tokenizer.json")
    assert max(sizes) < 5000 and len(sizes) > 50
    corpus = IndexedTokens.open(tmp_path / "c")
    for number, document in enumerate(documents):
        assert corpus.document(number)[:-1].tolist() == library_ids(tmp_path / "tokenizer.json", document)


def test_a_text_without_a_safe_place_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every character may join with every other one here."""
    monkeypatch.setattr(text, "BLOCK", 100)
    names = ["<unk>", "</s>", *"ab", "ab", "ba", "aa", "bb"]
    merges = [("a", "b"), ("b", "a"), ("a", "a"), ("b", "b")]
    tokenizer = Library(models.BPE({name: n for n, name in enumerate(names)}, merges, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    document = "".join(random.Random(0).choices("ab", k=3000))
    (tmp_path / "a.txt").write_text(document)
    build([tmp_path / "a.txt"], tmp_path / "c", tmp_path / "tokenizer.json")
    tokens = IndexedTokens.open(tmp_path / "c").document(0)
    assert np.array_equal(tokens[:-1], library_ids(tmp_path / "tokenizer.json", document))
