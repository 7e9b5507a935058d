"""The commands' one-line summaries; and the command lines that messages suggest."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tplaunch
from tplaunch.cli.app import COMMANDS

PACKAGE = Path(tplaunch.__file__).parent
COMMAND = re.compile(r"(?:^|[\s`])(?:tplaunch [a-z]+|wandb (?:leet|sync)|torchfrtrace|jq|ls|cat|rm|mv|cd) [^`,]*$")
PLAIN = {"jobs[0]", "NCCL_PREFIX"}  # numbers, and names of ours, that a shell takes as they are


@pytest.mark.parametrize("group", [[], ["recipe"], ["data"], ["checkpoint"], ["runs"], ["wandb"]], ids=" ".join)
def test_summaries_are_whole_at_80_columns(group: list[str]) -> None:
    command = [sys.executable, "-m", "tplaunch", *group, "--help"]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True)
    _, _, listed = done.stdout.partition("Commands:\n")
    lines = listed.splitlines()
    assert len(lines) == len(COMMANDS) if not group else lines
    for line in lines:
        summary = line.split(maxsplit=1)[1]
        assert len(summary) <= 55 and summary.endswith(".") and not summary.endswith("..."), line


def unquoted(path: Path) -> Iterator[str]:
    """Values that stand in a suggested command line and are not quoted for a shell."""
    tree = ast.parse(path.read_text())
    quoted = {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "shlex." in ast.unparse(node.value)
        for name in ast.walk(node.targets[0])
        if isinstance(name, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = ""
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    value = ast.unparse(part.value)
                    if COMMAND.search(text) and not value.startswith("shlex.") and value not in quoted | PLAIN:
                        yield f"{path}:{part.lineno}: {value}"
                    text += "VALUE"
                elif isinstance(part, ast.Constant):
                    text += str(part.value)


def test_a_value_without_quotes_is_found(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text(
        "a = shlex.quote(b)\n"
        "f'wrote {a}; next: tplaunch plan {a} --gpu {b}'\n"
        "f'`tplaunch plan {shlex.quote(b)}` of {b}'\n"
        "f'see tplaunch status, or ls {b.root}'\n"
    )
    found = [line.split(":", 1)[1] for line in unquoted(tmp_path / "it.py")]
    assert found == ["2: b", "4: b.root"]


def test_suggested_commands_can_be_pasted() -> None:
    assert [line for path in PACKAGE.rglob("*.py") for line in unquoted(path)] == []
