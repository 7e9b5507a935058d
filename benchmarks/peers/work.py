"""The work that is measured: shapes, topologies, peers, and what a peer cannot do. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.llama import Shape


class Grid(NamedTuple):
    """Ranks of each kind of parallelism."""

    tp: int
    pp: int
    dp: int
    ep: int = 1

    @property
    def ranks(self) -> int:
        """Of the world."""
        return self.tp * self.pp * self.dp

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read "TP,PP,DP", or "TP,PP,DP,EP".

        Raises:
            ValueError: it is not three or four numbers.
        """
        tp, pp, dp, *ep = map(int, text.split(","))
        if len(ep) > 1:
            raise ValueError(text)
        return cls(tp, pp, dp, *ep)

    def __str__(self) -> str:
        return f"{self.tp} x {self.pp} x {self.dp}" + (f", EP {self.ep}" if self.ep > 1 else "")


SHAPES = {
    "small": Shape(256, 8, 8, 4, 688, 4096, 256, micro=2, batch=8),
    "134m": Shape(768, 12, 12, 4, 2048, 32000, 512, micro=1, batch=2),
    "moe": Shape(512, 4, 8, 4, 1024, 4096, 256, micro=4, batch=8, experts=8),
}
GRIDS = [Grid(1, 1, 1), Grid(2, 1, 1), Grid(1, 2, 1), Grid(1, 1, 2), Grid(2, 2, 1), Grid(2, 1, 2)]
EXPERT_GRIDS = [Grid(1, 1, 1), Grid(1, 1, 2, ep=2)]
START_SHAPE, START_GRID = "small", Grid(1, 1, 2)  # two ranks: the topology that every trainer can do
LEARNING_RATE, WEIGHT_DECAY = 3e-4, 0.1

OURS = "tplaunch"
EARLIER = "tplaunch, earlier"  # an older checkout
BARE = "torchrun"  # nothing but ranks that meet
# What is installed for each, and which packages' versions are told.
PEERS = {
    "transformers": ("torch", "transformers"),
    "torchtitan": ("torch", "torchtitan"),
    "megatron-core": ("torch", "megatron-core"),
}
TRAINERS = [OURS, *PEERS]


def grids(shape: str) -> list[Grid]:
    """The topologies that a shape is measured at."""
    return EXPERT_GRIDS if SHAPES[shape].experts else GRIDS


def cannot(trainer: str, shape: str, grid: Grid) -> str | None:
    """Why a trainer cannot do a shape or a topology at all; None where it can."""
    if trainer == "torchtitan" and SHAPES[shape].experts:
        return "its Llama has no experts"
    if trainer == "transformers" and grid.pp > 1:
        return "it trains no pipeline"
    if trainer == "transformers" and grid.tp > 1:
        return "its tensor parallelism does not train on gloo"
    return None


def threads(ranks: int) -> int:
    """Of a process, for every trainer alike: the machine that this is for has two cores."""
    return 2 if ranks == 1 else 1
