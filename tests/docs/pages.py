"""README and the pages of `docs/`, as the tests read them: blocks of code with their place and language, and prose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*).*?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        line: of its first line, from 1.
        language: as the fence names it, "" where it does not.
    """

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def needs(self) -> str:
        """What its first line says it needs to run, "" where it can run anywhere."""
        return _first(self.text, "# needs ")

    @property
    def code(self) -> int:
        """The exit code that its first line says it ends with."""
        return int(_first(self.text, "# ends with ") or 0)


def _first(text: str, prefix: str) -> str:
    line = text.partition("\n")[0]
    return line.removeprefix(prefix) if line.startswith(prefix) else ""


def pages() -> list[Path]:
    """README and all pages of the site."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def guides() -> list[Path]:
    """The guides, in the order in which the site has them."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [DOCS / page for entry in nav for page in entry.get("Guides", {}) for page in page.values()]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(page, text.count("\n", 0, found.start(2)) + 1, found[1], found[2]) for found in _FENCE.finditer(text)]


def prose(page: Path) -> str:
    """A page without its blocks, whose lines stay where they were."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text())


def inline_code(page: Path) -> Iterator[tuple[int, str]]:
    """Code in the prose, with its line."""
    text = prose(page)
    for found in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, found.start()) + 1, " ".join(found[1].split())
