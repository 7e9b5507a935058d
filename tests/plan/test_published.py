"""The planner against published measurements, none left out. Run with -s to see the table.

Nothing here is fitted: the two efficiencies of A100 and H100 in `tplaunch.spec.gpu` come from another source
(MosaicML's FSDP runs). Where a run differs from our trainer, the point says how it is represented.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

import pytest

from tplaunch.plan.activations import block_activations
from tplaunch.plan.case import Case
from tplaunch.plan.estimate import block_work, estimate
from tplaunch.recipe.presets import PRESETS
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.gpu import GPUS, Gpu
from tplaunch.spec.parameters import parameter_count
from tplaunch.spec.recompute import ALL, block_steps
from tplaunch.spec.resolve import resolve
from tplaunch.units import GiB

A100, H100 = GPUS["a100-80gb"], GPUS["h100-80gb"]


@dataclass(frozen=True)
class Point:
    """A measured run.

    Args:
        source: where it is published.
        name: of the run there.
        case: the run as a recipe and hardware.
        measured: what was measured.
        unit: of it: seconds of a step, model or hardware FLOPs utilisation, model or hardware TFLOP/s or tokens/s of a
            GPU, GPU-hours.
    """

    source: str
    name: str
    case: Case
    measured: float
    unit: Literal["s", "mfu", "TFLOP/s", "hardware TFLOP/s", "tokens/s", "K GPU-hours/T tokens"]

    def predicted(self) -> float:
        plan = estimate(self.case)
        seconds, flops = plan.step_seconds, plan.hardware_flops_per_token
        # Theirs compute whole blocks again; ours leaves out the last projection and its sum, which nothing needs.
        model, work = self.case.model, block_work(self.case)
        whole = [
            sum(n for s in self.case.stages_on(r) for block, n in self.case.blocks(s).items() if block.again == ALL)
            for r in range(self.case.topology.pp)
        ]
        down = work.parts["down"].forward + work.traffic.again_seconds(block_steps(model)[-1:])
        seconds += self.case.microbatches * max(whole) * down / (1 - plan.step.bubble)
        flops += sum(whole) * 2 * model.ffn_hidden_size * model.hidden_size
        tokens = self.case.tokens_per_step / seconds / self.case.topology.world_size
        if self.unit == "s":
            return seconds
        if self.unit == "mfu":
            return plan.mfu * plan.step_seconds / seconds
        return tokens * flops / 1e12 if self.unit == "hardware TFLOP/s" else tokens

    def error(self) -> float:
        """Error of the predicted step time, as a share of the measured; positive: predicted slower than it was."""
        predicted = self.predicted()
        takes = self.unit in ("s", "K GPU-hours/T tokens")
        return predicted / self.measured - 1 if takes else self.measured / predicted - 1


def case(
    model: dict[str, Any], gpu: Gpu, tp: int, pp: int, dp: int, topology: dict[str, Any], training: dict[str, Any]
) -> Case:
    recipe = {
        "name": "published",
        "model": model,
        "topology": {"tp": tp, "pp": pp, "dp": dp, "gpus_per_node": min(8, tp * pp * dp), **topology},
        "training": {"steps": 1, **training},
        "data": {"train": "data/train"},
    }
    return Case(resolve(Recipe.model_validate(recipe)), gpu)


def gpt(heads: int, hidden: int, layers: int) -> dict[str, Any]:
    """Megatron-LM's GPT: vocabulary 51,200, sequence 2,048."""
    sizes = {"num_heads": heads, "hidden_size": hidden, "num_layers": layers, "ffn_hidden_size": 4 * hidden}
    same = {"norm": "layernorm", "activation": "gelu", "position": "learned", "max_position": 2048}
    return {**sizes, **same, "vocab_size": 51200, "qkv_bias": True, "linear_bias": True, "tie_embeddings": True}


