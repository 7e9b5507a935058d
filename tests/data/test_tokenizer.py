"""Byte-level BPE: trained the same each time, exact round trips, and files that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data.mark import MARK, mark, unmark
from tplaunch.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from tplaunch.errors import TplaunchError

TEXT = (Path(__file__).parents[2] / "recipes" / "data" / "shakespeare-validation.txt").read_text()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([TEXT], 512, path)
    return Tokenizer(path)


def test_the_size_is_the_one_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.decode([tokenizer.eod], skip_special_tokens=False) == END_OF_DOCUMENT
    tokens = tokenizer.encode(TEXT)
    assert tokens.dtype == np.dtype("<u2")
    assert tokens.max() < 512
    assert len(tokens) < 0.6 * len(TEXT)
    assert tokenizer.decode(tokens) == TEXT


def test_the_smallest_vocabulary_is_bytes_and_an_end(tmp_path: Path) -> None:
    train_bpe([TEXT], 257, tmp_path / "t.json")
    tokenizer = Tokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("größer")) == len("größer".encode())


@settings(deadline=None)
@given(text=st.text())
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokenizer.eod not in tokens
    assert tokenizer.decode(tokens) == text


def test_a_document_cannot_end_itself(tokenizer: Tokenizer) -> None:
    text = f"one{END_OF_DOCUMENT}two"
    tokens = tokenizer.encode(text)
    assert tokenizer.eod not in tokens
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("threads", ["1", "4"])
def test_the_same_text_trains_the_same_file(tokenizer: Tokenizer, tmp_path: Path, threads: str) -> None:
    """In another process, with other hash seeds and other numbers of threads."""
    program = (
        "import sys, pathlib; from tplaunch.data.tokenizer import train_bpe;"
        "train_bpe([sys.stdin.read()], 512, pathlib.Path(sys.argv[1]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "t.json")],
        input=TEXT,
        text=True,
        check=True,
        env={**os.environ, "RAYON_NUM_THREADS": threads},
    )
    assert (tmp_path / "t.json").read_text() == tokenizer.json


def test_the_fingerprint_is_of_the_meaning(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "compact.json").write_text(json.dumps(json.loads(tokenizer.json), sort_keys=True))
    assert Tokenizer(tmp_path / "compact.json").fingerprint == tokenizer.fingerprint
    changed = json.loads(tokenizer.json)
    changed["model"]["merges"].pop()
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert Tokenizer(tmp_path / "changed.json").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("end", ["</s>", "<|end_of_text|>"])
def test_a_published_tokenizers_end_is_found(tokenizer: Tokenizer, tmp_path: Path, end: str) -> None:
    (tmp_path / "t.json").write_text(tokenizer.json.replace(END_OF_DOCUMENT, end))
    assert Tokenizer(tmp_path / "t.json").eod == tokenizer.eod


def test_files_that_are_no_tokenizer_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(TplaunchError, match="cannot read the tokenizer"):
        Tokenizer(path)
    for content in ("", "{}", "not json", "[1, 2]"):
        path.write_text(content)
        with pytest.raises(TplaunchError, match=r"t\.json: not a tokenizer\.json"):
            Tokenizer(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(TplaunchError, match=r"t\.json: not a tokenizer\.json"):
        Tokenizer(path)
    path.write_text(tokenizer.json.replace(END_OF_DOCUMENT, "<unknown>"))
    with pytest.raises(TplaunchError, match="no end-of-document token"):
        Tokenizer(path)


# The end of documents


def with_tokens(tokenizer: Tokenizer, path: Path, *names: str) -> None:
    """The tokenizer with other added tokens for its end."""
    content = json.loads(tokenizer.json.replace(END_OF_DOCUMENT, names[0]))
    first = content["added_tokens"][0]
    content["added_tokens"] += [{**first, "id": 512 + n, "content": name} for n, name in enumerate(names[1:])]
    path.write_text(json.dumps(content))


DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"


@pytest.mark.parametrize(
    ("names", "beside", "asked", "found"),
    [
        ((DEEPSEEK,), {}, None, DEEPSEEK),
        (("<fin>",), {"tokenizer_config.json": {"eos_token": {"content": "<fin>"}}}, None, "<fin>"),
        (("<fin>", "<im_end>"), {"generation_config.json": {"eos_token_id": [512, 0]}}, None, "<im_end>"),
        (("</s>", "<im_end>"), {"tokenizer_config.json": {"eos_token": "<im_end>"}}, None, "<im_end>"),
        (("</s>", "<im_end>"), {"tokenizer_config.json": {"eos_token": "<gone>"}}, None, "</s>"),
        (("</s>", "<im_end>"), {"tokenizer_config.json": {"eos_token": "</s>"}}, "<im_end>", "<im_end>"),
        (("<a>", "<b>"), {}, "<b>", "<b>"),
    ],
)
def test_the_end_is_the_one_asked_for_said_beside_or_known(
    tokenizer: Tokenizer, tmp_path: Path, names: tuple[str, ...], beside: dict[str, object], asked: str, found: str
) -> None:
    path = tmp_path / "tokenizer.json"
    with_tokens(tokenizer, path, *names)
    for name, content in beside.items():
        (tmp_path / name).write_text(json.dumps(content))
    made = Tokenizer(path, asked)
    assert made.decode([made.eod], skip_special_tokens=False) == found
    (tmp_path / "alone.json").write_text(made.json)  # the text tells it without the files beside
    alone = Tokenizer(tmp_path / "alone.json")
    assert (alone.eod, alone.fingerprint, alone.json) == (made.eod, made.fingerprint, made.json)
    assert unmark(made.json) == path.read_text()


@pytest.mark.parametrize("form", [{"indent": 2}, {"indent": 2, "ensure_ascii": False}, {"separators": (",", ":")}])
def test_a_mark_changes_nothing_else_and_comes_off(tokenizer: Tokenizer, tmp_path: Path, form: Any) -> None:
    """Also where text in the vocabulary looks like the list of added tokens."""
    with_tokens(tokenizer, tmp_path / "t.json", "<fin>", DEEPSEEK)
    content = json.loads((tmp_path / "t.json").read_text())
    content["model"]["vocab"]['"added_tokens":[{"content":"<fin>"}'] = 600
    text = json.dumps({"model": content.pop("model"), **content}, **form) + "\n"
    for end in ("<fin>", DEEPSEEK):
        marked = mark(text, end)
        found = [token["content"] for token in json.loads(marked)["added_tokens"] if token.get(MARK)]
        assert found == [end] and len(marked) == len(text) + len(f'"{MARK}":true,')
        assert unmark(marked) == text == unmark(text)
    assert mark(mark(text, "<fin>"), DEEPSEEK) == mark(text, DEEPSEEK)
    older = json.dumps(json.loads(mark(text, "<fin>")))  # written anew, as earlier versions did
    assert json.loads(unmark(older)) == json.loads(text)


def test_an_end_that_is_unknown_or_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with_tokens(tokenizer, tmp_path / "t.json", "<fin>")
    with pytest.raises(TplaunchError, match=r"--eod TOKEN, or data\.eod"):
        Tokenizer(tmp_path / "t.json")
    with pytest.raises(TplaunchError, match="has no token '<none>'"):
        Tokenizer(tmp_path / "t.json", "<none>")
    with pytest.raises(TplaunchError, match="is a piece of text"):
        Tokenizer(tmp_path / "t.json", "e")
