"""The planner against published runs of mixtures of experts, as `test_published`: nothing is fitted to them. All but
the first balance their tokens by force. Run with -s to see the table.

They were measured with software that differs from our trainer where it matters most, in the exchange. What of that is
represented, each point says; what is not, is its error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from tests.plan.test_published import H100, Point, case
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import block_works, estimate
from tplaunch.recipe.presets import PRESETS
from tplaunch.spec.gpu import GPUS, Gpu
from tplaunch.spec.recompute import ALL, block_steps

# Transformer Engine attends by cuDNN, as fast as FlashAttention 3: 1.5 to 2 times as fast as FlashAttention 2, of which
# the table of GPUs tells, forward, 1.5 to 1.75 times backward (Shah et al. 2024, arXiv 2407.08608, section 1).
ENGINE = replace(H100, attention_efficiency=1.6 * H100.attention_efficiency)


def preset(name: str, **changes: Any) -> dict[str, Any]:
    return {"preset": name, **PRESETS[name], **changes}


def deepep(gpu: Gpu, top_k: int, ranks: float, nodes: float) -> Gpu:
    """DeepEP sends a token once to each node, and there once to each rank, that has some of its experts, not once to
    each expert: the same as links that are so much faster.

    Args:
        ranks, nodes: that a token's experts are on, in the mean; as many nodes as experts where none are on others.
    """
    network, link = gpu.network_bandwidth * top_k / nodes, gpu.link_bandwidth * top_k / ranks
    return replace(gpu, network_bandwidth=network, link_bandwidth=link)


def met(top_k: int, places: int) -> float:
    """Of so many places those where top_k choices are, each of any with equal chances."""
    return places * (1 - (1 - 1 / places) ** top_k)


@dataclass(frozen=True)
class ExpertPoint(Point):
    """As `Point`; a step may be several flushes of the pipeline."""

    flushes: int = 1

    def predicted(self) -> float:
        plan, works = estimate(self.case), block_works(self.case)
        seconds = plan.step_seconds
        # Theirs compute whole blocks again; ours leaves out the last projection, and the way back from the experts.
        whole = [
            {
                experts: sum(
                    n for s in self.case.stages_on(r) for b, n in self.case.blocks(s).items() if b == (experts, ALL)
                )
                for experts in works
            }
            for r in range(self.case.topology.pp)
        ]
        for experts, work in works.items():
            last = block_steps(self.case.model, experts=experts)[-1:]
            back = sum(e.seconds for e in work.experts.all if e.what.startswith("tokens to"))
            more = work.parts["down"].forward + work.traffic.again_seconds(last) + back
            blocks = max(counts[experts] for counts in whole)
            seconds += self.case.microbatches * blocks * more / (1 - plan.step.bubble)
        seconds *= self.flushes
        if self.unit == "s":
            return seconds
        tokens = self.flushes * self.case.tokens_per_step / seconds / self.case.topology.world_size
        if self.unit == "K GPU-hours/T tokens":
            return 1e12 / tokens / 3600 / 1e3
        return tokens * plan.model_flops_per_token / 1e12


# NVIDIA NeMo Automodel, docs/performance-summary.md (2025-10-02) and examples/benchmark/configs: BF16, FSDP2, sequences
# of 4,096, DeepEP, on H100s. A pipeline's flush is a local batch of 8; DeepSeek-V3 on 1,024 GPUs has four in a step.
# Where its blocks are checkpointed, they are computed again whole. FSDP2 reduces in the last microbatch alone: ZeRO 1
# stands for it where weights stay gathered, ZeRO 3 elsewhere. The gate that balances (FakeBalancedGate) gives each
# token experts that follow one another: they are all on one node, and on one rank or two.
# preset, GPUs, pp, virtual stages, ep, zero, micro batch, batch of a flush, flushes, checkpointed, seconds of a step
AUTOMODEL = [
    ("deepseek-v3", 1024, 4, 8, 64, 1, 1, 2048, 4, True, 37.87),
    ("deepseek-v3", 256, 4, 8, 64, 1, 1, 512, 1, True, 8.18),
    ("qwen3-30b-a3b", 8, 1, 1, 8, 3, 4, 512, 1, True, 21.773),
    ("gpt-oss-20b", 8, 1, 1, 8, 3, 2, 256, 1, False, 10.04),
    ("gpt-oss-120b", 64, 1, 1, 64, 3, 2, 512, 1, False, 4.30),
]

# Megatron-MoE-ModelZoo (Megatron-Core's), best_practice/Qwen3/readme.md: Qwen3-235B-A22B in BF16 on 256 H100s,
# sequences of 4,096, a batch of 2,048. Embedding and loss take the place of a layer each.
# dispatcher, tp, ep, pp, virtual stages, zero, micro batch, recomputation, layers of the ends, seconds of a step
CHEAP = {"again": ["norm", "activation"]}
QWEN = [
    ("DeepEP", 2, 32, 8, 4, 1, 1, CHEAP, 2, 19.7),
    ("DeepEP, exchange behind 1f1b", 2, 32, 8, 4, 1, 1, CHEAP, 2, 17.6),
    ("DeepEP, FSDP", 2, 8, 1, 1, 3, 4, "full", 94, 17.6),
    ("all-to-all", 2, 8, 32, 3, 1, 1, CHEAP, 0, 24.2),
    ("DeepEP, no recomputation", 4, 8, 8, 4, 1, 1, "none", 2, 29.0),
]


def hidden(gpu: Gpu) -> Gpu:
    """All that is sent is hidden behind the passes of other microbatches."""
    return replace(gpu, link_bandwidth=1e18, network_bandwidth=1e18)


def deepseek(gpu: Gpu) -> Case:
    """DeepSeek-V3 as its report trained it, without its multi-token prediction (4 % of the FLOPs)."""
    topology = {"ep": 64, "schedule": "dualpipev", "virtual_stages": 2}
    training = {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 15360}
    again = {"again": ["norm", "qkv", "rotary", "activation"]}  # RMSNorm, MLA's up-projections, SwiGLU: section 3.2.3
    return case(preset("deepseek-v3"), gpu, 1, 16, 128, topology, {**training, "recompute": again})


H800 = GPUS["h800-80gb"]


def points() -> list[ExpertPoint]:
    # DeepSeek-AI 2024 (arXiv 2412.19437), section 1: 180K GPU-hours on 2,048 H800s for a trillion tokens. In FP8, which
    # multiplies twice as fast as BF16 (section 3.3); DualPipe hides what is sent (section 3.2.1).
    fp8 = replace(H800, matmul_efficiency=2 * H800.matmul_efficiency)
    found = [ExpertPoint("DeepSeek-V3", "2,048 H800s, FP8", deepseek(hidden(fp8)), 180, "K GPU-hours/T tokens")]
    for name, gpus, pp, chunks, ep, zero, micro, batch, flushes, checkpointed, seconds in AUTOMODEL:
        own = H100 if name.startswith("gpt-oss") else ENGINE  # FlexAttention
        moe = PRESETS[name]["moe"]
        gpu = deepep(own, moe["top_k"], max(1, moe["top_k"] * ep // moe["experts"]), 1)
        topology = {
            "ep": ep,
            "zero": zero,
            "schedule": "interleaved1f1b" if pp > 1 else "1f1b",
            "virtual_stages": chunks,
        }
        training = {"seq_len": 4096, "micro_batch_size": micro, "global_batch_size": batch}
        training["recompute"] = "full" if checkpointed else "none"
        run = case(preset(name), gpu, 1, pp, gpus // pp, topology, training)
        found.append(ExpertPoint("NeMo Automodel", f"{name}, {gpus} H100s", run, seconds, "s", flushes))
    for name, tp, ep, pp, chunks, zero, micro, recompute, ends, seconds in QWEN:
        gpu = ENGINE
        if name.startswith("DeepEP"):
            gpu = deepep(ENGINE, 8, met(8, ep), met(8, ep // 8) if ep > 8 else 8)
        gpu = hidden(gpu) if "behind" in name else gpu
        stages = pp * chunks
        layers = [94] if stages == 1 else [ends, *[(94 - 2 * ends) // (stages - 2)] * (stages - 2), ends]
        topology = {"ep": ep, "zero": zero, "sequence_parallel": True, "stage_layers": layers}
        topology |= {"schedule": "interleaved1f1b", "virtual_stages": chunks} if pp > 1 else {}
        training = {"seq_len": 4096, "micro_batch_size": micro, "global_batch_size": 2048, "recompute": recompute}
        run = case(preset("qwen3-235b-a22b"), gpu, tp, pp, 256 // (tp * pp), topology, training)
        found.append(ExpertPoint("Megatron-Core, Qwen3-235B", f"{name}, ep {ep} pp {pp}", run, seconds, "s"))
    # The same, best_practice/Mixtral: "around 455 TFLOPS" without dropped tokens, on 128 H100s, by NCCL's all-to-all.
    training = {"seq_len": 4096, "micro_batch_size": 1, "global_batch_size": 256}
    mixtral = case(preset("mixtral-8x22b"), ENGINE, 2, 8, 8, {"ep": 8, "sequence_parallel": True}, training)
    return [*found, ExpertPoint("Megatron-Core, Mixtral", "8x22B, 128 H100s", mixtral, 455, "TFLOP/s")]


def test_step_times_of_published_mixtures() -> None:
    table = points()
    errors = [point.error() for point in table]
    for point, error in zip(table, errors, strict=True):
        run = f"{point.source:<28}{point.name:<40}"
        print(f"{run}{point.predicted():9.2f} {point.measured:9.2f} {point.unit:<22}{error:+.1%}")
    sizes = [abs(error) for error in errors]
    print(
        f"{len(table)} points: median error {median(sizes):.1%}, largest {max(sizes):.1%}, bias {median(errors):+.1%}"
    )
    assert len(table) == 1 + len(AUTOMODEL) + len(QWEN) + 1
    assert median(sizes) < 0.2
    assert max(sizes) < 0.4


def test_deepseek_as_our_trainer_would_run_it_takes_twice_as_long() -> None:
    """In BF16, and nothing hides the exchange: half of the step."""
    plan = estimate(deepseek(H800))
    hours = plan.case.topology.world_size / 3600 * 1e12 / plan.tokens_per_second  # of 1T tokens
    assert 350e3 < hours < 450e3
    assert 0.3 < plan.breakdown.expert_parallel / plan.step_seconds < 0.6
