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


def local_shape(parameter: Parameter, topology: Topology) -> tuple[int, ...]:
    """The shape of a rank's slice of a parameter, before data parallelism cuts it."""
    return parameter.local_shape(topology.tp, topology.ep, topology.expert_tp)


def slice_of(parameter: Parameter, topology: Topology, rank: int) -> tuple[int, ...]:
    """Where a rank's slice of a parameter, its tensor-parallel one, or of experts that of ep x expert_tp, begins in the
    whole, by dim."""
    shape = local_shape(parameter, topology)
    start = [0] * len(shape)
    if parameter.expert:
        at = topology.expert_coordinates(rank)
        for dim, place in (parameter.ep_dim, at.ep), (parameter.expert_tp_dim, at.expert_tp):
            if dim is not None:
                start[dim] = place * shape[dim]
    elif parameter.tp_dim is not None:
        tp = topology.coordinates(rank).tp
        start[parameter.tp_dim] = tp // parameter.copies(topology.tp) * shape[parameter.tp_dim]
    return tuple(start)


def kept(parameter: Parameter, topology: Topology, layout: Parallelism, rank: int) -> Rectangle:
    """What a rank updates of a matrix: of its slice, the data-parallel rows, which are cut into equal parts, rounded
    up.

    Args:
        parameter: of two dims.
        rank: in its pipeline stage.
    """
    top, left = slice_of(parameter, topology, rank)
    rows, columns = local_shape(parameter, topology)
    if parameter.expert:
        sharing, place = topology.edp, topology.expert_coordinates(rank).edp
    else:
        sharing, place = topology.cp * topology.dp, rank // topology.tp
    parts = 1 if layout.zero == 0 else sharing // layout.dp_replicate
    height, part = -(-rows // parts), place % parts
    first, last = min(part * height, rows), min((part + 1) * height, rows)
    return Rectangle(range(top + first, top + last), range(left, left + columns))
