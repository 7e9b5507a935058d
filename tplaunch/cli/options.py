"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of one that ships.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value, such as training.steps=20. May be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run lives; default: runs/NAME.")
]
ResumeOption = Annotated[
    str, typer.Option("--resume", metavar="auto|none|PATH", help="Go on from the newest checkpoint, none, or this one.")
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="RUN[@STEP]",
        help="Branch: a new run that goes on from this step (the newest) of another, with its optimizer and data.",
    ),
]
AllowOption = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Go on although this key, such as data, changed. Repeatable."),
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", metavar="NAME", help="Plan for this GPU: a name of the table, or a .json file.")
]
RunsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[RUN]...", help="Run directories, names under runs/, or jobs.")
]

EmaOption = Annotated[bool, typer.Option("--ema", help="Of the averaged weights (training.ema).")]
