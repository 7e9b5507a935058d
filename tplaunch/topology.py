"""Which rank is where: rank <-> (tp, dp, pp) coordinates, groups, nodes, and layers of each stage.

Pure arithmetic, no torch; the planner, the launcher and the trainer all read it.
Rank order is Megatron's: tp varies fastest, then dp, then pp. (Context parallelism, when it
comes, is one more axis between tp and dp: add it to `AXES`.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

AXES = ("tp", "dp", "pp")  # fastest first


class Coordinates(NamedTuple):
    """A rank's place on each axis."""

    tp: int
    dp: int
    pp: int

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp}"


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes and of a node.

    Args:
        tp, dp, pp: sizes, each at least 1; the world is their product.
        gpus_per_node: ranks on each node, in rank order; 0 means one node holds all.
    """

    tp: int = 1
    dp: int = 1
    pp: int = 1
    gpus_per_node: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.world_size

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.ranks_per_node)

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

    def rank(self, *, tp: int = 0, dp: int = 0, pp: int = 0) -> int:
        """The rank at the given coordinates."""
        return tp + self.tp * (dp + self.dp * pp)

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


V_SCHEDULES = frozenset({"zbvzerobubble", "dualpipev"})


def stage_rank(stage: int, pp: int, schedule: str) -> int:
    """The pipeline rank that holds a stage: round-robin, or there and back again for V schedules."""
    if schedule in V_SCHEDULES and stage >= pp:
        return 2 * pp - 1 - stage
    return stage % pp


def stages_of(pp_rank: int, pp: int, virtual_stages: int, schedule: str) -> list[int]:
    """Stages that a pipeline rank holds, in order."""
    return [s for s in range(pp * virtual_stages) if stage_rank(s, pp, schedule) == pp_rank]


def split_layers(num_layers: int, stages: int, *, first: float = 0.0, last: float = 0.0) -> list[int]:
    """Layers of each stage, so that the costliest stage is as cheap as can be.

    Args:
        num_layers: transformer blocks.
        stages: pipeline stages (pp x virtual stages).
        first: cost of the embedding, in blocks; the first stage bears it.
        last: cost of the final norm, output layer and loss, in blocks; the last stage bears it.

    Returns:
        `stages` counts that sum to `num_layers`. Every stage has a layer where that many exist.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(f"{num_layers} layers cannot fill {stages} stages")
    counts = [1] * stages
    extra = [0.0] * stages
    extra[0] += first
    extra[-1] += last
    for _ in range(num_layers - stages):
        # Ties go to the middle stages last filled, the earliest among equals: a stable, even split.
        cheapest = min(range(stages), key=lambda s: (counts[s] + extra[s], s))
        counts[cheapest] += 1
    return counts


def layer_ranges(counts: list[int]) -> list[range]:
    """The layer numbers of each stage from their counts."""
    ranges, start = [], 0
    for count in counts:
        ranges.append(range(start, start + count))
        start += count
    return ranges
