"""Parts of a block that are made again: gradients bit for bit, and the bytes that a block keeps."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from tests.recipes import BATCH, SEQ, VOCAB, case, resolved
from tests.world import World
from tplaunch.spec.recompute import CHEAP, PARTS

GPT2 = {
    "num_kv_heads": 4,
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "max_position": SEQ,
    "qkv_bias": True,
    "linear_bias": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "head_dim": 32},
    "gpt2": GPT2,
    "gpt2, norms of heads": {**GPT2, "qk_norm": True},
}
# Each part alone, each two, all but one: chains of all lengths.
SETS: list[Any] = [
    "cheap",
    "full",
    {"every": 2},
    *({"again": list(parts)} for count in (1, 2) for parts in combinations(PARTS, count)),
    *({"save": [part]} for part in PARTS),
]


# Where there are collectives, schedules and shards: less of it.
FEWER: list[Any] = [
    "cheap",
    "full",
    {"every": 2},
    *({"again": [part]} for part in ("core_attention", "attention_output", "gate_up")),
    {"again": ["qkv", "rotary"]},
    {"again": ["norm", "gate_up"]},
    {"again": ["norm", "qkv"]},
    {"save": ["core_attention"]},
    {"save": ["attention_output", "gate_up"]},
]


def differing(raw: dict[str, Any], sets: list[Any]) -> list[Any]:
    """The sets with which a step's gradients on this rank are not those of `none`, bit for bit."""
    from tplaunch.model.build import build_stages
    from tplaunch.optim.gradients import GradientFinalizer
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import Batch
    from tplaunch.train.step import make_pipeline

    mesh = Mesh.of(resolved(raw), torch.device("cpu"))
    assert isinstance(raw["topology"]["dp"], int)
    random = torch.Generator().manual_seed(mesh.coordinates.dp)
    samples = torch.randint(VOCAB, (BATCH // raw["topology"]["dp"], SEQ), generator=random)
    places = torch.arange(SEQ).repeat(len(samples), 1)
    places[:, SEQ // 3 :] -= SEQ // 3  # a second document begins here
    batch = Batch(samples, samples.roll(-1, 1), places if raw["training"].get("document_mask") else None)

    def gradients(recompute: Any) -> list[torch.Tensor]:
        torch.compiler.reset()
        recipe = resolved({**raw, "training": {**raw["training"], "recompute": recompute}})
        stages = build_stages(recipe, mesh)
        pipeline = make_pipeline(stages, mesh, recipe)
        finalizer = GradientFinalizer(
            stages, mesh, schedule=recipe.topology.schedule, num_stages=pipeline.num_stages, tied=False
        )
        pipeline.train(batch, 1.0 / batch.labels.numel())
        finalizer.complete()
        found = [stage.sharding.gradient(shard) for stage in stages for shard in stage.sharding.shards]
        assert any(gradient.any() for gradient in found)
        return found

    expected = gradients("none")
    return [recompute for recompute in sets if not all(map(torch.equal, gradients(recompute), expected))]


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_without(world: World, model: str, precision: str) -> None:
    raw = case(model=MODELS[model], training={"precision": precision, "steps": 1})
    assert world.run(1, differing, raw, SETS) == [[]]


WORLDS = {
    "bf16": case(training={"precision": "bf16"}),
    "documents": case(training={"document_mask": True}, model=MODELS["qwen3"]),
    "tp2": case(2, model=MODELS["qwen3"]),
    "tp2-sp": case(2, sequence_parallel=True),
    "tp2-sp-gpt2": case(2, sequence_parallel=True, model=GPT2),
    "fp64-tp4-sp-kv2": case(4, sequence_parallel=True, training={"precision": "fp64"}),
    "zero3": case(1, 1, 2, zero=3),
    "zero-bubble": case(1, 2, schedule="interleavedzerobubble", model=MODELS["qwen3"]),
    "zero-bubble-tp2-sp": case(2, 2, schedule="zbvzerobubble", sequence_parallel=True),
    "interleaved": case(1, 2, schedule="interleaved1f1b"),
}


@pytest.mark.parametrize("name", WORLDS)
def test_gradients_are_those_without_on_the_same_topology(world: World, name: str) -> None:
    raw = WORLDS[name]
    topology = raw["topology"]
    ranks = topology["tp"] * topology["pp"] * topology["dp"]
    assert world.run(ranks, differing, raw, FEWER) == [[]] * ranks


@pytest.mark.parametrize("name", ["alone", "tp2-sp"])
def test_gradients_are_those_without_when_compiled(world: World, name: str) -> None:
    raw = (
        case(training={"compile": True})
        if name == "alone"
        else case(2, sequence_parallel=True, training={"compile": True}, model=MODELS["qwen3"])
    )
    ranks = raw["topology"]["tp"]
    assert world.run(ranks, differing, raw, FEWER[:6]) == [[]] * ranks


def kept_bytes(raw: dict[str, Any], sets: list[Any]) -> list[tuple[int, float]]:
    """Bytes that a block holds between its forward and its backward pass, for each set: counted and planned."""
    from tests.measure import StorageCounter
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.plan.case import Case
    from tplaunch.plan.memory import block_activations
    from tplaunch.spec.gpu import GPUS
    from tplaunch.spec.recompute import chosen

    found = []
    for recompute in sets:
        recipe = resolved({**raw, "training": {**raw["training"], "recompute": recompute}})
        mesh = Mesh.of(recipe, torch.device("cpu"))
        (stage,) = build_stages(recipe, mesh)
        plan = Case(recipe, GPUS["h100-80gb"])
        length = SEQ // mesh.tp.size if mesh.tp.sequence_parallel else SEQ
        dtype = next(stage.module.parameters()).dtype
        with StorageCounter() as counter:
            x = torch.randn(length, recipe.training.micro_batch_size, recipe.model.hidden_size, dtype=dtype)
            x.requires_grad_()
            known = [*stage.module.parameters(), *([] if stage.module.rope is None else [stage.module.rope])]
            for tensor in known:
                counter.add(getattr(tensor, "_local_tensor", tensor))
            before = counter.bytes - x.nbytes
            y = stage.module.layers["0"](x, stage.module.rope, None)
            held = counter.bytes - before - y.nbytes
        found.append((held, block_activations(plan, chosen(recipe.training, 0))))
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_a_block_keeps_what_is_planned(
    world: World, model: str, precision: str, tp: int, sequence_parallel: bool
) -> None:
    raw = case(tp, sequence_parallel=sequence_parallel, model=MODELS[model], training={"precision": precision})
    sets = ["none", *SETS] if tp == 1 else ["none", *FEWER]
    # torch's LayerNorm keeps both its statistics in fp32 on a GPU, in bf16 on a CPU.
    narrow = precision == "bf16" and MODELS[model].get("norm") == "layernorm"
    tokens = SEQ * raw["training"]["micro_batch_size"] // (tp if sequence_parallel else 1)
    less = 2 * 2 * 2 * tokens if narrow else 0
    for found in world.run(tp, kept_bytes, raw, sets):
        assert [held + less for held, _ in found] == [planned for _, planned in found]


def test_parts_of_a_set_that_save_nothing_are_left_out() -> None:
    from tplaunch.recipe.schema import Model
    from tplaunch.spec.recompute import ALL, effective

    llama, qwen3, gpt2 = (
        Model.model_validate({**case()["model"], **MODELS[name]}) for name in ("llama", "qwen3", "gpt2")
    )
    assert effective(llama, CHEAP) == {"norm", "activation"}
    assert effective(qwen3, CHEAP) == CHEAP
    assert effective(llama, frozenset({"qkv"})) == effective(llama, frozenset({"rotary"})) == frozenset()
    assert effective(llama, ALL) == ALL - {"down"}
    assert effective(gpt2, frozenset({"qkv", "rotary"})) == {"qkv"}
