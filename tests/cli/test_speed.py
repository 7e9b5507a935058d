"""The front answers at once, because it imports nothing of the trainer: asked of real processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from tplaunch.cli.app import app
from tplaunch.recipe.shipped import shipped_recipes

HEAVY = {"torch", "numpy", "wandb", "tokenizers", "transformers", "safetensors"}
SCRIPT = """
import sys
from tplaunch.cli.main import run
code = run(sys.argv[1:])
print("MODULES", *sys.modules)
sys.exit(code)
"""


def modules(*arguments: str) -> set[str]:
    """The modules that are imported once the program has answered."""
    process = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recipe", "--help"], ["train", "--help"]], ids=" ".join
)
def test_help_reads_no_recipe_either(arguments: list[str]) -> None:
    assert not modules(*arguments) & (HEAVY | {"yaml"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["recipe", "list"],
        ["recipe", "show", "quickstart"],
        ["recipe", "check", "quickstart"],
        ["train", "quickstart", "--dry-run"],
        ["plan", "quickstart", "--gpu", "h100-80gb"],
        ["plan", "olmo2-7b"],
    ],
    ids=" ".join,
)
def test_answers_without_the_trainer(arguments: list[str]) -> None:
    assert not modules(*arguments) & HEAVY


def test_a_command_loads_no_other() -> None:
    loaded = {name for name in modules("recipe", "check", "quickstart") if name.startswith("tplaunch.cli.")}
    assert loaded == {f"tplaunch.cli.{name}" for name in ("app", "common", "main", "options", "recipe")}


def commands(command: typer.core.TyperCommand | typer.core.TyperGroup, name: str) -> list[tuple[str, str]]:
    """Every command's full name and help text."""
    if isinstance(command, typer.core.TyperGroup):
        return [found for key, child in command.commands.items() for found in commands(child, f"{name} {key}")]
    return [(name, command.help or "")]


@pytest.mark.parametrize(("name", "text"), commands(get_command(app), "tplaunch"))
def test_every_help_has_one_example_of_its_command(name: str, text: str) -> None:
    examples = [line for line in text.splitlines() if line.startswith("Example: ")]
    assert len(examples) == 1
    assert examples[0].startswith(f"Example: {name}")


def test_recipes_ship() -> None:
    assert "quickstart" in shipped_recipes()
