"""What of a conversation is learned: the assistant's words and the token that ends its turn, in tokens of the chat
template; and what cannot be told is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chats import BOS, CHATML, END, MARKED, conversation, say, write_tokenizer
from tplaunch.data.answers import ChatReader, Learned, chat_reader
from tplaunch.data.conversations import conversations
from tplaunch.data.text import Block
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import TplaunchError

TWO = conversation("who", "me", "and now", "still\nme")
# Each message ends the one before.
END_BEHIND = """{% for message in messages %}{% if not loop.first %}<|im_end|>{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|><|im_start|>assistant
{% endif %}"""
# What the assistant thought is left out once the user has spoken again, as in Qwen3.
FORGETS = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content.split('</t>')[-1] if message.role == 'assistant' and not loop.last else message.content }}",
)

# Only a space ends a message: it becomes one token with the next role.
SPACED = CHATML.replace("<|im_end|>\n{% endf", " {% endf").replace("<|im_start|>", "")


class Read:
    """A reader of conversations, within a tokenizer's folder."""

    def __init__(self, folder: Path, template: str | None = CHATML, loss_on: str = "assistant", **made: Any) -> None:
        self.path = write_tokenizer(folder, template, **made)
        self.tokenizer = Tokenizer(self.path)
        self.reader: ChatReader = chat_reader(self.path, self.tokenizer, None, loss_on)  # type: ignore[arg-type]

    def __call__(self, record: Any) -> Learned:
        line = record if isinstance(record, str) else json.dumps(record)
        (one,) = conversations(Block(Path("c.jsonl"), "lines", line.encode(), 7))
        with self.tokenizer.names_read():
            return self.reader.read(one)

    def text(self, record: Any) -> str:
        """All of it."""
        return self.tokenizer.decode(self(record).tokens, skip_special_tokens=False)

    def learned(self, record: Any) -> list[str]:
        """What is learned, span by span."""
        found = self(record)
        spans: list[list[int]] = []
        for place, (token, target) in enumerate(zip(found.tokens.tolist(), found.loss.tolist(), strict=True)):
            if target and not (place and found.loss[place - 1]):
                spans.append([])
            if target:
                spans[-1].append(token)
        return [self.tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def theirs(path: Path, messages: list[dict[str, str]], template: str) -> tuple[list[int], list[int]]:
    """Tokens and mask of transformers."""
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(path.parent).apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


def test_answers_and_the_token_that_ends_them(tmp_path: Path) -> None:
    read = Read(tmp_path)
    assert read.learned({"messages": TWO}) == [f"me{END}\n", f"still\nme{END}\n"]
    assert read.text({"messages": TWO}) == "".join(f"<|im_start|>{m['role']}\n{m['content']}{END}\n" for m in TWO)
    found = read({"messages": TWO})
    assert (found.answers, found.unended) == (2, 0)


def test_marked_answers_as_transformers_masks_them(tmp_path: Path) -> None:
    read = Read(tmp_path, MARKED)
    tokens, mask = theirs(read.path, TWO, MARKED)
    found = read({"messages": TWO})
    assert found.tokens.tolist() == tokens and found.loss.astype(int).tolist() == mask
    assert read.learned({"messages": TWO}) == [f"me{END}", f"still\nme{END}"]


def test_an_end_behind_what_is_marked_is_learned(tmp_path: Path) -> None:
    outside = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert Read(tmp_path, outside).learned({"messages": TWO}) == [f"me{END}", f"still\nme{END}"]


def test_an_end_that_begins_the_next_message_is_learned(tmp_path: Path) -> None:
    found = Read(tmp_path, END_BEHIND)
    assert found.learned({"messages": TWO}) == [f"me{END}", "still\nme"]
    assert found({"messages": TWO}).unended == 1, "nothing ends the last"


def test_an_end_that_stops_no_model_is_counted(tmp_path: Path) -> None:
    read = Read(tmp_path, eos_token="<|endoftext|>")
    assert read.learned({"messages": TWO}) == [f"me{END}\n", f"still\nme{END}\n"]
    assert read({"messages": TWO}).unended == 2
    end = read.tokenizer.token_id(END)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, end]}))
    assert Read(tmp_path, eos_token="<|endoftext|>")({"messages": TWO}).unended == 0


