"""Mistakes in one form: where, what, why, and how to fix it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command; they are public."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    STOPPED = 75
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """What the code says, in words."""
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "done",
    Exit.FAILED: "training failed, or what was looked at is damaged",
    Exit.USAGE: "a mistake in recipe or usage, nothing was started",
    Exit.STOPPED: "stopped on request or preempted, with a complete checkpoint: run it again to go on",
    Exit.INTERRUPTED: "interrupted (Ctrl-C); training stops with 75 instead",
}


@dataclass(frozen=True)
class Problem:
    """One mistake. Only `what` is required."""

    what: str
    why: str = ""
    fix: str = ""
    where: str = ""  # file:line:column
    key: str = ""  # dotted recipe key

    def __str__(self) -> str:
        head = ": ".join(part for part in (self.where, self.key, self.what) if part)
        lines = [head]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class TplaunchError(Exception):
    """An error whose text is meant for the user and needs no traceback.

    Args:
        problems: the mistakes, all that were found at once.
        code: the exit code that the command ends with.
    """

    def __init__(self, *problems: Problem | str, code: Exit = Exit.USAGE) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p) for p in problems]
        self.code = code
        super().__init__("\n".join(str(p) for p in self.problems))


class RecipeError(TplaunchError):
    """The recipe, or what it asks for on this machine, cannot work."""
