"""Bytes that come and go in a backward pass: temporaries at its fullest moments, and what its first half keeps for
the second where a schedule splits it (Qi et al. 2023, arXiv 2401.10241).
"""

from __future__ import annotations

from tplaunch.plan.activations import (
    adapter_activations,
    block_tensors,
    exchanges_heads,
    gathered_keys,
    head_width,
    hidden_bytes,
    latent_bytes,
    local_heads,
    projected_bytes,
    turned_bytes,
)
from tplaunch.plan.case import Block, Case, Stage
from tplaunch.recipe.schema import Part
from tplaunch.spec.lora import targets
from tplaunch.spec.recompute import block_steps, kept


def loss_working(case: Case) -> float:
    """Temporaries of the loss as its gradients are made, at their fullest: while a chunk's part is summed into the
    output matrix's gradient (the gradient of its logits, in fp32 and the compute dtype), or while the next chunk's
    logits are computed beside those of the last; and the gradient of the whole sequence's hidden states."""
    model, training, width = case.model, case.recipe.training, case.compute_bytes
    fp32 = max(4, width)
    lowered = width if width < fp32 else 0  # a copy in a compute dtype below fp32
    columns = model.padded_vocab_size // case.topology.tp
    matrix = columns * model.hidden_size
    logits = min(training.loss_chunk, case.tokens) * columns
    own = 0 if case.accumulates_in_place else fp32  # of each number of the gradient, until it is handed over
    product = 0 if case.accumulates_in_place and case.gradient_bytes == width else width
    if case.recipe.lora is not None:  # the output matrix is frozen
        own = product = 0
    summing = logits * (fp32 + lowered) + matrix * (own + product)
    following = logits * 2 * (fp32 + lowered) + matrix * own if case.tokens > training.loss_chunk else 0
    return max(summing, following) + case.tokens * model.hidden_size * width


def block_working(case: Case, parts: frozenset[Part], *, experts: bool = False) -> float:
    """Temporaries of a block's backward pass at its fullest, less what was kept and is used up by then.

    Args:
        parts: what is made again.
        experts: of a block that has them.
    """
    block = Block(experts, parts)
    return max(_expert_working(case, block) if experts else _mlp_working(case, block), _gathered_working(case, block))


def _gathered_working(case: Case, block: Block) -> float:
    """In the backward pass of attention over context parallelism: gathered keys and values, their gradients, these as
    they are sent and as they come; the gradients of queries and of the hidden states."""
    if case.topology.cp == 1 or exchanges_heads(case):
        return 0.0
    tensors = block_tensors(case, experts=block.experts)
    stays = kept(case.model, block.again, experts=block.experts).kept
    inside = ("routing", "dispatched", "inside", "activated", "shared_inside", "shared_activated")
    gone = ("attended", "softmax", "middle", "middle_normed", *inside)
    queries = case.tokens * local_heads(case)[0] * head_width(case) * case.compute_bytes
    used_up = sum(tensors[name] for name in gone if name in stays)
    (attention,) = (s for s in block_steps(case.model, experts=block.experts) if s.part == "core_attention")
    again = _made_again(case, block, *attention.needs)
    return 4 * gathered_keys(case) + queries + hidden_bytes(case) + again - used_up


def _made_again(case: Case, block: Block, *names: str) -> float:
    """Bytes of what is made again until some tensors are there, and its own users await."""
    tensors, experts = block_tensors(case, experts=block.experts), block.experts
    awaited = {name for step in block_steps(case.model, experts=experts) for name in step.needs}
    made = kept(case.model, block.again, frozenset(names), experts=experts).made
    return sum(tensors[name] for step in made for name in step.gives if name in awaited)


def _mlp_working(case: Case, block: Block) -> float:
    """In the MLP: gradients of its inside; the down projection's gradient, where no matmul adds it to the sum by
    itself; the hidden states' gradient, whole and as a slice; what was made again by then, and its own users await."""
    model, tp, width = case.model, case.topology.tp, case.compute_bytes
    ffn = model.ffn_hidden_size // tp
    inside = case.tokens * ffn * (2 if model.gated else 1)
    whole = case.tokens * model.hidden_size
    tensors = block_tensors(case)
    # In the backward pass of the activation, or of the first projections, when what these needed is gone.
    gone = sum(tensors[name] for name in ("inside", "activated") if name in kept(model, block.again).kept)
    (first,) = (step.needs[0] for step in block_steps(model) if step.part == "gate_up")
    again = max(_made_again(case, block, "inside", "activated"), _made_again(case, block, first) - gone)
    return (inside + whole) * width + _matrix_gradient(case) + hidden_bytes(case) + again


