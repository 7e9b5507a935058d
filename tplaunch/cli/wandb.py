"""`tplaunch wandb`: send what runs have kept while there was no server; a workspace for their curves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from tplaunch.errors import Exit, Problem, TplaunchError

_SERVER_S = 20  # to answer
# Twenty tries, W&B's default, go on behind a process that wants to end, for many minutes.
_TRIES = {"x_graphql_retry_max": 3, "x_graphql_retry_wait_min_seconds": 0.5, "x_graphql_retry_wait_max_seconds": 2.0}

app = typer.Typer(help="Send offline W&B runs; make a W&B workspace.", no_args_is_help=True)


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


@app.command()
def dashboard(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Default: RUN_DIR/wandb/dashboard.json.")
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Also save it in the W&B project of the run.")] = False,
) -> None:
    """Make a W&B workspace for the runs of a project.

    Loss by tokens; throughput, MFU and memory, measured and predicted; checkpoints; heat maps of the ranks.

    Example: tplaunch wandb dashboard runs/quickstart --push
    """
    from tplaunch.cli.common import write_text
    from tplaunch.observe.dashboard import make_workspace, to_json
    from tplaunch.recipe.load import load_recipe
    from tplaunch.run.directory import RunDir

    run = RunDir(run_dir)
    if not run.recipe.exists():
        raise TplaunchError(Problem(f"{run_dir} is no run directory", fix="one that `tplaunch train` has made"))
    recipe = load_recipe(run.recipe).recipe
    try:
        workspace = make_workspace(recipe)
    except ImportError as error:
        fix = "pip install 'tplaunch[workspaces]'"
        raise TplaunchError(Problem(f"needs the package wandb-workspaces: {error}", fix=fix)) from None
    path = output or run.wandb / "dashboard.json"
    write_text(path, to_json(workspace) + "\n", "--output")
    typer.echo(path)
    if push:
        import wandb

        wandb.setup(settings=wandb.Settings(**_TRIES))
        try:
            workspace.entity = workspace.entity or wandb.Api(timeout=_SERVER_S).default_entity or ""
            typer.echo(workspace.save().url)
        except Exception as error:  # whatever the server or the way to it has
            raise TplaunchError(_refused(error), code=Exit.FAILED) from None


def _refused(error: Exception) -> Problem:
    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Problem("the workspace was not saved in W&B", why, fix="a key (`wandb login`), then run this again")


def waiting_runs(place: Path) -> list[Path]:
    """Offline W&B runs that have not been sent, oldest first: `offline-run-<time>-<id>`.

    Args:
        place: a run directory, a sweep, or a folder of both.
    """
    found = [path for depth in ("", "*/", "*/*/") for path in place.glob(f"{depth}wandb/offline-run-*")]
    return sorted((path for path in found if not _is_sent(path)), key=lambda path: path.name)


def _is_sent(path: Path) -> bool:
    return any(path.glob("*.wandb.synced"))
