"""Seconds of computation: of one microbatch through a block, the embedding and the head, and of the optimizer.

A kernel's time is that of its arithmetic at the reachable share of the peak, plus that of the bytes it must move.
The sum (not the larger of the two) is what real matmuls come to: their tiles load, compute and store in turn, and
small ones lose more. What moves bytes only (norms, activations, residuals) is counted by its reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tplaunch.plan.activations import head_width, local_heads
from tplaunch.plan.case import Case, Stage
from tplaunch.plan.muon import hidden
from tplaunch.spec.context import piece_count
from tplaunch.spec.flops import attention_flops_per_token
from tplaunch.spec.lora import targets

# FlashAttention's backward does five products where the forward does two (Dao 2023, arXiv 2307.08691, section 3.2).
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Passes:
    """Seconds of a microbatch through one part of the model.

    Args:
        forward: the forward pass.
        input_backward: gradients of activations.
        weight_backward: gradients of weights.
    """

    forward: float
    input_backward: float = 0.0
    weight_backward: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.input_backward + other.input_backward,
            self.weight_backward + other.weight_backward,
        )

    def __mul__(self, count: float) -> Passes:
        return Passes(self.forward * count, self.input_backward * count, self.weight_backward * count)

    @property
    def total(self) -> float:
        return self.forward + self.input_backward + self.weight_backward


def move(case: Case, count: float) -> float:
    """Seconds to read or write `count` bytes of memory."""
    return count / (case.gpu.memory_bandwidth * case.gpu.memory_efficiency)


def matmul(case: Case, m: float, n: float, k: float) -> float:
    """Seconds of [m, k] x [k, n] in the compute dtype."""
    gpu = case.gpu
    peak = gpu.peak[case.recipe.training.precision] * gpu.matmul_efficiency
    elements = m * k + k * n + m * n
    return 2.0 * m * n * k / peak + move(case, elements * case.compute_bytes) + gpu.kernel_latency


def linear(case: Case, m: float, n: float, k: float) -> Passes:
    """A linear layer: its output [m, n], its input's gradient [m, k], its weight's gradient [n, k], unless it is frozen
    beneath adapters."""
    trained = case.recipe.lora is None
    return Passes(matmul(case, m, n, k), matmul(case, m, k, n), matmul(case, n, k, m) if trained else 0.0)


def adapter(case: Case, name: str, m: float, n: float, k: float) -> Passes:
    """The adapter of a linear layer of a block, by its part name; what it sends is small, and not counted."""
    lora = case.recipe.lora
    if lora is None or name not in targets(lora):
        return Passes(0.0)
    r = lora.rank
    inner = Passes(matmul(case, m, r, k), matmul(case, m, k, r), matmul(case, r, k, m))
    return inner + Passes(matmul(case, m, n, r), matmul(case, m, r, n), matmul(case, n, r, m))


def attention_core(case: Case, positions: float) -> Passes:
    """softmax(q k^T) v over what each token sees (of causal positions half), all local heads.

    Over context parallelism a rank has its share of the tokens, in pieces that see as much as all do; or all tokens and
    its share of the heads. Documents that begin and end where they will are no longer the same work for every rank;
    that is not counted.

    Args:
        positions: that attention is counted with (`Case.positions`).
    """
    gpu, pieces = case.gpu, piece_count(case.recipe.topology.cp_kind, case.topology.cp) // case.topology.cp
    flops = case.tokens * attention_flops_per_token(case.model, positions) / 2 / case.topology.tp
    peak = gpu.peak[case.recipe.training.precision] * gpu.attention_efficiency
    forward = flops / peak + pieces * gpu.kernel_latency
    return Passes(forward, _ATTENTION_BACKWARD * forward)


def pointwise(case: Case, forward: float, backward: float, kernels: int) -> Passes:
    """Element-wise work that moves so many bytes in `kernels` kernels each way (`tplaunch.kernels.fused`; compiled, it
    is much the same)."""
    latency = kernels * case.gpu.kernel_latency
    return Passes(move(case, forward) + latency, move(case, backward) + latency)


def queries(case: Case) -> Passes:
    """The projection to queries; of latent attention, out of the short vector."""
    latent = case.model.latent
    into = latent.q_rank if latent and latent.q_rank else case.model.hidden_size
    return linear(case, case.tokens, local_heads(case)[0] * head_width(case), into)


def block_parts(case: Case) -> dict[str, Passes]:
    """Each part of a transformer block without experts, at one place of it, on one rank, without communication;
    attention is the mean of all blocks'. What is made again takes its forward pass once more."""
    model, tp, tokens, width = case.model, case.topology.tp, case.tokens, case.compute_bytes
    heads = local_heads(case)[0]
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tp
    states, residual = _states(case), add_residual(case)
    rotary = Passes(0.0)
    if model.position == "rope":  # read and written; values are copied with them
        turned = _queries_and_keys(case) + tokens * local_heads(case)[1] * model.value_dim * width
        rotary += pointwise(case, 2 * turned, 2 * turned, kernels=2)
    if model.qk_norm:
        turned = _queries_and_keys(case)
        rotary += pointwise(case, 2 * turned, 3 * turned, kernels=4)
    kv = local_heads(case)[1] * head_width(case)
    adapters = {
        "qkv": [("wq", heads * head_width(case), hidden), ("wk", kv, hidden), ("wv", kv, hidden)],
        "attention_output": [("wo", hidden, heads * model.value_dim)],
        "gate_up": [*([("gate", ffn, hidden)] if model.gated else []), ("up", ffn, hidden)],
        "down": [("down", hidden, ffn)],
    }
    parts = {
        "norm": pointwise(case, 2 * states, 3 * states, kernels=2),
        "qkv": queries(case) + linear(case, tokens, local_heads(case)[1] * head_width(case), hidden) * 2,
        "rotary": rotary,
        "core_attention": attention_core(case, case.positions()),
        "attention_output": linear(case, tokens, hidden, heads * model.value_dim) + residual,
        "gate_up": linear(case, tokens, ffn, hidden) * (2 if model.gated else 1),
        "activation": activation(case, tokens * ffn * width),
        "down": linear(case, tokens, hidden, ffn) + residual,
    }
    for part, layers in adapters.items():
        for name, n, k in layers:
            parts[part] += adapter(case, name, tokens, n, k)
    return parts


