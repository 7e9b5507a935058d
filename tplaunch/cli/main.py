"""The `tplaunch` program: its commands, and how it ends.

Command modules import nothing heavy at their top: `tplaunch --help` loads them all and answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tplaunch import __version__
from tplaunch.cli import bench, checkpoint, data, doctor, plan, recipe, slurm, train, wandb
from tplaunch.errors import Exit, TplaunchError

app = typer.Typer(
    name="tplaunch",
    help="Plan, launch and train tensor-parallel language models from one recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in plain text comes in half the time, and looks alike in a log
    context_settings={"max_content_width": 120},
)
app.command()(train.train)
app.command()(train.command)
app.command()(plan.plan)
app.command()(plan.tune)
app.command()(plan.simulate)
app.command()(bench.bench)
app.add_typer(recipe.app, name="recipe")
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(wandb.app, name="wandb")
for command in (slurm.submit, slurm.status, slurm.logs, slurm.cancel, doctor.doctor):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
]


@app.callback()
def _root(version: VersionOption = False) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program and exit with its code (see `Exit`); a user's mistake never shows a traceback.

    Args:
        argv: the arguments; default: those of this process.
    """
    # Looking into every installed package for pydantic plugins costs a tenth of the start-up, and none is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    sys.exit(run(argv))


def run(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="tplaunch")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(Exit.DONE if end.code is None else Exit.FAILED)
    except TplaunchError as error:
        print(error, file=sys.stderr)
        return int(error.code)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("TPLAUNCH_DEBUG") == "1":
            raise
        print(f"tplaunch: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("  fix: run again with TPLAUNCH_DEBUG=1 and report what it shows", file=sys.stderr)
        return int(Exit.FAILED)
    return int(Exit.DONE)
