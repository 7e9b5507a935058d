"""Every `tplaunch` line of README and docs is one that the command line takes."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from tests.docs.pages import ROOT, blocks, inline_code, pages
from tplaunch.cli.app import app

_LINE = re.compile(r"(?:^|[^\w./=-])(tplaunch(?: .*)?$)")
_PLACE = {"N": "1", "P": "0.5", "T": "1"}  # numbers that stand for any


def problem(line: str, *, whole: bool = True) -> str:
    """Why the command line would refuse a line; "" where it takes it. Nothing is run.

    Args:
        whole: it is to be run as it stands; else arguments may be missing, as where prose names a command.
    """
    words = shlex.split(line, comments=True)[1:]
    command: Any = get_command(app)
    path = "tplaunch"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in command.commands:
            return f"{path} has no command {name}"
        command, path = command.commands[name], f"{path} {name}"
    if hasattr(command, "commands"):
        return "" if not whole or words in (["--help"], ["--version"]) else f"{path} needs a command"
    try:
        command.make_context(path, [_PLACE.get(word, word) for word in words], resilient_parsing=False)
    except Exception as error:
        if not whole and re.search("Missing|requires an argument", f"{type(error).__name__} {error}"):
            return ""
        return str(error) or type(error).__name__
    return ""


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The commands of a block with the place of each: without what stands behind two blanks, a pipe or a semicolon."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    for number, line in enumerate(text.splitlines()):
        for part in re.split(r"&&|\|\||;| \| | \|$| >", re.split(r"\S(?=  )", line, maxsplit=1)[0] + _last(line)):
            if found := _LINE.search(part.strip()):
                yield number, found[1].strip().removesuffix("&").strip()


def _last(line: str) -> str:
    found = re.search(r"\S(?=  )", line)
    return found[0] if found else ""


def meant(line: str) -> Iterator[str]:
    """A line that stands for several, `runs list|show RUN`, as each of them."""
    words = [word.split("|") if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word) else [word] for word in line.split(" ")]
    yield from (" ".join(one) for one in itertools.product(*words))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_blocks_are_taken(page: Path) -> None:
    wrong = [
        f"{page.name}:{block.line + number}: {one}: {why}"
        for block in blocks(page)
        if block.language in ("", "bash", "sh")
        for number, line in lines(block.text)
        for one in meant(line)
        if (why := problem(one, whole="|" not in line))
    ]
    assert wrong == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_prose_are_there(page: Path) -> None:
    wrong = [
        f"{page.name}:{number}: {code}: {why}"
        for number, code in inline_code(page)
        if re.match(r"tplaunch [a-z]", code)
        if (why := problem(code, whole=False))
    ]
    assert wrong == []


def test_the_tour_is_taken() -> None:
    assert [why for _, line in lines((ROOT / "docs/tour.sh").read_text()) if (why := problem(line))] == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tplaunch trian quickstart", "tplaunch has no command trian"),
        ("tplaunch runs lst", "tplaunch runs has no command lst"),
        ("tplaunch plan quickstart --gpus 8", "No such option"),
        ("tplaunch tune quickstart --gpus many", "integer"),
        ("tplaunch train", "Missing"),
        ("tplaunch tune quickstart", "gpus"),
        ("tplaunch export runs/a b c", "unexpected extra argument"),
    ],
)
def test_a_wrong_line_is_found(line: str, says: str) -> None:
    assert says in problem(line)


def test_lines_are_found_where_they_stand() -> None:
    text = (
        "cd x && tplaunch plan a  # why\ntplaunch tune RECIPE --gpus N  the best\n"
        "cat it | jq .\neval tplaunch doctor &\ntplaunch tune a \\\n    --gpus 8\n"
    )
    assert list(lines(text)) == [
        (0, "tplaunch plan a"),
        (1, "tplaunch tune RECIPE --gpus N"),
        (3, "tplaunch doctor"),
        (4, "tplaunch tune a --gpus 8"),
    ]
    assert list(meant("tplaunch runs list|show X")) == ["tplaunch runs list X", "tplaunch runs show X"]
