"""The Triton kernels of `tplaunch.kernels.fused`, which says what they do; imported where a GPU runs them.

Rows are counted in 64 bits: a microbatch's activations can have more than 2^31 elements.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

SWIGLU, GEGLU, CLAMPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _bounded(gate, up, KIND: tl.constexpr):
    if KIND == CLAMPED:
        return tl.minimum(gate, 7.0), tl.minimum(tl.maximum(up, -7.0), 7.0) + 1
    else:  # noqa: RET505 (a compiler's branch: both sides are the function's end)
        return gate, up


@triton.jit
def _slope(gate, KIND: tl.constexpr):
    """What the sigmoid reads of act(gate) = gate * sigmoid(slope), and its derivative by gate."""
    if KIND == SWIGLU:
        return gate, 1.0 + 0.0 * gate
    elif KIND == CLAMPED:  # noqa: RET505
        return 1.702 * gate, 1.702 + 0.0 * gate
    else:
        cubic: tl.constexpr = 0.044715
        scale: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
        return scale * gate * (1 + cubic * gate * gate), scale * (1 + 3 * cubic * gate * gate)


@triton.jit
def gated(gates, ups, weights, out, step, width, KIND: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gates + row * step + columns, inside, 0.0).to(tl.float32)
    up = tl.load(ups + row * step + columns, inside, 0.0).to(tl.float32)
    gate, up = _bounded(gate, up, KIND)
    slope, _ = _slope(gate, KIND)
    made = gate * tl.sigmoid(slope) * up
    if WEIGHED:
        made *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * width + columns, made.to(out.dtype.element_ty), inside)


@triton.jit
def gated_backward(
    gates, ups, weights, grads, by_gates, by_ups, by_weights, step, by_step, width,
    KIND: tl.constexpr, WEIGHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    weight = 1.0
    if WEIGHED:
        weight = tl.load(weights + row).to(tl.float32)
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < width
        gate_there = tl.load(gates + row * step + columns, inside, 0.0).to(tl.float32)
        up_there = tl.load(ups + row * step + columns, inside, 0.0).to(tl.float32)
        grad = tl.load(grads + row * width + columns, inside, 0.0).to(tl.float32)
        gate, up = _bounded(gate_there, up_there, KIND)
        slope, steepness = _slope(gate, KIND)
        share = tl.sigmoid(slope)
        total += grad * up * gate * share
        by_gate = grad * weight * up * share * (1 + gate * (1 - share) * steepness)
        by_up = grad * weight * gate * share
        if KIND == CLAMPED:
            by_gate = tl.where(gate_there > 7.0, 0.0, by_gate)
            by_up = tl.where(tl.abs(up_there) > 7.0, 0.0, by_up)
        tl.store(by_gates + row * by_step + columns, by_gate.to(by_gates.dtype.element_ty), inside)
        tl.store(by_ups + row * by_step + columns, by_up.to(by_ups.dtype.element_ty), inside)
    if WEIGHED:
        tl.store(by_weights + row, tl.sum(total, 0).to(by_weights.dtype.element_ty))


@triton.jit
def rotate(
    x,
    out,
    table,
    x_row,
    x_sample,
    x_head,
    out_row,
    out_sample,
    out_head,
    sine,
    table_row,
    table_sample,
    batch,
    heads,
    turned,
    sign,
    HEAD: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, sample = token // batch, token % batch
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    inside = (head < heads) & (channel < HALF)
    angle = table + row * table_row + sample * table_sample + channel
    turns = head < turned
    cos = tl.where(turns, tl.load(angle, channel < HALF, 1.0).to(tl.float32), 1.0)
    sin = tl.where(turns, sign * tl.load(angle + sine, channel < HALF, 0.0).to(tl.float32), 0.0)
    source = x + row * x_row + sample * x_sample + head * x_head + channel
    target = out + row * out_row + sample * out_sample + head * out_head + channel
    low = tl.load(source, inside, 0.0).to(tl.float32)
    high = tl.load(source + HALF, inside, 0.0).to(tl.float32)
    tl.store(target, (low * cos - high * sin).to(out.dtype.element_ty), inside)
    tl.store(target + HALF, (high * cos + low * sin).to(out.dtype.element_ty), inside)
    if REST > 0:
        further = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < heads) & (further < HEAD)
        rest = tl.load(x + row * x_row + sample * x_sample + head * x_head + further, inside, 0.0)
        tl.store(out + row * out_row + sample * out_sample + head * out_head + further, rest, inside)


@triton.jit
def _capped(logits, cap, CAPPED: tl.constexpr):
    """Logits under a soft cap, and their derivative."""
    if CAPPED:
        tanh = 2 * tl.sigmoid(2 * logits / cap) - 1
        return cap * tanh, 1 - tanh * tanh
    else:  # noqa: RET505
        return logits, 1.0 + 0.0 * logits


@triton.jit
def measure_logits(
    logits, labels, tops, sums, targets, step, real, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    tops_so_far = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)
    sums_so_far = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, real, BLOCK):  # each place of the block has its own maximum and sum
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < real
        found, _ = _capped(tl.load(logits + token * step + columns, inside, 0.0), cap, CAPPED)
        higher = tl.maximum(tops_so_far, tl.where(inside, found, -3.4028234663852886e38))
        sums_so_far = sums_so_far * tl.exp(tops_so_far - higher) + tl.where(inside, tl.exp(found - higher), 0.0)
        tops_so_far = higher
    top = tl.max(tops_so_far, 0)
    here = (label >= 0) & (label < real)
    target, _ = _capped(tl.load(logits + token * step + tl.where(here, label, 0), here, 0.0), cap, CAPPED)
    tl.store(tops + token, top)
    tl.store(sums + token, tl.sum(sums_so_far * tl.exp(tops_so_far - top), 0))
    tl.store(targets + token, tl.where(here, target, 0.0))


@triton.jit
def logit_gradient(
    logits, labels, log_zs, factors, counts, out, step, width, real, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found, slope = _capped(tl.load(logits + token * step + columns, columns < real, 0.0), cap, CAPPED)
    gradient = tl.exp(found - tl.load(log_zs + token)) * tl.load(factors + token)
    gradient -= tl.where(columns == tl.load(labels + token), tl.load(counts + token), 0.0)
    gradient = tl.where(columns < real, gradient * slope, 0.0)
    tl.store(out + token * width + columns, gradient.to(out.dtype.element_ty), columns < width)
