"""Whether a tokenizer begins each text with a token, changed in its `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tplaunch.data.beside import TOKENIZER_CONFIG, read_beside, token_text
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import Problem, TplaunchError

# What published tokenizers call it: Llama 3, Llama 2 and Mistral, Gemma, DeepSeek.
_BEGIN_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>")


def with_begin(path: Path, bos: bool, eod: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` whose post-processor begins texts with begin-of-sequence, or does not.

    The token is the one that `tokenizer_config.json` beside it names, else the known name that it has, else the one
    that ends documents, as GPT-2 has it.

    Args:
        path: the file.
        bos: whether they begin so.
        eod: the token that ends documents; default: see `Tokenizer`.

    Returns:
        It as it is where it does so already.

    Raises:
        TplaunchError: its post-processor cannot be changed so.
    """
    tokenizer = Tokenizer(path, eod)
    if bool(tokenizer.begin) == bos:
        return tokenizer
    content = json.loads(tokenizer.json)
    content["post_processor"] = _added(content, path, tokenizer) if bos else _removed(content.get("post_processor"))
    changed = json.dumps(content, ensure_ascii=False)
    del tokenizer, content  # each takes hundreds of megabytes with a large vocabulary
    made = Tokenizer.parse(changed, path)
    if bool(made.begin) != bos:
        what = f"{path}: its post-processor cannot be made to {'begin' if bos else 'leave out'} begin-of-sequence"
        raise TplaunchError(Problem(what, fix=f"leave out --{'' if bos else 'no-'}bos"))
    return made


def _added(content: dict[str, Any], path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    names = (token_text(read_beside(path, TOKENIZER_CONFIG).get("bos_token")), *_BEGIN_NAMES)
    ids = ((name, tokenizer.token_id(name)) for name in names if name)
    name, number = next(
        ((name, number) for name, number in ids if number is not None),
        (tokenizer.decode([tokenizer.eod], skip_special_tokens=False), tokenizer.eod),
    )
    token = {"SpecialToken": {"id": name, "type_id": 0}}
    text = [{"Sequence": {"id": sequence, "type_id": 0}} for sequence in ("A", "B")]
    template = {
        "type": "TemplateProcessing",
        "single": [token, text[0]],
        "pair": [token, *text],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
    before = content.get("post_processor")
    return {"type": "Sequence", "processors": [before, template]} if before else template


def _removed(processor: Any) -> Any:
    """A post-processor without the special tokens before a text."""
    kind = processor["type"]
    if kind == "Sequence":
        return {**processor, "processors": [_removed(part) for part in processor["processors"]]}
    if kind != "TemplateProcessing":
        return processor
    kept = {}
    for form in ("single", "pair"):
        pieces = processor[form]
        first = next((place for place, piece in enumerate(pieces) if "Sequence" in piece), 0)
        kept[form] = pieces[first:]
    return {**processor, **kept}
