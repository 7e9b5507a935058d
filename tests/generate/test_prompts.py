"""Prompts from files, chats by their template, and what is said of both before anything starts."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tplaunch.data.chat import read_template, render
from tplaunch.data.tokenizer import train_bpe
from tplaunch.errors import TplaunchError
from tplaunch.generate.prompts import Asked, read_prompts, texts_of
from tplaunch.generate.settings import Settings, read_settings
from tplaunch.generate.stream import StopText

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Who <is> it?\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "ça & là"},
    ],
]
TEMPLATE = """{{ bos_token }}{% set state = namespace(first=true) %}
{%- if tools is not none %}tools{% endif %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
<|{{ message.role }}|>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
<|{{ message.role }}|>{{ message | tojson }}{% if state.first %}!{% endif %}
    {% endif %}
    {% set state.first = false %}
    {% if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def test_prompts_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"to be\r\n\n  or not\n{no json")
    assert read_prompts(str(path)) == [
        Asked(f"{path}:1", "to be"),
        Asked(f"{path}:3", "  or not"),
        Asked(f"{path}:4", "{no json"),
    ]


def test_prompts_of_jsonl_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"prompt": "to be", "seed": 3}, {"messages": CHATS[0]}]
    text = "\n".join(map(json.dumps, lines))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    first, second = read_prompts("-")
    assert (first.text, first.seed, first.shown) == ("to be", 3, {"prompt": "to be"})
    assert (second.text, second.messages, second.shown) == (None, CHATS[0], {"messages": CHATS[0]})
    with pytest.raises(TplaunchError, match="stdin:2 has messages"):
        list(texts_of([first, second]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\n \n", "has no prompt"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\nno\n', r"a.jsonl:2 has no prompt[\s\S]*a.jsonl:3 is not JSON"),
        ("a.jsonl", b'{"prompt": "a", "seed": -1}', "a.jsonl:1: seed must be"),
        ("a.jsonl", b'{"messages": ["a"]}', "a.jsonl:1: messages must be"),
    ],
)
def test_what_is_no_prompt_is_said(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TplaunchError, match=said):
        read_prompts(str(tmp_path / name))


def test_no_such_file() -> None:
    with pytest.raises(TplaunchError, match="cannot be read"):
        read_prompts("/nowhere/prompts.txt")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One of a model's folder, with a template."""
    path = tmp_path / "tokenizer.json"
    train_bpe(["to be or not to be"], 300, path)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "<|endoftext|>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_chats_are_rendered_as_transformers_does(tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.parent)
    expected = [theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in CHATS]
    found = render(read_template(tokenizer), tokenizer, CHATS)
    assert found == expected
    assert "Who <is> it?" in found[0] and "tools" not in found[0]


def test_a_templates_own_file_comes_first(tokenizer: Path) -> None:
    tokenizer.with_name("chat_template.jinja").write_text("{{ messages[0].content }}")
    assert render(read_template(tokenizer), tokenizer, CHATS) == ["Who <is> it?\n", "Be brief."]


def test_of_several_templates_the_default(tokenizer: Path) -> None:
    named = [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]
    tokenizer.with_name("tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert read_template(tokenizer) == "d"
    tokenizer.with_name("tokenizer_config.json").write_text("{}")
    with pytest.raises(TplaunchError, match="no chat template"):
        read_template(tokenizer)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only users') }}", "only users"),
        ("{{ messages.__class__.__mro__[-1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace(_a=1) %}", "_a"),
        ("{% for %}", "cannot be followed"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_can_reach_nothing(tokenizer: Path, template: str, said: str) -> None:
    with pytest.raises(TplaunchError, match=said):
        render(template, tokenizer, CHATS)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["a", "b\n", "\nc"], ["\n\n"], ["a", "b", ""]),
        (["a\n", "b"], ["\n\n"], ["a", "\nb"]),
        (["abc", "d"], ["cd", "bcx"], ["a", "b"]),
        (["x END y", "z"], ["END"], ["x ", ""]),
        (["abab", "c"], ["ababx", "abac"], ["", "ababc"]),
        (["a", "b"], [], ["a", "b"]),
    ],
)
def test_a_text_ends_before_a_stop(pieces: list[str], stops: list[str], expected: list[str]) -> None:
    text = StopText(stops)
    assert [text.add(piece) for piece in pieces] == expected
    assert text.stopped == any(stop in "".join(pieces) for stop in stops)
    assert text.rest() == ""


def test_what_was_held_back_comes_at_the_end() -> None:
    text = StopText(["END"])
    assert text.add("the EN") == "the " and text.rest() == "EN" and not text.stopped


def test_settings_of_a_models_folder(tokenizer: Path) -> None:
    said = {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.2, "num_beams": 2}
    tokenizer.with_name("generation_config.json").write_text(json.dumps(said))
    assert read_settings(tokenizer) == Settings(min_p=0.1, repetition_penalty=1.2, other=("num_beams",))
    tokenizer.with_name("generation_config.json").write_text(json.dumps({"repetition_penalty": 0}))
    with pytest.raises(TplaunchError, match="repetition_penalty must be a number above 0"):
        read_settings(tokenizer)