def test_a_token_at_the_very_end_does_not_hide_where_answers_end(tmp_path: Path) -> None:
    read = Read(tmp_path, CHATML + f"{{% if not add_generation_prompt %}}{END}{{% endif %}}")  # as Phi-3 has it
    assert read.learned({"messages": TWO}) == [f"me{END}\n", f"still\nme{END}\n{END}"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_completion_is_learned_whole(tmp_path: Path, template: str) -> None:
    read = Read(tmp_path, template)
    record = {"prompt": TWO[:3], "completion": TWO[3:]}
    assert read.learned(record) == [f"still\nme{END}\n"]
    longer = [say("assistant", "to be"), say("tool", "or"), say("assistant", "not")]
    tail = "\n" if template == CHATML else ""
    assert read.learned({"prompt": TWO[:3], "completion": longer}) == [f"to be{END}{tail}", f"not{END}{tail}"]


def test_text_ends_with_the_token_that_ends_documents(tmp_path: Path) -> None:
    read = Read(tmp_path, None)
    assert read.learned({"prompt": "to be", "completion": " or not"}) == [f" or not{END}"]
    assert read.learned({"prompt": "to be", "completion": f" or not{END}"}) == [f" or not{END}"]
    merged = read({"prompt": "Answer: ", "completion": "to be"})
    assert merged.merged == 1 and read({"prompt": "Answer:", "completion": " to be"}).merged == 0


def test_all_is_learned_but_for_the_first_token(tmp_path: Path) -> None:
    for record in ({"messages": TWO}, {"prompt": "to be", "completion": " or not"}):
        found = Read(tmp_path, FORGETS, loss_on="all")(record)
        assert not found.loss[0] and found.loss[1:].all()


def test_begin_of_sequence_comes_once(tmp_path: Path) -> None:
    read = Read(tmp_path, "{{ bos_token }}" + CHATML, bos=True)
    begin = read.tokenizer.token_id(BOS)
    for record in (
        {"messages": TWO},
        {"prompt": TWO[:1], "completion": TWO[1:2]},
        {"prompt": "to be", "completion": " or not"},
        {"prompt": f"{BOS}to be", "completion": " or not"},
    ):
        tokens = read(record).tokens.tolist()
        assert tokens[0] == begin and tokens.count(begin) == 1, record


def test_what_the_template_reads_beside_messages(tmp_path: Path) -> None:
    read = Read(tmp_path, "{{ tools | tojson }}{{ mood }}" + CHATML)
    tools = [{"name": "clock"}]
    for given in (tools, json.dumps(tools)):
        record = {"messages": TWO, "tools": given, "chat_template_kwargs": {"mood": "dark"}}
        assert read.text(record).startswith('[{"name": "clock"}]dark<|im_start|>')
    assert read.text({"messages": TWO, "tools": []}).startswith("null")


def test_fields_as_transformers_hands_them_on(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}|{% endfor %}"
    messages = [{"role": "assistant", "content": None, "reasoning": "hm"}, say("assistant", "so")]
    read = Read(tmp_path, template, loss_on="all")
    assert read.text({"messages": messages}) == "hm|hm||||so|"
    assert read({"messages": messages}).tokens.tolist() == theirs(read.path, messages, template)[0]


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (FORGETS, conversation("who", "hm</t>me", "now", "me"), "message 2: the template renders it otherwise where"),
        (CHATML + "{{ messages | length }}", TWO, "message 2: the template renders what is before it otherwise"),
        (CHATML.replace("assistant\n{% endif %}", "assistant\n<t>{% endif %}"), TWO, "what is before it otherwise"),
        (CHATML.replace("role }}\n", "role }}: ").replace("stant\n", "stant: "), TWO, "ends within a token"),
        (SPACED, [*TWO[:2], say("that", "is")], "message 2 ends within a token"),
        ("{{ raise_exception('only users') }}", TWO, "only users"),
        (None, TWO, "no chat template"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, template: str | None, messages: Any, said: str) -> None:
    with pytest.raises(TplaunchError, match=said) as caught:
        Read(tmp_path, template)({"messages": messages})
    (problem,) = caught.value.problems
    assert problem.where == "c.jsonl:7" and problem.fix


def test_what_is_refused_can_be_mended(tmp_path: Path) -> None:
    messages = conversation("who", "hm</t>me", "now", "me")
    marked = FORGETS.replace("{{ message.content.", "{% generation %}{{ message.content.").replace(
        "message.content }}<|im_end|>", "message.content }}<|im_end|>{% endgeneration %}"
    )
    learned = Read(tmp_path, marked).learned({"messages": messages})
    assert learned[1::2] == [f"me{END}", f"me{END}"]
    assert Read(tmp_path, FORGETS).learned({"messages": messages[:2]}) == [f"hm</t>me{END}\n"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("no", "not JSON"),
        ("[1]", "no conversation, but a list"),
        ('{"text": "a"}', "no messages, and no prompt"),
        ('{"messages": "a"}', "messages must be a list"),
        ('{"messages": []}', "messages must be a list"),
        ('{"messages": [{"content": "a"}]}', "messages must be a list"),
        ('{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}', "prompt must be a list"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": "{"}', "tools is not JSON"),
        ('{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 3}', "must be a mapping"),
    ],
)
def test_a_line_that_is_no_conversation(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(TplaunchError, match=said) as caught:
        Read(tmp_path)(line)
    assert caught.value.problems[0].where == "c.jsonl:7"


def test_marks_in_a_macro_are_refused(tmp_path: Path) -> None:
    macro = "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}a{% set said = m() %}bb{{ said }}"
    with pytest.raises(TplaunchError, match="puts what it marks elsewhere"):
        Read(tmp_path, macro)({"messages": TWO})