def unfused_attention(head_dim: int) -> Gpu:
    """An A100 whose attention writes its scores to memory, as before FlashAttention.

    Per score, forward: 4 head_dim FLOPs for both products, nothing saved by the causal mask; and 13 bytes moved (score
    written, softmax read and written, dropout read, written with its mask, read by the second product). The planner
    counts 2 head_dim FLOPs a score; the efficiency is what that takes as long.
    """
    products = 4 * head_dim / (A100.peak["bf16"] * A100.matmul_efficiency)
    moving = 13 / (A100.memory_bandwidth * A100.memory_efficiency)
    return replace(A100, attention_efficiency=2 * head_dim / (products + moving) / A100.peak["bf16"])


def interleaved(chunks: int) -> dict[str, Any]:
    return {"schedule": "interleaved1f1b", "virtual_stages": chunks} if chunks > 1 else {}


# Narayanan et al. 2021 (arXiv 2104.04473), table 1; micro batches and interleaving from the authors' script
# (Megatron-LM, examples/sc21/run_table_1.sh). TFLOP/s count the recomputation.
# billions, heads, hidden, layers, tp, pp, GPUs, batch, micro batch, chunks, TFLOP/s
MEGATRON = [
    (1.7, 24, 2304, 24, 1, 1, 32, 512, 16, 1, 137),
    (3.6, 32, 3072, 30, 2, 1, 64, 512, 16, 1, 138),
    (7.5, 32, 4096, 36, 4, 1, 128, 512, 16, 1, 142),
    (18.4, 48, 6144, 40, 8, 1, 256, 1024, 8, 1, 135),
    (39.1, 64, 8192, 48, 8, 2, 512, 1536, 4, 1, 138),
    (76.1, 80, 10240, 60, 8, 4, 1024, 1792, 2, 3, 140),
    (145.6, 96, 12288, 80, 8, 8, 1536, 2304, 2, 2, 148),
    (310.1, 128, 16384, 96, 8, 16, 1920, 2160, 1, 2, 155),
    (529.6, 128, 20480, 105, 8, 35, 2520, 2520, 1, 3, 163),
    (1008.0, 160, 25600, 128, 8, 64, 3072, 3072, 1, 1, 163),
]

# Korthikanti et al. 2022 (arXiv 2205.05198), tables 3 and 5: seconds of an iteration with full recomputation, and with
# sequence parallelism and selective recomputation.
# name, heads, hidden, layers, pp, batch, micro batch, chunks, full, selective
KORTHIKANTI = [
    ("22B", 64, 6144, 48, 1, 4, 4, 1, 1.42, 1.10),
    ("175B", 96, 12288, 96, 8, 64, 1, 3, 18.13, 13.75),
    ("530B", 128, 20480, 105, 35, 280, 1, 3, 49.05, 37.83),
    ("1T", 160, 25600, 128, 64, 512, 1, 1, 94.42, 71.49),
]

SELECTIVE = {"again": ["core_attention"]}

# Llama Team 2024 (arXiv 2407.21783), table 4.
# cp, dp, sequence, global batch, MFU
LLAMA_405B = [(1, 64, 8192, 2048, 0.43), (1, 128, 8192, 2048, 0.41), (16, 8, 131072, 128, 0.38)]

# torchtitan, docs/performance.md (2024): Llama on 64 A100s, FSDP2. "Selective layer" recomputes every second block,
# "selective op" every second matmul and all element-wise work: both are represented as every second block; compiled.
# preset, sequence, micro batch, checkpointing, tokens/s of a GPU
TITAN_A100 = [
    ("llama3-8b", 8192, 1, "selective layer", 2904),
    ("llama3-8b", 8192, 1, "selective op", 2973),
    ("llama3-70b", 8192, 1, "full", 331),
    ("llama2-13b", 4096, 2, "none", 2162),
    ("llama2-13b", 4096, 2, "selective layer", 1914),
    ("llama2-13b", 4096, 2, "selective op", 1904),
    ("llama2-70b", 4096, 1, "selective op", 355),
    ("llama2-70b", 4096, 2, "full", 353),
]

# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3 without Float8: Llama 3.1 8B, FSDP2 on H100s
# with 96 GB of HBM2e at 2.4 TB/s and a limit of 500 W, which the planner does not know of.
# GPUs, compiled, tokens/s of a GPU
TITAN_H100 = [(8, False, 5762), (8, True, 6667), (128, False, 5605), (128, True, 6514)]


def points() -> list[Point]:
    found = []
    for billions, heads, hidden, layers, tp, pp, gpus, batch, micro, chunks, tflops in MEGATRON:
        run = case(
            gpt(heads, hidden, layers),
            unfused_attention(hidden // heads),
            tp,
            pp,
            gpus // (tp * pp),
            {"zero": 0, **interleaved(chunks)},
            {"seq_len": 2048, "micro_batch_size": micro, "global_batch_size": batch, "recompute": "full"},
        )
        found.append(Point("Megatron 2021", f"{billions}B", run, tflops, "hardware TFLOP/s"))
    for name, heads, hidden, layers, pp, batch, micro, chunks, full, selective in KORTHIKANTI:
        for recompute, sequence_parallel, seconds in (("full", False, full), (SELECTIVE, True, selective)):
            run = case(
                gpt(heads, hidden, layers),
                unfused_attention(hidden // heads),
                8,
                pp,
                1,
                {"zero": 0, "sequence_parallel": sequence_parallel, **interleaved(chunks)},
                {"seq_len": 2048, "micro_batch_size": micro, "global_batch_size": batch, "recompute": recompute},
            )
            kind = "full" if recompute == "full" else "selective"
            found.append(Point("Korthikanti 2022", f"{name} {kind}", run, seconds, "s"))
    eight_ways = case(
        gpt(128, 20480, 105),
        unfused_attention(160),
        8,
        35,
        8,
        {"zero": 0, "sequence_parallel": True, **interleaved(3)},
        {"seq_len": 2048, "micro_batch_size": 1, "global_batch_size": 2240, "recompute": SELECTIVE},
    )
    found.append(Point("Korthikanti 2022", "530B selective, dp 8", eight_ways, 0.542, "mfu"))  # abstract
    # Llama Team 2024 (arXiv 2407.21783), table 4. No layer is computed again, and tensors
    # are freed as soon as they are done with (section 3.3.2): `cheap`. Their gradients are sharded, too, and reduced
    # once a step; our ZeRO 2 reduces them with every microbatch, so ZeRO 1 stands for it, whose gradients are whole.
    # Virtual stages are not published: 4, with which the published uneven split comes out. The long sequences have a
    # document mask, whose documents are not published: they are taken to be whole sequences, in time and in FLOPs.
    for cp, dp, seq_len, batch, mfu in LLAMA_405B:
        run = case(
            {"preset": "llama3-405b", **PRESETS["llama3-405b"]},
            H100,
            8,
            16,
            dp,
            {"cp": cp, "sequence_parallel": True, **interleaved(4)},
            {"seq_len": seq_len, "micro_batch_size": 1, "global_batch_size": batch, "recompute": "cheap"},
        )
        long = f", {seq_len} tokens" if cp > 1 else ""
        found.append(Point("Llama 3", f"405B, {128 * dp * cp} GPUs{long}", run, mfu, "mfu"))
    for preset, seq_len, micro, checkpointing, tokens in TITAN_A100:
        recompute = {"every": 2} if checkpointing.startswith("selective") else checkpointing
        training = {"seq_len": seq_len, "micro_batch_size": micro, "global_batch_size": 64 * micro, "compile": True}
        run = case(
            {"preset": preset, **PRESETS[preset]}, A100, 1, 1, 64, {"zero": 3}, {**training, "recompute": recompute}
        )
        found.append(Point("torchtitan A100", f"{preset}, {checkpointing}", run, tokens, "tokens/s"))
    for gpus, compiled, tokens in TITAN_H100:
        training = {"seq_len": 8192, "micro_batch_size": 2, "global_batch_size": 2 * gpus, "recompute": {"every": 2}}
        gpu = replace(H100, memory=95 * 2**30, memory_bandwidth=2.4e12)
        run = case(
            {"preset": "llama3-8b", **PRESETS["llama3-8b"]},
            gpu,
            1,
            1,
            gpus,
            {"zero": 3},
            {**training, "compile": compiled},
        )
        name = f"8B, {gpus} GPUs{', compiled' if compiled else ''}"
        found.append(Point("torchtitan H100, 500 W", name, run, tokens, "tokens/s"))
    return found


def test_step_times_of_published_runs() -> None:
    table = points()
    errors = [point.error() for point in table]
    for point, error in zip(table, errors, strict=True):
        run = f"{point.source:<24}{point.name:<32}"
        print(f"{run}{point.predicted():9.3f} {point.measured:9.3f} {point.unit:<17}{error:+.1%}")
    sizes = [abs(error) for error in errors]
    print(
        f"{len(table)} points: median error {median(sizes):.1%}, largest {max(sizes):.1%}, bias {median(errors):+.1%}"
    )
    assert len(table) == len(MEGATRON) + 2 * len(KORTHIKANTI) + 1 + len(LLAMA_405B) + len(TITAN_A100) + len(TITAN_H100)
    assert median(sizes) < 0.06
    assert max(sizes) < 0.20


def test_published_runs_fit_on_their_gpus() -> None:
    misfits = []
    for point in points():
        plan = estimate(point.case)
        most = plan.memory[plan.fullest]
        parts = ", ".join(f"{name} {size / GiB:.1f}" for name, size in most._asdict().items() if size >= GiB / 20)
        run = f"{point.source:<24}{point.name:<32}"
        print(f"{run}{most.total / GiB:6.1f} of {point.case.gpu.memory / GiB:.1f} GiB: {parts}")
        if not plan.fits:
            misfits.append(point.name)
    assert not misfits


@pytest.mark.parametrize("row", MEGATRON, ids=lambda row: f"{row[0]}B")
def test_model_sizes_are_the_published_ones(row: tuple[Any, ...]) -> None:
    billions, heads, hidden, layers = row[:4]
    recipe = {"name": "x", "model": gpt(heads, hidden, layers), "data": {"train": "x"}}
    spec = Recipe.model_validate({**recipe, "training": {"seq_len": 2048, "global_batch_size": 1, "steps": 1}}).model
    assert parameter_count(spec) / 1e9 == pytest.approx(billions, rel=0.03)


def test_activations_per_block_against_korthikantis_formula() -> None:
    """Without dropout (its masks and outputs: 1 + 1 + 2 + 1 of 34 bytes by their count) and with FlashAttention, which
    keeps what selective recomputation keeps, beside an fp32 statistic for each head and norm."""
    heads, hidden, tokens, tp = 96, 12288, 2048, 8
    for sequence_parallel in (True, False):
        run = case(
            gpt(heads, hidden, 8),
            A100,
            tp,
            1,
            1,
            {"sequence_parallel": sequence_parallel},
            {"seq_len": tokens, "micro_batch_size": 1, "global_batch_size": 1},
        )
        # Attention: input 2, q k v 6, output 2; MLP: input 2, both inner 8 + 8; norms 2 + 2 bytes each h.
        hidden_terms, split_terms = 2 + 2 + 2 + 2, 6 + 2 + 8 + 8
        share = 1 / tp if sequence_parallel else 1
        papers = tokens * hidden * (hidden_terms * share + split_terms / tp)
        assert block_activations(run) == pytest.approx(papers, rel=0.01)
