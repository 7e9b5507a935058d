"""`tplaunch doctor`: this machine and cluster, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from tplaunch.cli.common import echo_json
from tplaunch.cli.options import JsonOption
from tplaunch.errors import Exit


def doctor(
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where run directories go.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Check this machine and its Slurm cluster, if any.

    Inside an allocation, each of its nodes too.

    Example: tplaunch doctor
    """
    from rich.console import Console
    from rich.text import Text

    from tplaunch.doctor import examine

    findings = []
    console = Console(highlight=False, markup=False, emoji=False)
    style = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in examine(runs):
        findings.append(finding)
        if not as_json:
            line = Text.assemble((f"{finding.level:<6}", style[finding.level]), f"{finding.topic}: {finding.text}")
            if finding.fix:
                line.append(f"\n      fix: {finding.fix}")
            console.print(line, soft_wrap=True)
    if as_json:
        echo_json([dataclasses.asdict(finding) for finding in findings])
    if any(finding.level == "fail" for finding in findings):
        raise typer.Exit(Exit.FAILED)
