"""What watches a run: commands and packages that are not there."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.topology import Topology


def hook_problems(recipe: Recipe) -> Iterator[Problem]:
    """What is wrong with the text of `logging.on_event`."""
    command = recipe.logging.on_event
    if command is None:
        return
    try:
        why = "" if shlex.split(command) else "it names no program"
    except ValueError as error:
        why = str(error)
    if why:
        fix = "a program and its arguments, quoted as for a shell; for a shell's own words: sh -c '...'"
        yield Problem(f"{command!r} is no command", why, fix, key="logging.on_event")


def profile_problems(recipe: Recipe) -> Iterator[Problem]:
    """Steps and ranks of `logging.profile` that the run does not have; its dp is known."""
    asked, steps, world = recipe.logging.profile, recipe.training.steps, Topology.of(recipe).world_size
    if asked.steps is not None:
        first, last = asked.steps
        if first > last:
            fix = f"[{last}, {first}]: the first and the last step"
            yield Problem(f"steps {first} to {last} are none", fix=fix, key="logging.profile.steps")
        elif last > steps:
            yield Problem(
                f"the run has no step {last}: it ends after step {steps}",
                fix=f"[first, last], at most {steps}",
                key="logging.profile.steps",
            )
    if beyond := sorted({rank for rank in asked.ranks if rank >= world}):
        yield Problem(
            f"there is no rank {', '.join(map(str, beyond))}: the world has {world}",
            fix=f"ranks: {'0' if world == 1 else f'of 0 to {world - 1}'}",
            key="logging.profile.ranks",
        )


def observe_warnings(recipe: Recipe) -> Iterator[Problem]:
    """A command whose program is not on this machine; nodes that an offline run cannot watch."""
    command, wandb = recipe.logging.on_event, recipe.logging.wandb
    if command is not None and not any(hook_problems(recipe)):
        program = shlex.split(command)[0]
        if shutil.which(program) is None:
            what = f"no program {program} is here; it is started where `train`, or the job, runs"
            yield Problem(what, key="logging.on_event")
    if wandb.system == "every_node" and wandb.mode in ("offline", "disabled"):
        why = "W&B brings the nodes together in its server"
        yield Problem(f"has no effect with mode: {wandb.mode}", why, key="logging.wandb.system")


def missing_packages(recipe: Recipe) -> Iterator[Problem]:
    """Packages that the recipe needs, to train, and that are not installed."""
    if recipe.logging.tensorboard and find_spec("tensorboard") is None:
        yield Problem(
            "needs the package tensorboard, which is not installed",
            fix="pip install 'tplaunch[tensorboard]', or tensorboard: false",
            key="logging.tensorboard",
        )
