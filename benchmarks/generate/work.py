"""The work that is measured. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.peers.work import SHAPES as ALL

SHAPES = {name: ALL[name] for name in ("small", "134m")}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PROMPT, MADE = 512, 65  # tokens of a prompt, and made after it, the first of them by the pass that reads the prompt
BATCHES = (1, 8)
OURS, THEIRS = "tplaunch", "transformers"


class Grid(NamedTuple):
    """Ranks of each kind of parallelism."""

    tp: int
    pp: int

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read "TP,PP".

        Raises:
            ValueError: it is not two numbers.
        """
        tp, pp = map(int, text.split(","))
        return cls(tp, pp)

    @property
    def ranks(self) -> int:
        """Of the world."""
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.tp} x {self.pp}"


GRIDS = [Grid(1, 1), Grid(2, 1), Grid(1, 2)]


def engines(grid: Grid) -> list[str]:
    """Who is measured there: transformers' tensor parallelism is not for gloo, and it has no pipeline."""
    return [OURS, THEIRS] if grid.ranks == 1 else [OURS]
