"""Which rectangle of each matrix every rank of a pipeline stage keeps. Torch-free."""

from __future__ import annotations

from typing import NamedTuple

from tplaunch.recipe.schema import Parallelism
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.topology import Topology


class Rectangle(NamedTuple):
    """Rows and columns of a matrix; may be empty."""

    rows: range
    columns: range

    @property
    def size(self) -> int:
        """Elements."""
        return len(self.rows) * len(self.columns)


def kept(parameter: Parameter, topology: Topology, layout: Parallelism, rank: int) -> Rectangle:
    """What a rank updates of a matrix: the data-parallel rows, which are cut into equal parts, rounded up, of its
    tensor-parallel slice; of experts: of its ep x expert_tp slice.

    Args:
        parameter: of two dims.
        rank: in its pipeline stage.
    """
    start = [0, 0]
    if parameter.expert:
        at = topology.expert_coordinates(rank)
        shape = parameter.local_shape(1, topology.ep, topology.expert_tp)
        for dim, place in (parameter.ep_dim, at.ep), (parameter.expert_tp_dim, at.expert_tp):
            if dim is not None:
                start[dim] = place * shape[dim]
        sharing, place = topology.edp, at.edp
    else:
        shape, tp = parameter.local_shape(topology.tp), rank % topology.tp
        if parameter.tp_dim is not None:
            start[parameter.tp_dim] = tp // parameter.copies(topology.tp) * shape[parameter.tp_dim]
        sharing, place = topology.cp * topology.dp, rank // topology.tp
    parts = 1 if layout.zero == 0 else sharing // layout.dp_replicate
    height, part = -(-shape[0] // parts), place % parts
    first, last = min(part * height, shape[0]), min((part + 1) * height, shape[0])
    return Rectangle(range(start[0] + first, start[0] + last), range(start[1], start[1] + shape[1]))
