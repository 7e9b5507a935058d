"""Where each rank is: rank <-> (tp, cp, dp, pp) coordinates, groups and nodes.

Pure arithmetic, no torch; the planner, the launcher and the trainer all read it.
Rank order is Megatron's: tp varies fastest, then cp, then dp, then pp. Whatever prints coordinates keeps this order,
and leaves cp out where it is 1 (`Topology.axes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tplaunch.recipe.schema import Recipe

AXES = ("tp", "cp", "dp", "pp")  # fastest first


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Topology:
    """The rank grid: sizes of the axes and of a node.

    Args:
        tp, cp, dp, pp: sizes, each at least 1; the world is their product.
        gpus_per_node: ranks on each node, in rank order; 0 means one node holds all.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    gpus_per_node: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Topology:
        """The rank grid of a recipe; every part of tplaunch makes it here.

        Nodes that the recipe does not size hold equal parts of the world.

        Raises:
            ValueError: dp is still "auto".
        """
        sizes = recipe.topology
        if sizes.dp == "auto":
            raise ValueError("topology.dp is auto: the recipe is not resolved")
        world = sizes.tp * sizes.cp * sizes.dp * sizes.pp
        per_node = sizes.gpus_per_node or -(-world // sizes.nodes)
        return cls(tp=sizes.tp, cp=sizes.cp, dp=sizes.dp, pp=sizes.pp, gpus_per_node=per_node)

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.world_size

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that are shown, fastest first: a world without context parallelism does not mention it."""
        return tuple(axis for axis in AXES if axis != "cp" or self.cp > 1)

    @property
    def sizes(self) -> str:
        """The sizes in words: "tp 8 x cp 2 x pp 4 x dp 16"."""
        return " x ".join(f"{axis} {self.size(axis)}" for axis in ("tp", "cp", "pp", "dp") if axis in self.axes)

    def size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a rank.

        Raises:
            IndexError: no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is outside a world of {self.world_size}")
        place = {}
        for axis in AXES:
            rank, place[axis] = divmod(rank, self.size(axis))
        return Coordinates(**place)

    def place(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank on the axes that are shown."""
        coordinates = self.coordinates(rank)._asdict()
        return {axis: coordinates[axis] for axis in self.axes}

    def describe(self, rank: int) -> str:
        """The same in words: "tp=1 dp=0 pp=3"."""
        return " ".join(f"{axis}={at}" for axis, at in self.place(rank).items())

    def rank(self, *, tp: int = 0, cp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at the given coordinates."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def group(self, axis: str, rank: int) -> list[int]:
        """Ranks that differ from `rank` on `axis` only, itself included, in axis order."""
        place = self.coordinates(rank)._asdict()
        return [self.rank(**{**place, axis: i}) for i in range(self.size(axis))]

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of an axis; they cover the world once."""
        others = [a for a in reversed(AXES) if a != axis]
        starts = (dict(zip(others, at, strict=True)) for at in product(*(range(self.size(a)) for a in others)))
        return [[self.rank(**start, **{axis: i}) for i in range(self.size(axis))] for start in starts]

    def node(self, rank: int) -> int:
        """The node that holds a rank."""
        return rank // self.ranks_per_node

    def nodes_of_group(self, axis: str, rank: int) -> int:
        """On how many nodes the group of `rank` on `axis` lies."""
        return len({self.node(r) for r in self.group(axis, rank)})
