"""The collectives of one step are those of the papers, and no more: counted in the real trainer.

A block's share is the difference between a model of three layers and one of two.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.recipes import SEQ, case, ranks, resolved
from tests.world import World
from tplaunch.simulate.record import KINDS

MICROBATCHES, BATCH, HIDDEN, CHUNK = 2, 4, 64, 24
ACTIVATION = 4 * SEQ * BATCH * HIDDEN  # bytes of [s, b, h] in fp32


class Recorder(TorchDispatchMode):
    """Counts collectives by (kind, bytes of the whole tensor: the larger of input and output)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        name = name.split(".")[0]
        if namespace in ("c10d", "_c10d_functional") and name in KINDS:
            sizes = [t.numel() * t.element_size() for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
            self.seen[KINDS[name], max(sizes)] += 1
        return result


def record(raw: dict[str, Any]) -> Counter[tuple[str, int]]:
    """Collectives of the forward and backward passes of the second step on this rank."""
    return _record(raw, as_on_gpus=False)


def record_as_on_gpus(raw: dict[str, Any]) -> Counter[tuple[str, int]]:
    """The same with the calls that NCCL gets, made over gloo."""
    return _record(raw, as_on_gpus=True)


def _record(raw: dict[str, Any], *, as_on_gpus: bool) -> Counter[tuple[str, int]]:
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import Batch
    from tplaunch.train.step import make_pipeline

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    with patch("torch.distributed.get_backend", return_value="nccl") if as_on_gpus else nullcontext():
        stages = build_stages(recipe, mesh)
    pipeline = make_pipeline(stages, mesh, recipe)
    tokens = torch.randint(recipe.model.vocab_size, (MICROBATCHES * BATCH, SEQ))
    batch = Batch(tokens, tokens)
    pipeline.train(batch, 1.0)
    with Recorder() as recorder:
        pipeline.train(batch, 1.0)
        for stage in stages:  # what surrounds the update
            stage.sharding.reduce_gradients()
            stage.sharding.publish()
    return recorder.seen


def per_block(world: World, recorder: Any = record, **options: Any) -> dict[tuple[str, int], int]:
    """What one more block adds on rank 0."""
    counts = []
    for layers in (2, 3):
        raw = case(model={"num_layers": layers}, **options)
        counts.append(world.run(ranks(raw), recorder, raw)[0])
    fewer, more = counts
    assert not fewer - more
    return dict(more - fewer)


def block_bytes(tp: int) -> int:
    from tplaunch.recipe.schema import Model
    from tplaunch.spec.parameters import block_parameters

    return 4 * sum(p.local_count(tp) for p in block_parameters(Model.model_validate(case()["model"]), 0))


def test_the_functions_are_those_of_the_table_in_their_docstring() -> None:
    from tplaunch.parallel import collectives

    rows = re.findall(r"^    (\w+) +(\w+) +forward:", collectives.__doc__ or "", re.MULTILINE)
    assert [name for name, _ in rows] == ["enter_region", "leave_region"]
    assert all(callable(getattr(collectives, name)) for name, _ in rows)


def test_tensor_parallel(world: World) -> None:
    # Shoeybi et al. 2019, section 3: two all-reduces of the activation forward, two backward.
    assert per_block(world, tp=2) == {("all-reduce", ACTIVATION): 4 * MICROBATCHES}


def test_sequence_parallel(world: World) -> None:
    # Korthikanti et al. 2022, section 4.2.2: each all-reduce becomes an all-gather and a reduce-scatter; the gathered
    # input of a column-parallel layer is not kept, and gathered once more for the weight gradient.
    expected = {("all-gather", ACTIVATION): 6 * MICROBATCHES, ("reduce-scatter", ACTIVATION): 4 * MICROBATCHES}
    assert per_block(world, tp=2, sequence_parallel=True) == expected


def test_full_recomputation_repeats_the_forward_pass(world: World) -> None:
    # But for the MLP's last projection and its all-reduce, which no gradient needs.
    repeated = per_block(world, tp=2, training={"recompute": "full"})
    assert repeated == {("all-reduce", ACTIVATION): 5 * MICROBATCHES}


def test_parts_repeat_their_own_collectives(world: World) -> None:
    plain = {("all-gather", ACTIVATION): 6 * MICROBATCHES, ("reduce-scatter", ACTIVATION): 4 * MICROBATCHES}
    for parts, gathers, scatters in (
        (["qkv", "rotary"], 1, 0),
        (["attention_output"], 0, 1),
        (["norm", "gate_up"], 1, 0),
    ):
        repeated = per_block(world, tp=2, sequence_parallel=True, training={"recompute": {"again": parts}})
        assert repeated == {
            ("all-gather", ACTIVATION): plain["all-gather", ACTIVATION] + gathers * MICROBATCHES,
            ("reduce-scatter", ACTIVATION): plain["reduce-scatter", ACTIVATION] + scatters * MICROBATCHES,
        }
    assert per_block(world, tp=2, sequence_parallel=True, training={"recompute": "cheap"}) == plain


def test_zero(world: World) -> None:
    # Rajbhandari et al. 2020, section 7: 2 volumes for stages 0 to 2 (once a step, gradients every microbatch for
    # stage 2), 3 for stage 3, which gathers for the forward and again for the backward pass.
    size = block_bytes(1)
    dp = {"dp": 2, "training": {"micro_batch_size": BATCH, "global_batch_size": 2 * MICROBATCHES * BATCH}}
    assert per_block(world, zero=0, **dp) == {("all-reduce", size): 1}
    shared = per_block(world, record_as_on_gpus, zero=1, **dp)  # a call for each parameter
    volume = {kind: sum(n * count for (k, n), count in shared.items() if k == kind) for kind, _ in shared}
    assert volume == {"all-gather": size, "reduce-scatter": size}
    # gloo has no cheaper reduce-scatter than an all-reduce.
    gathers = {call: count for call, count in shared.items() if call[0] == "all-gather"}
    assert per_block(world, zero=1, **dp) == {("all-reduce", size): 1} | gathers
    assert per_block(world, zero=2, **dp) == {("all-gather", size): 1, ("reduce-scatter", size): MICROBATCHES}
    gathers = {("all-gather", size): 2 * MICROBATCHES, ("reduce-scatter", size): MICROBATCHES}
    assert per_block(world, zero=3, **dp) == gathers


def test_head_and_embedding(world: World) -> None:
    # Outside the blocks: the embedding's sum forward, the output's input gradient backward, and of the loss only
    # each chunk maxima [tokens] and sums [2, tokens], fp32: logits are never gathered.
    raw = case(2, model={"num_layers": 2})
    seen = world.run(2, record, raw)[0]
    seen.subtract({("all-reduce", ACTIVATION): 2 * 4 * MICROBATCHES})
    expected = Counter({("all-reduce", ACTIVATION): 2 * MICROBATCHES})
    for first in range(0, BATCH * SEQ, CHUNK):
        tokens = 4 * min(CHUNK, BATCH * SEQ - first)
        expected.update({("all-reduce", tokens): MICROBATCHES, ("all-reduce", 2 * tokens): MICROBATCHES})
    assert +seen == expected


def context_parallel(cp: int, kind: str, **options: Any) -> dict[str, Any]:
    """A case whose weights are never exchanged with what activations are: one all-reduce of a block, once a step."""
    return {"cp": cp, "cp_kind": kind, "zero": 0, **options}


def test_keys_and_values_are_gathered(world: World) -> None:
    # tplaunch.parallel.context: gathered for the forward pass and again for the backward pass, gradients scattered.
    gathered = 2 * 4 * SEQ * BATCH * 2 * 16  # keys and values of 2 heads of the whole sequence, fp32
    expected = {
        ("all-gather", gathered): 2 * MICROBATCHES,
        ("all-to-all", gathered): MICROBATCHES,
        ("all-reduce", block_bytes(1)): 1,
    }
    assert per_block(world, **context_parallel(4, "allgather")) == expected
    again = {"training": {"recompute": {"again": ["core_attention"]}}}
    assert per_block(world, **context_parallel(2, "allgather", **again)) == expected, "gathered once more"


def test_keys_and_values_are_gathered_besides_sequences(world: World) -> None:
    # With a head of its own on each tp rank, and half a sequence, both happen to be as long.
    size = 2 * 4 * SEQ * BATCH * 1 * 16
    assert size == ACTIVATION // 2
    assert per_block(world, tp=2, sequence_parallel=True, **context_parallel(2, "allgather")) == {
        ("all-gather", size): (6 + 2) * MICROBATCHES,
        ("reduce-scatter", size): 4 * MICROBATCHES,
        ("all-to-all", size): MICROBATCHES,
        ("all-reduce", block_bytes(2)): 1,
    }


def test_heads_are_exchanged_for_tokens(world: World) -> None:
    head = 4 * SEQ * BATCH * 16  # bytes of one head of the whole sequence
    there, back = head * (4 + 2 * 4) // 4, head * 4 // 4  # the 2 heads of keys twice: one for each of 4 ranks
    expected = {("all-to-all", there): 2 * MICROBATCHES, ("all-to-all", back): 2 * MICROBATCHES}
    expected["all-reduce", block_bytes(1)] = 1
    assert per_block(world, **context_parallel(4, "ulysses")) == expected
    again = {"training": {"recompute": "full"}}  # exchanged again: what attention reads, and what it gives
    repeated = per_block(world, **context_parallel(2, "ulysses", **again))
    assert repeated["all-to-all", head * 8 // 2] == 3 * MICROBATCHES
    assert repeated["all-to-all", head * 4 // 2] == 3 * MICROBATCHES
