"""Where each rank is: rank <-> (tp, cp, dp, pp) coordinates, groups and nodes.

Pure arithmetic, no torch; the planner, the launcher and the trainer all read it.
Rank order is Megatron's: tp varies fastest, then cp, then dp, then pp. Whatever prints coordinates keeps this order,
and leaves cp out where it is 1 (`Topology.axes`).

Experts fold into the same ranks (Megatron-LM's parallel folding, arXiv 2504.14960): layers with experts see the
tp x cp x dp ranks of a pipeline stage, in rank order, as expert_tp (fastest) x ep x edp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from tplaunch.recipe.schema import Recipe

AXES = ("tp", "cp", "dp", "pp")  # fastest first
EXPERT_AXES = ("expert_tp", "ep", "edp", "pp")  # the same ranks, as layers with experts see them


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    tp: int
    cp: int
    dp: int
    pp: int


class ExpertCoordinates(NamedTuple):
    """A rank's place on each axis of the layers with experts."""

    expert_tp: int
    ep: int
    edp: int
    pp: int


@dataclass(frozen=True)
class Topology:
    """The rank grid: sizes of the axes and of a node.

    Args:
        tp, cp, dp, pp: sizes, each at least 1; the world is their product.
        gpus_per_node: ranks on each node, in rank order; 0 means one node holds all.
        ep: ranks that share the experts of a layer.
        expert_tp: ranks that share each expert; ep x expert_tp divides tp x cp x dp.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    gpus_per_node: int = 0
    ep: int = 1
    expert_tp: int = 1

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
        return cls(
            tp=sizes.tp,
            cp=sizes.cp,
            dp=sizes.dp,
            pp=sizes.pp,
            gpus_per_node=per_node,
            ep=sizes.ep,
            expert_tp=sizes.expert_tp,
        )

    @property
    def world_size(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def edp(self) -> int:
        """Data parallel of experts: ranks that hold the same slice of the same experts."""
        return self.stage_size // (self.ep * self.expert_tp)

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

    @property
    def expert_axes(self) -> tuple[str, ...]:
        """The axes of layers with experts that are shown beside: none where experts are not spread."""
        if self.ep == self.expert_tp == 1:
            return ()
        return tuple(axis for axis in EXPERT_AXES[:3] if axis != "expert_tp" or self.expert_tp > 1)

    @property
    def expert_sizes(self) -> str:
        """Their sizes in words: "expert_tp 2 x ep 8 x edp 4"."""
        return " x ".join(f"{axis} {self.size(axis)}" for axis in self.expert_axes)

    def size(self, axis: str) -> int:
        """Ranks of a group of an axis, of `AXES` or `EXPERT_AXES`."""
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> Coordinates:
        """Coordinates of a rank.

        Raises:
            IndexError: no such rank.
        """
        return Coordinates(**self._split(rank, AXES))

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Coordinates of a rank in layers with experts.

        Raises:
            IndexError: no such rank.
        """
        return ExpertCoordinates(**self._split(rank, EXPERT_AXES))

    def _split(self, rank: int, axes: tuple[str, ...]) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is outside a world of {self.world_size}")
        place = {}
        for axis in axes:
            rank, place[axis] = divmod(rank, self.size(axis))
        return place

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

    def expert_rank(self, *, expert_tp: int = 0, ep: int = 0, edp: int = 0, pp: int = 0) -> int:
        """The rank at the given coordinates of the layers with experts."""
        return expert_tp + self.expert_tp * (ep + self.ep * (edp + self.edp * pp))

    def group(self, axis: str, rank: int) -> list[int]:
        """Ranks that differ from `rank` on `axis` only, itself included, in axis order.

        On an axis of the layers with experts (`EXPERT_AXES`), by their coordinates.
        """
        place = self._split(rank, _grid(axis))
        return [self._join({**place, axis: i}) for i in range(self.size(axis))]

    def groups(self, axis: str) -> list[list[int]]:
        """All groups of an axis; they cover the world once."""
        others = [a for a in reversed(_grid(axis)) if a != axis]
        starts = (dict(zip(others, at, strict=True)) for at in product(*(range(self.size(a)) for a in others)))
        return [[self._join({**start, axis: i}) for i in range(self.size(axis))] for start in starts]

    def _join(self, place: dict[str, int]) -> int:
        return self.rank(**place) if "tp" in place else self.expert_rank(**place)

    def node(self, rank: int) -> int:
        """The node that holds a rank."""
        return rank // self.ranks_per_node

    def nodes_of_group(self, axis: str, rank: int) -> int:
        """On how many nodes the group of `rank` on `axis` lies."""
        return len({self.node(r) for r in self.group(axis, rank)})


def _grid(axis: str) -> tuple[str, ...]:
    return AXES if axis in AXES else EXPERT_AXES