def _states(case: Case) -> float:
    """Bytes of hidden states: a norm reads and writes them, and backward reads them twice and writes once."""
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens * case.model.hidden_size * case.compute_bytes / slices


def add_residual(case: Case) -> Passes:
    """A sum of two streams: two reads and a write."""
    return pointwise(case, 3 * _states(case), 3 * _states(case), kernels=1)


def activation(case: Case, inner: float) -> Passes:
    """The MLP's.

    Args:
        inner: bytes of what it gives.
    """
    reads_and_writes = (3, 5) if case.model.gated else (2, 3)
    return pointwise(case, reads_and_writes[0] * inner, reads_and_writes[1] * inner, kernels=1)


def _queries_and_keys(case: Case) -> float:
    """Bytes of the queries and keys of one microbatch and a rank's heads."""
    return case.tokens * sum(local_heads(case)) * head_width(case) * case.compute_bytes


def head(case: Case) -> Passes:
    """Final norm, output layer and loss. Where weight gradients are added up in place, the forward pass makes those of
    the loss, too, while its logits exist; elsewhere the backward pass computes the logits again."""
    model, tp, tokens = case.model, case.topology.tp, case.tokens
    columns = model.padded_vocab_size // tp
    output = linear(case, tokens, columns, model.hidden_size)
    # Written by the matmul in fp32, read for their sums and for their gradient, which is written in the compute dtype.
    wide = tokens * columns * max(4, case.compute_bytes)
    narrow = tokens * columns * case.compute_bytes
    logits = pointwise(case, 2 * wide - narrow, wide + narrow, kernels=5)
    if case.accumulates_in_place or case.recipe.lora is not None:
        return Passes((output + logits).total)
    return output + logits + Passes(0.0, output.forward)


def embedding(case: Case) -> Passes:
    """Lookup, and the scattered sum of its gradient into a table of zeros."""
    model, width = case.model, case.compute_bytes
    states = case.tokens * model.hidden_size * width
    if case.recipe.lora is not None:
        return Passes(move(case, 2 * states))
    table = model.padded_vocab_size // case.topology.tp * model.hidden_size * width
    return Passes(move(case, 2 * states), 0.0, move(case, 3 * states + table))


def optimizer_seconds(case: Case, pp_ranks: Iterable[int]) -> float:
    """The update of a rank's shard: weights, gradient and two moments read, all but the gradient written; before it,
    the gradient's norm and its scaling; after it, weights in the compute dtype. Muon also has matrices to
    orthogonalise (what it sends is not in here).

    Args:
        pp_ranks: pipeline ranks, of which the slowest counts.
    """
    return max(_update_seconds(case, case.stages_on(rank)) for rank in pp_ranks)


def _update_seconds(case: Case, stages: list[Stage]) -> float:
    width, name = case.storage_bytes, case.recipe.optimizer.name
    kept = sum(case.sharded_weights(stage) for stage in stages)
    gradient, moment = case.gradient_bytes, case.state_bytes
    clipping = 3 * gradient if case.recipe.training.grad_clip else gradient
    seconds = move(case, kept * clipping) + move(case, kept * case.compute_bytes * 2)
    if (ema := case.recipe.training.ema) is not None:  # average and weight read, average written
        seconds += move(case, kept * 3 * width) / ema.every
    if name != "muon":
        return seconds + move(case, kept * (2 * width + gradient + (4 * moment if name == "adamw" else 0)))
    of, gpu = hidden(case, stages), case.gpu
    mine = of.weights + of.expert_weights
    # Of hidden matrices: gradient and momentum are read and written twice, weight and update once.
    seconds += move(case, (kept - mine) * (3 * width + 4 * moment) + mine * (7 * width + 4 * moment))
    return seconds + of.flops / (gpu.peak[case.recipe.training.precision] * gpu.matmul_efficiency)
