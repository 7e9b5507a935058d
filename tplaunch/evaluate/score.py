"""Rows through the model's stages, and how likely the model finds their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.evaluate.rows import Row, Rows, passes
from tplaunch.generate.decode import StagedModel
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.parallel.precision import COMPUTE_DTYPE
from tplaunch.parallel.relay import Relay

_TOKENS = 8192  # that go through the model together; more make it no faster, and take more memory


@torch.no_grad()
def score(
    model: StagedModel, rows: Rows, done: Callable[[int], object] = lambda count: None, *, most: int = _TOKENS
) -> list[tuple[float, bool]]:
    """Score rows; every rank calls it, and gets the same.

    Data-parallel ranks share the rows, in as many passes each: weights that they gather, and experts that they share,
    ask for all of them. Context-parallel ranks do the same (`whole_sequences`). The stages of a pipeline work at once,
    each on another pass.

    Args:
        model: the model.
        rows: what to score.
        done: is told how many more rows are done, on one rank of those that share a row.
        most: tokens that go through the model together, if more than one row does.

    Returns:
        Of each row the sum of its scored tokens' cross-entropies, in nats, and whether no token was likelier than
        any of these.
    """
    mesh = model.mesh
    place = mesh.coordinates
    relay = Relay(model.recipe, mesh, model.group)
    last = place.pp == relay.ranks[-1]
    dtype, hidden = COMPUTE_DTYPE[model.recipe.training.precision], model.recipe.model.hidden_size
    found = torch.zeros(len(rows.lengths), 2, dtype=torch.float64, device=mesh.device)
    # Few rows make smaller passes, so that every rank has one.
    at_once = min(most, sum(rows.lengths) // (mesh.topology.dp * len(relay.ranks)))
    every, dp = passes(rows.lengths, at_once), mesh.topology.dp
    for turn in range(place.dp, -(-len(every) // dp) * dp, dp):
        numbers = every[min(turn, len(every) - 1)]  # beyond the last, which is the shortest: for company
        tokens, labels, positions = (None if x is None else x.to(mesh.device) for x in _batch(rows, numbers))
        assert tokens is not None and labels is not None
        carried: Tensor | tuple[Tensor, Tensor] = tokens
        shape = torch.Size((tokens.shape[1], len(numbers), hidden))
        for number, stage in model.stages.items():
            assert isinstance(carried, Tensor)
            carried = stage.score(relay.receive(number, carried, shape, dtype), labels, positions)
            if isinstance(carried, Tensor):
                relay.send(number, carried)
        if last and place.tp == 0 and place.cp == 0 and turn < len(every):
            losses, likeliest = carried
            found[numbers] = torch.stack([losses.double().sum(1), likeliest.all(1).double()], 1)
            done(len(numbers))
    if mesh.topology.world_size > 1:
        dist.all_reduce(found)
    return [(loss, likeliest == 1) for loss, likeliest in found.tolist()]


def _batch(rows: Rows, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, labels and places in documents of some rows, int64 [b, s] each, padded at their ends: no token sees what
    comes after it."""
    chosen = [rows[number] for number in numbers]
    shape = len(chosen), max(len(row.tokens) for row in chosen) - 1
    tokens, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    for i, row in enumerate(chosen):
        count = len(row.tokens) - 1
        read = torch.from_numpy(row.tokens)
        tokens[i, :count] = read[:-1]
        labels[i, row.first - 1 : count] = read[row.first :]
    return tokens, labels, _positions(chosen, tokens)


def _positions(chosen: Sequence[Row], tokens: Tensor) -> Tensor | None:
    if chosen[0].positions is None:
        return None
    positions = torch.empty_like(tokens)
    for i, row in enumerate(chosen):
        assert row.positions is not None, "rows tell documents apart, all or none"
        count = len(row.positions) - 1
        positions[i, :count] = torch.from_numpy(row.positions[:-1])
        positions[i, count:] = torch.arange(tokens.shape[1] - count)  # the padding is a document of its own
    return positions
