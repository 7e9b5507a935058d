"""Conversations, and tokenizers with chat templates, for all tests that need them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

END, BOS = "<|im_end|>", "<|begin|>"
CHATML = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As many published templates were patched for training: what is generated is marked.
MARKED = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}{{ message.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
WORDS = [
    *("to", "be", "or", "not", "that", "is", "the", "question", "whether", "tis", "nobler", "in", "mind", "suffer"),
    *("slings", "and", "arrows", "of", "fortune"),
]


def write_tokenizer(folder: Path, template: str | None = CHATML, *, bos: bool = False, **said: Any) -> Path:
    """A tokenizer's folder, byte level BPE.

    Args:
        template: its chat template, if it has one.
        bos: texts begin with BOS.
        said: further values of tokenizer_config.json.

    Returns:
        Its tokenizer.json.
    """
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    from tplaunch.data.tokenizer import train_bpe

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    train_bpe([" ".join(WORDS * 3) + "\n\nAnswer: "], 290, path)
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens(["<|im_start|>", END, BOS])
    if bos:
        single = f"{BOS} $A"
        made.post_processor = TemplateProcessing(single=single, special_tokens=[(BOS, made.token_to_id(BOS))])
    made.save(str(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": BOS, **said}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return path


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(*texts: str) -> list[dict[str, str]]:
    """The user and the assistant in turn."""
    return [say("user" if number % 2 == 0 else "assistant", text) for number, text in enumerate(texts)]


def some(count: int, seed: int = 0, words: Sequence[int] = (1, 12)) -> list[dict[str, Any]]:
    """Conversations of one to three answers, of so many words each."""
    random_ = random.Random(seed)
    return [
        {
            "messages": conversation(
                *(" ".join(random_.choices(WORDS, k=random_.randint(*words))) for _ in range(2 * random_.randint(1, 3)))
            )
        }
        for _ in range(count)
    ]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