def _matrix_gradient(case: Case, *, experts: bool = False) -> float:
    """The gradient of a matrix of the MLP, or of all experts, by itself, where no matmul adds it to the sum."""
    width = case.compute_bytes
    if case.recipe.lora is not None or (case.accumulates_in_place and case.gradient_bytes == width):
        return 0.0
    if experts:
        return case.block_expert_weights() / 3 * width
    return case.model.ffn_hidden_size // case.topology.tp * case.model.hidden_size * width


def _expert_working(case: Case, block: Block) -> float:
    """In the experts, at the fullest of four moments: gradients of rows come and are put in order; the last matmul's
    gradients are made; the activation's; the first matmuls'. With them are the gradient of the hidden states, that of
    what shared experts read, and what was made again by then."""
    moe = case.model.moe
    assert moe is not None
    tensors, expert_tp = block_tensors(case, experts=True), case.topology.expert_tp
    rows, activated = tensors["dispatched"], tensors["activated"]
    sorted_once_more = case.topology.ep * expert_tp > 1 and case.local_experts > 1
    coming = rows * (1 + sorted_once_more) + (rows * (1 + 1 / expert_tp) if expert_tp > 1 else 0.0)
    product = _matrix_gradient(case, experts=True)  # of which two wait until they are handed over
    waiting = product if case.accumulates_in_place else 2 * product
    again = _made_again(case, block, "dispatched", "inside", "activated")
    last, between = rows + activated + product, 3 * activated
    first = rows + waiting - (activated if case.recipe.lora is None else 0.0)  # of frozen experts it is not kept
    beside = hidden_bytes(case) * (1 + (moe.shared_ffn_hidden_size is not None))
    return max(coming, again + max(last, between, first)) + beside


def split_backward_waiting(case: Case, stage: Stage) -> float:
    """Bytes that one microbatch keeps between the two halves of its backward pass: the gradients of what has trained
    weights. On the first stage torch leaves all to the second half."""
    if stage.first:
        return 0.0
    head = hidden_bytes(case) if stage.last and case.recipe.lora is None else 0.0
    return head + sum(number * _block_waiting(case, block) for block, number in case.blocks(stage).items())


def _block_waiting(case: Case, block: Block) -> float:
    """The same of a block: gradients of the outputs of linear layers, and of norms; beneath adapters of layers that
    have some, and of what these are multiplied by first."""
    model, lora, moe = case.model, case.recipe.lora, case.model.moe
    tensors = block_tensors(case, experts=block.experts)
    hidden, inside, down = hidden_bytes(case), tensors["inside"], 1
    if moe is not None and block.experts:
        inside, down = tensors["shared_inside"], int(moe.shared_ffn_hidden_size is not None)
    if lora is not None:
        names = {*targets(lora)}
        total = projected_bytes(case) * (model.latent is None and bool({"wq", "wk", "wv"} & names))
        total += hidden * (("wo" in names) + down * ("down" in names)) + inside * bool({"gate", "up"} & names)
        return total + adapter_activations(case, experts=block.experts)
    norms = hidden * 2 * (model.pre_norms + model.post_norms) + tensors["latent_normed"]
    if model.qk_norm:
        norms += turned_bytes(case)
    total = projected_bytes(case) + latent_bytes(case) + hidden * (1 + down) + inside + norms
    if moe is not None and block.experts:
        total += case.own_tokens * moe.experts * max(4, case.compute_bytes) + tensors["dispatched"] + tensors["inside"]
    return total


def split_backward_working(case: Case, stages: list[Stage]) -> float:
    """Temporaries of a backward pass in two halves, beside all that waits for the second, at their fullest: in a
    block's MLP, where its own waiting gradients are among them; in its attention; while the second half adds up the
    gradients of the MLP's first matrices."""
    fullest = 0.0
    for block in {block for stage in stages if not stage.first for block in case.blocks(stage)}:
        tensors, matrix = block_tensors(case, experts=block.experts), _matrix_gradient(case, experts=block.experts)
        mlp = block_working(case, block.again, experts=block.experts) - matrix - _block_waiting(case, block)
        attention = turned_bytes(case) + hidden_bytes(case) + _made_again(case, block, "turned", "attended")
        second = max(matrix, (1 + case.model.gated) * matrix - tensors["activated"])
        fullest = max(fullest, mlp, attention, second)
    return fullest
