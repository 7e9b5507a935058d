"""The work of a layer with experts on one rank, and what it exchanges (`tplaunch.spec.experts`).

Routing is balanced but for `hardware.imbalance`: the experts of the fullest rank get so many times the mean, and all
wait for it.
"""

from __future__ import annotations

from tplaunch.plan.case import Case
from tplaunch.plan.communication import axis_group, collective_seconds
from tplaunch.plan.compute import Passes, activation, add_residual, linear, move, pointwise
from tplaunch.plan.exchange import Exchange, Exchanges
from tplaunch.spec import experts as spec

# Rows that a block of threads multiplies at once (cuBLAS, CUTLASS and Triton take 64 to 256): of the last tile of each
# expert half, in the mean, are none of its rows.
TILE = 128


def tile_efficiency(case: Case) -> float:
    """Share of the rows in a grouped matmul's tiles that are rows."""
    rows = case.expert_rows
    return rows / (rows + case.local_experts * TILE / 2)


def grouped_linear(case: Case, n: int, k: int) -> Passes:
    """A linear layer of each of a rank's experts, from k to n numbers a row: one kernel for all of them."""
    gpu, rows = case.gpu, case.expert_rows
    peak = gpu.peak[case.recipe.training.precision] * gpu.matmul_efficiency
    seconds = 2.0 * rows * n * k / peak / tile_efficiency(case)
    seconds += move(case, (rows * (n + k) + case.local_experts * n * k) * case.compute_bytes) + gpu.kernel_latency
    return Passes(seconds, seconds, seconds)


def grouped_efficiency(case: Case) -> float:
    """What grouped matmuls reach of the speed of large matmuls: less where experts get few rows, or are narrow."""
    moe = case.model.moe
    assert moe is not None
    n, k = moe.ffn_hidden_size // case.topology.expert_tp, case.model.hidden_size
    peak = case.gpu.peak[case.recipe.training.precision] * case.gpu.matmul_efficiency
    return 2.0 * case.expert_rows * n * k / peak / grouped_linear(case, n, k).forward


def expert_parts(case: Case) -> dict[str, Passes]:
    """The parts that a block with experts has in place of the MLP's, without communication."""
    moe, hidden, width = case.model.moe, case.model.hidden_size, case.compute_bytes
    assert moe is not None
    own, rows, ffn = case.own_tokens, case.expert_rows, moe.ffn_hidden_size // case.topology.expert_tp
    sent = own * moe.top_k * hidden * width  # bytes of the rows of a rank's own tokens
    received = rows * hidden * width
    into, out = grouped_linear(case, ffn, hidden), grouped_linear(case, hidden, ffn)
    # Rows are copied in the order of experts; those that come from other ranks once more, if they have several experts.
    sorts = case.topology.ep * case.topology.expert_tp > 1 and case.local_experts > 1
    copied = pointwise(case, 2 * sent, 2 * sent, kernels=2) + pointwise(case, 2 * received, 2 * received, 2) * sorts
    combined = pointwise(case, 2 * sent, 3 * sent, kernels=3)
    parts = {
        "router": _router(case),
        "dispatch": copied,
        "gate_up": into * 2,
        "activation": activation(case, rows * ffn * width),
        "down": out + copied * sorts + combined + add_residual(case),
    }
    shared = shared_parts(case)
    return {name: passes + shared[name] if name in shared else passes for name, passes in parts.items()}


def shared_parts(case: Case) -> dict[str, Passes]:
    """Of these, what is of the shared experts."""
    moe, hidden = case.model.moe, case.model.hidden_size
    if moe is None or moe.shared_ffn_hidden_size is None:
        return {}
    ffn = moe.shared_ffn_hidden_size // case.topology.tp
    return {
        "gate_up": linear(case, case.tokens, ffn, hidden) * 2,
        "activation": activation(case, case.tokens * ffn * case.compute_bytes),
        "down": linear(case, case.tokens, hidden, ffn),
    }


def _router(case: Case) -> Passes:
    """Logits in fp32, which takes the peak of plain fp32; scores and the choice."""
    moe, gpu = case.model.moe, case.gpu
    assert moe is not None
    wide = "fp64" if case.recipe.training.precision == "fp64" else "fp32"
    size = max(4, case.compute_bytes)
    own, hidden, experts = case.own_tokens, case.model.hidden_size, moe.experts
    once = 2.0 * own * hidden * experts / (gpu.peak[wide] * gpu.matmul_efficiency)
    once += move(case, size * (own * (hidden + experts) + hidden * experts)) + gpu.kernel_latency
    widened = own * hidden * (size + case.compute_bytes)
    chosen = pointwise(case, widened + 6 * size * own * experts, widened + 4 * size * own * experts, kernels=12)
    return Passes(once, once, once) + chosen


def expert_traffic(case: Case) -> Exchanges:
    """The exchanges of a block with experts. Shared experts run beside the way of the rows to their experts and back;
    nothing hides the rest."""
    moe, topology, training = case.model.moe, case.topology, case.recipe.training
    if moe is None:
        return Exchanges()
    found = []
    shared = sum((passes for passes in shared_parts(case).values()), Passes(0.0))
    left = [shared.forward, shared.total - shared.forward]
    for one in spec.exchanges(
        tokens=case.own_tokens,
        sequences=training.micro_batch_size,
        hidden=case.model.hidden_size,
        experts=moe.experts,
        top_k=moe.top_k,
        ep=topology.ep,
        expert_tp=topology.expert_tp,
        tp=topology.tp,
        cp=topology.cp,
        sequence_parallel=case.sequence_parallel,
        counts_sequences=moe.aux_loss > 0,
        element=case.compute_bytes,
    ):
        group = axis_group(case, one.axis)
        fullest = case.imbalance if one.what in ("rows", "weights") else 1.0
        seconds = collective_seconds(case, group, one.kind, one.bytes * fullest)
        hidden = 0.0, 0.0
        if one.what == "rows":
            hidden = min(one.forward * seconds, left[0]), min(one.backward * seconds, left[1])
            left = [left[0] - hidden[0], left[1] - hidden[1]]
        found.append(
            Exchange(
                one.axis,
                group,
                _SAID[one.what],
                one.kind,
                one.bytes,
                seconds,
                one.forward,
                one.backward,
                hidden,
                "dispatched" if one.again else None,
                one.again,
            )
        )
    return Exchanges(tuple(found))


_SAID = {
    "rows": "tokens to experts and back",
    "weights": "the router's weights",
    "counts": "tokens of each expert",
    "load": "load of each expert",
    "tokens": "tokens from experts",
}


def bytes_by_link(case: Case, size: float) -> tuple[float, float]:
    """Of an all-to-all over ep of so many bytes of a rank: what goes to other ranks of its node, and to other nodes."""
    group = axis_group(case, "ep")
    on_node = group.size / group.nodes
    return (on_node - 1) / group.size * size, (group.size - on_node) / group.size * size
