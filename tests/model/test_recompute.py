"""Parts of a block that are made again: gradients bit for bit, and the bytes that a block keeps."""

from __future__ import annotations

import time
from collections import Counter
from itertools import combinations
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import products
from tests.recipes import BATCH, SEQ, VOCAB, case, ranks, resolved
from tests.world import World
from tplaunch.recipe.schema import Model
from tplaunch.spec.flops import repeated_flops_per_token
from tplaunch.spec.recompute import ALL, CHEAP, PARTS, chosen, effective

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
    "gemma, sinks": {
        "activation": "geglu",
        "norm_plus_one": True,
        "post_norms": True,
        "window": SEQ // 3,
        "attention_softcap": 2.0,
        "attention_sinks": True,
    },
    "gpt2, norms of heads": {**GPT2, "qk_norm": True},
    "olmo2": {
        "pre_norms": False,
        "post_norms": True,
        "qk_norm": True,
        "qk_norm_all_heads": True,
        "residual_multiplier": 0.3,
        "rope_layers": ["rope", "none"],
    },
    "experts": {"moe": {"experts": 6, "top_k": 2, "ffn_hidden_size": 40, "shared_ffn_hidden_size": 48}},
    "gpt_neox": {
        **{key: value for key, value in GPT2.items() if key not in ("position", "max_position")},
        "activation": "gelu_exact",
        "rotary_fraction": 0.5,
        "parallel_residual": True,
    },
    "latent": {
        "num_kv_heads": 4,
        "latent": {"q_rank": 24, "kv_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10},
    },
    "latent, whole queries": {
        "num_kv_heads": 4,
        "latent": {"kv_rank": 16, "nope_dim": 12, "rope_dim": 8, "value_dim": 10},
    },
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
    {"again": ["dispatch"]},
    {"again": ["norm", "dispatch", "activation"]},
]


# As many of those, and what norms after attention and MLP add.
AFTER: list[Any] = [*FEWER, {"again": ["down"]}, {"again": ["norm", "down"]}]


def sets_of(model: str, otherwise: list[Any]) -> list[Any]:
    """What is tried of a model: of those that differ from another in some steps, less."""
    fewer = model in ("gpt_neox", "latent, whole queries")
    return AFTER if MODELS[model].get("post_norms") else FEWER if fewer else otherwise


# All parts are in one of these; all sets are tried of the others where it is slow.
MANY_SETS = {"llama", "experts", "gpt2, norms of heads"}


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


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])  # equal bits are equal
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_without(world: World, model: str, precision: str) -> None:
    raw = case(model=MODELS[model], training={"precision": precision, "steps": 1})
    sets = SETS if precision == "fp64" or model in MANY_SETS else FEWER
    assert world.run(1, differing, raw, sets_of(model, sets)) == [[]]


BALANCED = {"moe": {**MODELS["experts"]["moe"], "aux_loss": 0.01, "z_loss": 0.01}}
WORLDS = {
    "bf16": case(training={"precision": "bf16"}),
    "documents": case(training={"document_mask": True}, model={**MODELS["qwen3"], "rope_layers": ["rope", "none"]}),
    "tp2": case(2, model=MODELS["qwen3"]),
    "tp2-sp": case(2, sequence_parallel=True),
    "tp2-sp-gpt2": case(2, sequence_parallel=True, model=GPT2),
    "fp64-tp4-sp-kv2": case(4, sequence_parallel=True, training={"precision": "fp64"}),
    "zero3": case(1, 1, 2, zero=3),
    "zero-bubble": case(1, 2, schedule="interleavedzerobubble", model=MODELS["qwen3"]),
    "zero-bubble-tp2-sp": case(2, 2, schedule="zbvzerobubble", sequence_parallel=True),
    "interleaved": case(1, 2, schedule="interleaved1f1b"),
    "zero3-gemma": case(1, 1, 2, zero=3, model=MODELS["gemma, sinks"]),
    "zero-bubble-gemma": case(1, 2, schedule="interleavedzerobubble", model=MODELS["gemma, sinks"]),
    "ep2": case(1, 1, 2, ep=2, model=BALANCED),
    "ep2-zero3": case(1, 1, 2, ep=2, zero=3, model=BALANCED),
    "ep2-tp2-sp": case(2, ep=2, sequence_parallel=True, model=BALANCED),
    "expert-tp2-zero-bubble": case(2, 2, expert_tp=2, schedule="zbvzerobubble", model=BALANCED),
    "cp2": case(cp=2, training={"document_mask": True}, model=MODELS["qwen3"]),
    "cp2-tp2-sp": case(2, cp=2, sequence_parallel=True),
    "cp2-zero-bubble": case(1, 2, cp=2, schedule="interleavedzerobubble"),
    "ulysses2-tp2-sp": case(2, cp=2, cp_kind="ulysses", sequence_parallel=True),
    "ulysses4-gpt2": case(cp=4, cp_kind="ulysses", model=GPT2),
    "zero-bubble-tp2-sp-latent": case(2, 2, schedule="zbvzerobubble", sequence_parallel=True, model=MODELS["latent"]),
    "cp2-tp2-latent": case(2, cp=2, model=MODELS["latent"]),
}


