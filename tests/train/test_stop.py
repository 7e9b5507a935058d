"""One rank that is asked to stop stops all, after the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case
from tests.training import batch, trainer
from tests.world import World


def stops(raw: dict[str, Any], root: str) -> list[bool]:
    """Whether each of three steps says stop; rank 1 is asked to before the second."""
    import torch.distributed as dist

    made, found = trainer(raw, root), []
    for step in range(3):
        made.stop.requested = step == 1 and dist.get_rank() == 1
        found.append(made.step.run(batch(made)).stop)
    return found


@pytest.mark.parametrize("topology", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_every_rank_stops_with_the_one_that_is_asked(
    world: World, tmp_path: Path, topology: tuple[int, int, int]
) -> None:
    assert world.run(2, stops, case(*topology), str(tmp_path)) == [[False, True, False]] * 2
