"""What the ranks of a block exchange beside hidden states: of context parallelism (`tplaunch.plan.context`), of
experts (`tplaunch.plan.experts`), of latent attention (`tplaunch.plan.latent`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tplaunch.plan.communication import Group, Kind
from tplaunch.spec.recompute import Step


class Exchange(NamedTuple):
    """One kind of exchange of a block, for one microbatch.

    Args:
        axis: along which.
        group: its ranks.
        what: is exchanged.
        kind: the collective.
        bytes: of one call (`communication.Traffic`).
        seconds: of one call.
        forward, backward: calls in each pass.
        hidden: seconds of them all that computation hides.
        again: what is made of it (`tplaunch.spec.recompute`): made again in the backward pass, with it; None: it never
            is.
        again_calls: how often.
    """

    axis: str
    group: Group
    what: str
    kind: Kind
    bytes: float
    seconds: float
    forward: int
    backward: int
    hidden: tuple[float, float] = (0.0, 0.0)
    again: str | None = None
    again_calls: int = 1

    def exposed(self) -> tuple[float, float]:
        """Seconds that nothing hides, forward and backward."""
        return self.forward * self.seconds - self.hidden[0], self.backward * self.seconds - self.hidden[1]


class Exchanges(NamedTuple):
    """The exchanges of a block for one microbatch."""

    all: tuple[Exchange, ...] = ()

    @property
    def forward(self) -> float:
        """Seconds that nothing hides."""
        return sum(exchange.exposed()[0] for exchange in self.all)

    @property
    def backward(self) -> float:
        """Seconds that nothing hides."""
        return sum(exchange.exposed()[1] for exchange in self.all)

    def again_seconds(self, made: Iterable[Step]) -> float:
        """Seconds of those that steps bring with them when they are made again, which nothing hides."""
        given = {name for step in made for name in step.gives}
        return sum(exchange.again_calls * exchange.seconds for exchange in self.all if exchange.again in given)
