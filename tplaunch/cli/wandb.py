"""`tplaunch wandb sync`: send what runs have kept while there was no server."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from tplaunch.errors import Exit, Problem, TplaunchError

app = typer.Typer(help="Send offline Weights & Biases runs.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass  # keeps `sync` a word of its own: typer would drop the only command's name


@app.command()
def sync(
    run_dir: Annotated[
        Path | None, typer.Argument(help="A run directory, or a folder of some; default: runs/.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> None:
    """Send the offline W&B runs that have not been sent yet.

    Oldest first. Stops at the first that fails.

    Example: tplaunch wandb sync runs/quickstart
    """
    waiting = waiting_runs(run_dir or Path("runs"))
    if not waiting:
        typer.echo(f"nothing to send in {run_dir or 'runs/'}")
        return
    program = shutil.which("wandb")
    if program is None:
        raise TplaunchError(Problem("there is no `wandb` command on PATH", fix="pip install wandb"))
    for path in waiting:
        typer.echo(path)
        done = subprocess.run([program, "sync", *(["--dry-run"] if dry_run else []), str(path)])
        # The marker, too: a later part of a resumed run that goes first would shut out this one's rows.
        if done.returncode or not (dry_run or _is_sent(path)):
            fix = "see what wandb said above (a key: `wandb login`), then run this again"
            raise TplaunchError(Problem(f"{path} was not sent", fix=fix), code=Exit.FAILED)


def waiting_runs(place: Path) -> list[Path]:
    """Offline W&B runs that have not been sent, oldest first: `offline-run-<time>-<id>`.

    Args:
        place: a run directory, a sweep, or a folder of both.
    """
    found = [path for depth in ("", "*/", "*/*/") for path in place.glob(f"{depth}wandb/offline-run-*")]
    return sorted((path for path in found if not _is_sent(path)), key=lambda path: path.name)


def _is_sent(path: Path) -> bool:
    return any(path.glob("*.wandb.synced"))