MANY = {
    "cp2-zero-bubble",
    "cp2-tp2-sp",
    "ulysses2-tp2-sp",
    "ulysses4-gpt2",
    "fp64-tp4-sp-kv2",
    "zero-bubble-tp2-sp-latent",
    "cp2-tp2-latent",
}  # processes, for what others show part by part


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in MANY else []) for name in WORLDS]
)
def test_gradients_are_those_without_on_the_same_topology(world: World, name: str) -> None:
    raw = WORLDS[name]
    assert world.run(ranks(raw), differing, raw, FEWER) == [[]] * ranks(raw)


@pytest.mark.parametrize(
    "name", ["alone", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2-sp", "gemma"))]
)
def test_gradients_are_those_without_when_compiled(world: World, name: str) -> None:
    raw = (
        case(training={"compile": True}, model=MODELS["gemma, sinks"] if name == "gemma" else None)
        if name != "tp2-sp"
        else case(2, sequence_parallel=True, training={"compile": True}, model=MODELS["qwen3"])
    )
    assert world.run(ranks(raw), differing, raw, FEWER) == [[]] * ranks(raw)


def kept_bytes(raw: dict[str, Any], sets: list[Any]) -> list[tuple[int, float]]:
    """Bytes that a block holds between its forward and its backward pass, for each set: counted and planned."""
    import torch.distributed as dist

    from tests.measure import StorageCounter
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.plan.activations import block_activations
    from tplaunch.plan.case import Case
    from tplaunch.spec.gpu import GPUS

    found = []
    excess = torch.zeros(1, dtype=torch.float64)  # of all ranks: a router does not share evenly between them
    for recompute in sets:
        recipe = resolved({**raw, "training": {**raw["training"], "recompute": recompute}})
        mesh = Mesh.of(recipe, torch.device("cpu"))
        (stage,) = build_stages(recipe, mesh)
        plan = Case(recipe, GPUS["h100-80gb"])
        length = SEQ // (mesh.tp.size if mesh.tp.sequence_parallel else 1) // mesh.topology.cp
        dtype = next(stage.module.parameters()).dtype
        with StorageCounter() as counter:
            x = torch.randn(length, recipe.training.micro_batch_size, recipe.model.hidden_size, dtype=dtype)
            x.requires_grad_()
            known = [excess, *stage.module.parameters(), *([] if stage.module.rope is None else [stage.module.rope])]
            for tensor in known:
                counter.add(getattr(tensor, "_local_tensor", tensor))
            before = counter.bytes - x.nbytes
            y = stage.module.layers["0"](x, stage.module.rope, None)
            planned = block_activations(plan, chosen(recipe.training, 0), experts=recipe.model.has_experts(0))
            for _ in range(1000):
                held = counter.bytes - before - y.nbytes
                dist.all_reduce(excess.fill_(held - planned))
                if excess.item() <= 0:
                    break
                time.sleep(0.001)  # gloo's thread lets go of what it has summed a moment later
        found.append((held, planned))
    return found


@pytest.mark.parametrize(
    ("tp", "sequence_parallel", "precision"),
    [
        (1, False, "bf16"),
        (2, True, "bf16"),
        (2, False, "fp32"),
        # The bytes of a number are told apart by those above.
        *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, False, "fp32"), (2, True, "fp32"))),
        pytest.param(2, False, "bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_a_block_keeps_what_is_planned(
    world: World, model: str, precision: str, tp: int, sequence_parallel: bool
) -> None:
    raw = case(tp, sequence_parallel=sequence_parallel, model=MODELS[model], training={"precision": precision})
    many = tp == 1 and (precision == "fp32" or model in MANY_SETS)
    sets = ["none", *sets_of(model, SETS if many else FEWER)]
    # torch's LayerNorm keeps both its statistics in fp32 on a GPU, in bf16 on a CPU.
    narrow = precision == "bf16" and MODELS[model].get("norm") == "layernorm"
    tokens = SEQ * raw["training"]["micro_batch_size"] // (tp if sequence_parallel else 1)
    less = 2 * 2 * 2 * tokens if narrow else 0
    for found in world.run(tp, kept_bytes, raw, sets):
        assert [held + less for held, _ in found] == [planned for _, planned in found]


def test_ranks_that_share_a_sequence_keep_equal_parts_of_a_block(world: World) -> None:
    """Nothing of what is as long as the sequence, whatever attention is and is made of."""
    sets = ["none", "cheap", {"again": ["core_attention"]}]
    for model in ({}, {"window": 5}):
        alone = [held for held, _ in world.run(1, kept_bytes, case(model=model), sets)[0]]
        for found in world.run(4, kept_bytes, case(cp=4, model=model), sets):
            assert [4 * held for held, _ in found] == alone


