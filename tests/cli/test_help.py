"""The commands' one-line summaries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tplaunch.cli.app import COMMANDS


@pytest.mark.parametrize("group", [[], ["recipe"], ["data"], ["checkpoint"], ["wandb"]], ids=" ".join)
def test_summaries_are_whole_at_80_columns(group: list[str]) -> None:
    command = [sys.executable, "-m", "tplaunch", *group, "--help"]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "80"}, capture_output=True, text=True, check=True)
    _, _, listed = done.stdout.partition("Commands:\n")
    lines = listed.splitlines()
    assert len(lines) == len(COMMANDS) if not group else lines
    for line in lines:
        summary = line.split(maxsplit=1)[1]
        assert len(summary) <= 55 and summary.endswith(".") and not summary.endswith("..."), line
