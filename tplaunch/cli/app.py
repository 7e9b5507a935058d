"""The commands of `tplaunch`: what each is called, and the module that holds it, imported when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from tplaunch import __version__

# In the order of `--help`: name -> module of this package, and what in it: a function, or the Typer of a group.
COMMANDS = {
    "train": ("train", "train"),
    "command": ("command", "command"),
    "plan": ("plan", "plan"),
    "tune": ("tune", "tune"),
    "simulate": ("simulate", "simulate"),
    "bench": ("bench", "bench"),
    "submit": ("submit", "submit"),
    "status": ("status", "status"),
    "logs": ("logs", "logs"),
    "cancel": ("cancel", "cancel"),
    "runs": ("runs", "app"),
    "doctor": ("doctor", "doctor"),
    "recipe": ("recipe", "app"),
    "data": ("data", "app"),
    "checkpoint": ("checkpoint", "app"),
    "export": ("export", "export"),
    "import": ("import_", "import_"),
    "generate": ("generate", "generate"),
    "eval": ("eval", "eval_"),
    "wandb": ("wandb", "app"),
}


class _Commands(Mapping[str, Any]):
    """Name -> click command, made at each look-up, so that a command's start pays for no other's parameters."""

    def __getitem__(self, name: str) -> Any:
        module, attribute = COMMANDS[name]
        found = getattr(import_module(f"tplaunch.cli.{module}"), attribute)
        branch = typer.Typer(rich_markup_mode=None)
        if isinstance(found, typer.Typer):
            branch.add_typer(found, name=name)
        else:
            branch.command(name)(found)
        return get_group(branch).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Root(TyperGroup):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = _Commands()  # type: ignore[assignment]  # nothing adds to it

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    name="tplaunch",
    cls=_Root,
    help="Plan, launch and train tensor-parallel language models from one recipe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help in plain text comes in half the time, and looks alike in a log
    context_settings={"max_content_width": 120},
)


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