@pytest.mark.parametrize(
    "model", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gpt2"))]
)
@pytest.mark.parametrize(
    ("kind", "cp", "tp"), [("allgather", 2, 1), ("allgather", 2, 2), ("ulysses", 2, 1), ("ulysses", 4, 1)]
)
def test_a_block_keeps_what_is_planned_of_a_shared_sequence(
    world: World, model: str, kind: str, cp: int, tp: int
) -> None:
    raw = case(tp, cp=cp, cp_kind=kind, sequence_parallel=tp > 1, model=MODELS[model])
    for found in world.run(cp * tp, kept_bytes, raw, ["none", "cheap", "full", {"again": ["core_attention"]}]):
        assert [held for held, _ in found] == [planned for _, planned in found]


class Operations(TorchDispatchMode):
    """Counts FLOPs of matmuls, and how often attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen["matmul"] += products.flops(func, args)
        self.seen[func.name()] += 1
        return func(*args, **(kwargs or {}))


ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def operations(raw: dict[str, Any]) -> Counter[str]:
    """Of a step on this rank."""
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh
    from tplaunch.train.batch import random_batch
    from tplaunch.train.step import make_pipeline

    recipe = resolved(raw)
    mesh = Mesh.of(recipe, torch.device("cpu"))
    pipeline = make_pipeline(build_stages(recipe, mesh), mesh, recipe)
    with Operations() as counted:
        pipeline.train(random_batch(recipe, mesh.topology.dp, pipeline.reads_data), 1.0)
    return counted.seen


@pytest.mark.parametrize("recompute", ["cheap", "full", *FEWER[3:]], ids=str)
def test_what_is_made_again_is_made_once(world: World, recompute: Any) -> None:
    (plain,) = world.run(1, operations, case())
    (again,) = world.run(1, operations, case(training={"recompute": recompute}))
    recipe = resolved(case(training={"recompute": recompute}))
    parts = effective(recipe.model, chosen(recipe.training, 0))
    tokens = BATCH * SEQ * recipe.model.num_layers
    matmuls = repeated_flops_per_token(recipe.model, SEQ, parts - {"core_attention"})
    assert again["matmul"] - plain["matmul"] == tokens * matmuls
    assert again[ATTENTION] == plain[ATTENTION] * (2 if "core_attention" in parts else 1)
    assert again[f"{ATTENTION}_backward"] == plain[f"{ATTENTION}_backward"]


@pytest.mark.parametrize("parts", [["norm", "activation"], ["core_attention"]])
def test_a_pass_that_is_split_makes_them_once_too(world: World, parts: list[str]) -> None:
    raw = case(1, 2, schedule="zbvzerobubble")
    again = {**raw, "training": {**raw["training"], "recompute": {"again": parts}}}
    for before, after in zip(world.run(2, operations, raw), world.run(2, operations, again), strict=True):
        more = {name: after[name] - before[name] for name in ("aten::silu", ATTENTION)}
        if parts == ["core_attention"]:  # for its own backward pass, and for the weight of the projection after it
            assert before[ATTENTION] < after[ATTENTION] <= 3 * before[ATTENTION]
        else:  # for the weight of the projection after it alone
            assert more == {"aten::silu": before["aten::silu"], ATTENTION: 0}


def bytes_after_backward(raw: dict[str, Any], sets: list[Any]) -> list[int]:
    """What a block's graph still holds when its backward pass has run, for each set."""
    from tests.measure import StorageCounter
    from tplaunch.model.build import build_stages
    from tplaunch.parallel.mesh import Mesh

    found = []
    for recompute in sets:
        recipe = resolved({**raw, "training": {**raw["training"], "recompute": recompute}})
        (stage,) = build_stages(recipe, Mesh.of(recipe, torch.device("cpu")))
        with StorageCounter() as counter:
            x = torch.randn(SEQ, 4, recipe.model.hidden_size, requires_grad=True)
            y = stage.module.layers["0"](x, stage.module.rope, None)
            y.backward(torch.ones_like(y))
            found.append(counter.bytes)
    return found


def test_nothing_that_was_made_again_stays(world: World) -> None:
    ((first, *rest),) = world.run(1, bytes_after_backward, case(model=MODELS["qwen3"]), ["none", *SETS])
    assert rest == [first] * len(rest)


def test_parts_of_a_set_that_save_nothing_are_left_out() -> None:
    llama, qwen3, gpt2 = (
        Model.model_validate({**case()["model"], **MODELS[name]}) for name in ("llama", "qwen3", "gpt2")
    )
    assert effective(llama, CHEAP) == {"norm", "activation"}
    assert effective(qwen3, CHEAP) == CHEAP
    assert effective(llama, frozenset({"qkv"})) == effective(llama, frozenset({"rotary"})) == frozenset()
    assert effective(llama, ALL) == ALL - {"down", "dispatch"}
    assert effective(gpt2, frozenset({"qkv", "rotary"})) == {"qkv"}
    side_by_side = Model.model_validate({**case()["model"], **MODELS["gpt_neox"]})
    assert effective(side_by_side, ALL) == ALL - {"attention_output", "down", "dispatch"}
