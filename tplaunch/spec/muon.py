"""The matrices that Muon orthogonalises, and which rank does it for each. Torch-free.

Newton-Schulz on a slice of a matrix is another update than on the matrix. So each whole matrix goes to one of the ranks
that share it, which orthogonalises it alone, and the update goes back; in rounds, each two all-to-alls over the
pipeline stage's ranks, in which all of them have matrices to work on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tplaunch.recipe.schema import Parallelism, Precision
from tplaunch.spec.parameters import Parameter
from tplaunch.spec.slices import Rectangle, kept
from tplaunch.spec.topology import Topology

STEPS = 5  # of Newton-Schulz (Jordan 2024)
# What matrices are orthogonalised in, and sent in: as Jordan does in bf16 runs, else what weights are kept in. Values
# below fp16's smallest would be lost.
DTYPE: dict[Precision, str] = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float32"}
ROUND = 2**25  # elements of the matrices that a rank orthogonalises in one round, as a mean, at least
CHUNK = 2**23  # elements of the matrices of one size that it orthogonalises at once, at most, or one matrix


@dataclass(frozen=True)
class Matrix:
    """A matrix that is orthogonalised by itself: a hidden matrix, or one expert's.

    Args:
        parameter: that it is part of, by its place in the list that all ranks of the stage have.
        first_row: of the parameter.
        rows, columns: its size.
    """

    parameter: int
    first_row: int
    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def flops(self) -> float:
        """FLOPs of its Newton-Schulz steps: each X X^T, its square, and that by X."""
        small, large = sorted((self.rows, self.columns))
        return STEPS * (4.0 * small * small * large + 2.0 * small**3)


def scale(rows: int, columns: int) -> float:
    """What an orthogonalised update is multiplied by, so that its root mean square is about AdamW's, 0.2, and AdamW's
    rate and decay fit (Moonlight, arXiv 2502.16982, equation 4; torch.optim.Muon's "match_rms_adamw")."""
    return 0.2 * math.sqrt(max(rows, columns))


def matrix_shape(parameter: Parameter) -> tuple[int, int]:
    """Rows and columns of the matrices of a parameter: its own, or those of each expert."""
    rows, columns = parameter.shape
    return (rows // parameter.pieces if parameter.expert else rows), columns


def matrices(parameters: Sequence[Parameter]) -> Iterator[Matrix]:
    """The matrices of some parameters, in their order."""
    for number, parameter in enumerate(parameters):
        rows, columns = matrix_shape(parameter)
        for first in range(0, parameter.shape[0], rows):
            yield Matrix(number, first, rows, columns)


class Piece(NamedTuple):
    """What moves between two ranks.

    Args:
        rank: the other one.
        matrix: its place in the round.
        of: rows and columns of the parameter.
    """

    rank: int
    matrix: int
    of: Rectangle


class Round(NamedTuple):
    """Matrices that are orthogonalised at the same time.

    Args:
        matrices: these, largest first.
        owners: the rank of the stage that orthogonalises each.
        holders: which ranks keep which part of each; copies of a part are on several.
    """

    matrices: list[Matrix]
    owners: list[int]
    holders: list[dict[int, Rectangle]]

    def load(self, rank: int) -> Iterator[int]:
        """The matrices that a rank orthogonalises."""
        return (number for number, owner in enumerate(self.owners) if owner == rank)

    def gathered(self, rank: int) -> list[Piece]:
        """What a rank gets, to orthogonalise it, in the order of the ranks it comes from."""
        pieces = (Piece(source, n, of) for n in self.load(rank) for source, of in self._sources(n))
        return sorted(pieces, key=lambda piece: piece[:2])

    def given(self, rank: int) -> list[Piece]:
        """What a rank gives of its own for that, in the order of the ranks it goes to."""
        pieces = (
            Piece(self.owners[n], n, holders[rank])
            for n, holders in enumerate(self.holders)
            if rank in holders and (rank, holders[rank]) in self._sources(n)
        )
        return sorted(pieces, key=lambda piece: piece[:2])

    def scattered(self, rank: int) -> list[Piece]:
        """What a rank sends back, in the order of the ranks it goes to."""
        pieces = (Piece(to, n, of) for n in self.load(rank) for to, of in self.holders[n].items())
        return sorted(pieces, key=lambda piece: piece[:2])

    def returned(self, rank: int) -> list[Piece]:
        """What a rank gets back, in the order of the ranks it comes from."""
        pieces = (Piece(self.owners[n], n, holders[rank]) for n, holders in enumerate(self.holders) if rank in holders)
        return sorted(pieces, key=lambda piece: piece[:2])

    def _sources(self, number: int) -> list[tuple[int, Rectangle]]:
        """One rank for each part of a matrix: of those that have copies, the nearest to its owner."""
        owner, nearest = self.owners[number], dict[Rectangle, int]()
        for rank, of in self.holders[number].items():
            if of not in nearest or abs(rank - owner) < abs(nearest[of] - owner):
                nearest[of] = rank
        return [(rank, of) for of, rank in nearest.items()]


def rounds(parameters: Sequence[Parameter], topology: Topology, layout: Parallelism) -> list[Round]:
    """Who orthogonalises what, on the ranks of a pipeline stage: the same list on each of them.

    Args:
        parameters: of the stage, hidden matrices and experts.
    """
    ranks, all_matrices = topology.stage_size, list(matrices(parameters))
    holders = _holders(parameters, all_matrices, topology, layout)
    total = [0.0] * ranks  # FLOPs of each rank, in the rounds before
    found = []
    for numbers in batches(all_matrices, ranks):
        chosen, now = [], [0.0] * ranks
        for number in numbers:
            owner = min(holders[number], key=lambda rank: (now[rank], total[rank], rank))
            now[owner] += all_matrices[number].flops
            chosen.append(owner)
        total = [before + more for before, more in zip(total, now, strict=True)]
        found.append(Round([all_matrices[n] for n in numbers], chosen, [holders[n] for n in numbers]))
    return found


def batches(every: Sequence[Matrix], ranks: int) -> Iterator[list[int]]:
    """Which matrices, by their places, are orthogonalised at the same time by so many ranks, largest first."""
    batch: list[int] = []
    elements = 0
    for number in sorted(range(len(every)), key=lambda number: -every[number].flops):
        batch.append(number)
        elements += every[number].count
        if elements >= ROUND * ranks and len(batch) % ranks == 0:
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def _holders(
    parameters: Sequence[Parameter], every: Sequence[Matrix], topology: Topology, layout: Parallelism
) -> list[dict[int, Rectangle]]:
    """Of each matrix, what each rank of the stage keeps of it."""
    first: dict[int, int] = {}
    for number, matrix in enumerate(every):
        first.setdefault(matrix.parameter, number)
    found: list[dict[int, Rectangle]] = [{} for _ in every]
    for place, parameter in enumerate(parameters):
        rows, _ = matrix_shape(parameter)
        for rank in range(topology.stage_size):
            mine = kept(parameter, topology, layout, rank)
            if not mine.size:
                continue
            for index in range(mine.rows.start // rows, -(-mine.rows.stop // rows)):
                inside = range(max(mine.rows.start, index * rows), min(mine.rows.stop, (index + 1) * rows))
                found[first[place] + index][rank] = Rectangle(inside, mine.columns)
    return found
