"""What a Hugging Face folder says about text, beside its `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import Unsafe, inside, open_regular

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# With the chat templates of folder `additional_chat_templates` these are all that transformers keeps of text.
TEXT_FILES = (
    *(TOKENIZER, TOKENIZER_CONFIG, GENERATION),
    *(SPECIAL, "added_tokens.json", TEMPLATE, "chat_template.json"),
    *("tokenizer.model", "vocab.json", "merges.txt"),
)
TEMPLATES = "additional_chat_templates"


def blobs_of(folder: Path) -> Path | None:
    """Where the files of a folder in Hugging Face's cache lie: its names are links to them."""
    snapshots = folder.absolute().parent
    return snapshots.parent / "blobs" if snapshots.name == "snapshots" else None


def text_files(folder: Path) -> list[Path]:
    """Those of a folder, relative to it."""
    found = [Path(name) for name in TEXT_FILES if (folder / name).is_file()]
    return found + sorted(path.relative_to(folder) for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file())


def copy_text(folder: Path, out: Path) -> list[Path]:
    """Copy what a folder says about text to another, byte for byte.

    Returns:
        What was copied, relative to both.

    Raises:
        TplaunchError: a file is a link out of the folder, or none that can be read to its end.
    """
    found = text_files(folder)
    for path in found:
        try:
            with open_regular(inside(folder, str(path), also=blobs_of(folder))) as file:
                content = file.read()
        except Unsafe as error:
            raise TplaunchError(Problem(f"{folder / path}: {error}")) from None
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    return found


def read_beside(tokenizer: Path, name: str) -> dict[str, Any]:
    """The mapping in a file beside a tokenizer; {} where there is none, or the tokenizer is no folder's own.

    Raises:
        TplaunchError: it is not JSON, or no mapping.
    """
    path = tokenizer.with_name(name)
    if tokenizer.name != TOKENIZER or not path.is_file():
        return {}
    return read_mapping(path)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        TplaunchError: it cannot be read, is not JSON, or no mapping.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TplaunchError(Problem(f"{path} cannot be read", why=str(error), fix="mend it, or remove it")) from None
    if not isinstance(found, dict):
        raise TplaunchError(Problem(f"{path} must be a mapping", fix="mend it, or remove it"))
    return found


def token_text(value: Any) -> str | None:
    """A special token's text, said as a string or as {"content": ...}."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
