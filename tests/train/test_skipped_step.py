"""A step that is not finite changes nothing but what it must, and a run that went on from a checkpoint knows it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.recipes import BATCH, SEQ, case
from tests.training import batch, trainer
from tests.world import World

RAW = case(1, 1, 2, training={"precision": "fp16"})


def state(made: Any) -> dict[str, Any]:
    """What a step changes beside the weights."""
    found = asdict(made.step.progress)
    return {key: found[key] for key in ("step", "updates", "nonfinite", "tokens")} | asdict(made.step.loss_scale)


def skip(root: str) -> tuple[list[dict[str, Any]], bool]:
    """The state after each of four steps, of which rank 1 spoils the second and third; and whether these two left the
    weights alone."""
    import torch
    import torch.distributed as dist

    made = trainer(RAW, root)
    weights = [shard.weight for _, shard, _ in made.step.optimizer.shards]
    states, kept = [], True
    for spoiled in (False, True, True, False):
        before = [weight.clone() for weight in weights]
        result = made.step.run(batch(made), float("nan") if spoiled and dist.get_rank() == 1 else 1.0)
        assert result.finite == (not spoiled)
        same = all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
        kept = kept and same == spoiled
        states.append(state(made))
    made.save(wait=True)
    return states, kept


def resume(root: str) -> dict[str, Any]:
    """The state of a trainer that goes on from the newest checkpoint."""
    made = trainer(RAW, root)
    made.resume("auto")
    return state(made)


def test_a_step_that_is_not_finite_counts_as_a_step_and_as_no_update(world: World, tmp_path: Path) -> None:
    first, other = world.run(2, skip, str(tmp_path))
    assert first == other
    states, kept = first
    assert kept, "a skipped step changed the weights, or a good one did not"
    interval, tokens = 1000, BATCH * SEQ
    assert [tuple(state.values()) for state in states] == [
        (1, 1, 0, tokens, 65536.0, interval, 1),
        (2, 1, 1, 2 * tokens, 32768.0, interval, 0),
        (3, 1, 2, 3 * tokens, 16384.0, interval, 0),
        (4, 2, 0, 4 * tokens, 16384.0, interval, 1),
    ]
    assert world.run(2, resume, str(tmp_path)) == [states[-1]] * 2
