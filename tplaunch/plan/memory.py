"""Bytes that a rank holds at the peak of a step, term by term.

Each function is one term, so that one can be corrected by measurement. What is kept follows the trainer: flat buffers
of weights and gradients, or FSDP2 with its gathering and reduction where ZeRO 2 or 3 shards gradients; activations as
in Korthikanti et al. 2022 (arXiv 2205.05198) with FlashAttention, which keeps no s x s matrix; messages between
pipeline stages from their receive to their last use.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

from tplaunch.plan.case import Block, Case, Stage
from tplaunch.plan.muon import hidden, update_bytes
from tplaunch.plan.schedule import Step
from tplaunch.recipe.schema import Experts, Lora, Part
from tplaunch.spec.lora import is_target, targets
from tplaunch.spec.messages import messages_held
from tplaunch.spec.recompute import block_steps, chosen, kept
from tplaunch.units import MiB


class Memory(NamedTuple):
    """Bytes of one rank at the peak of its step.

    Args:
        weights: the master weights that are kept, this rank's shard.
        gathered_weights: weights in the compute dtype that the step works on, apart from the master weights.
        gradients: what is accumulated over microbatches; in flat buffers they never go away.
        optimizer: its state, and averaged weights.
        activations: what the microbatches in flight keep for their backward passes.
        loss: logits of a chunk, and the gradients of the head.
        working: temporaries of the block at work: recomputed insides, gradients, gathered sequences.
        data_parallel_buffers: all-gather and reduce-scatter buffers of FSDP2; flat buffers need none.
        pipeline_buffers: what has come from other pipeline stages, or is on its way to them.
        overhead: CUDA context, communicators, workspaces, fragmentation: outside what torch counts as allocated.
    """

    weights: float
    gathered_weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    working: float
    data_parallel_buffers: float
    pipeline_buffers: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated counts."""
        return self.total - self.overhead


def hidden_bytes(case: Case) -> float:
    """Bytes of one microbatch's hidden states between blocks: [s (s/tp with sequence parallelism), b, h]."""
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens * case.model.hidden_size * case.compute_bytes / slices


def block_tensors(case: Case, *, experts: bool = False) -> dict[str, float]:
    """Bytes of a block's tensors for one microbatch, by their names in `tplaunch.spec.recompute`.

    Args:
        experts: of a block that has them.
    """
    key = "block_tensors", experts
    if key not in case.known:
        case.known[key] = {**_tensors(case), **(_expert_tensors(case) if experts else {})}
    found: dict[str, float] = case.known[key]
    return found


def _tensors(case: Case) -> dict[str, float]:
    """Of a block without experts."""
    model, tp, tokens, width = case.model, case.topology.tp, case.tokens, case.compute_bytes
    hidden = hidden_bytes(case)
    ffn = tokens * (model.ffn_hidden_size // tp) * width
    projected, turned = projected_bytes(case), turned_bytes(case)
    if exchanges_heads(case):  # then what attention keeps is what it was given
        turned = exchanged_bytes(case)
        projected = projected if model.qk_norm or model.position == "rope" else turned
    return {
        "input": hidden,
        "normed": hidden,
        "queries": case.tokens * local_heads(case)[0] * head_width(case) * width,
        "latent": latent_bytes(case),
        "latent_normed": latent_bytes(case),
        "projected": projected,
        "turned": turned,
        "attended": attended_bytes(case) * (2 if exchanges_heads(case) else 1),  # kept before and after its exchange
        "softmax": tokens * local_heads(case)[0] * max(4, width),
        "attention_made": hidden,
        "middle": hidden,
        "middle_normed": hidden,
        "inside": (2 if model.gated else 1) * ffn,
        "activated": ffn,
        "mlp_made": hidden,
    }


def _expert_tensors(case: Case) -> dict[str, float]:
    """Of them those that a block with experts has in place of the MLP's."""
    moe, width = case.model.moe, case.compute_bytes
    assert moe is not None
    row = moe.ffn_hidden_size // case.topology.expert_tp * width
    shared = case.tokens * ((moe.shared_ffn_hidden_size or 0) // case.topology.tp) * width
    return {
        "routing": _routing(case, moe),
        "dispatched": case.expert_rows * case.model.hidden_size * width,
        "inside": case.expert_rows * 2 * row,
        "activated": case.expert_rows * row,
        "shared_inside": 2 * shared,
        "shared_activated": shared,
    }


def _routing(case: Case, moe: Experts) -> float:
    """Bytes of what the router keeps: scores, the weights that are made of them, and where each row goes (int64)."""
    wide, own, rows = max(4, case.compute_bytes), case.own_tokens, case.own_tokens * moe.top_k
    numbers = own * moe.experts + case.expert_rows + (rows + own) * moe.normalize
    numbers += own * (moe.experts + 1) * (moe.z_loss > 0)
    places: float = 4 * rows + moe.experts
    if case.topology.ep * case.topology.expert_tp > 1:  # those that come from other ranks are sorted once more
        places += case.local_experts + (2 * case.expert_rows if case.local_experts > 1 else 0)
    return wide * numbers + 8 * places


def block_activations(case: Case, parts: frozenset[Part] = frozenset(), *, experts: bool = False) -> float:
    """Bytes that one block keeps for its backward pass, for one microbatch: tensors, and the statistics of norms, which
    are fp32 numbers for each token, and for each head where heads have norms of their own.

    Args:
        parts: what it makes again.
        experts: of a block that has them.
    """
    tensors = block_tensors(case, experts=experts)
    statistics = 2 * (case.model.pre_norms + case.model.post_norms) * norm_statistics(case) + head_statistics(case)
    names = kept(case.model, parts, experts=experts).kept - _of_frozen_alone(case, experts=experts)
    return sum(tensors[name] for name in names) + statistics + adapter_activations(case, experts=experts)


def _of_frozen_alone(case: Case, *, experts: bool) -> set[str]:
    """Names of a block's tensors that only the gradients of matrices would need, none of which is trained."""
    lora = case.recipe.lora
    if lora is None:
        return set()
    names, found = {*targets(lora)}, set()
    if case.model.latent is not None:  # its projections get no adapters
        found |= {"normed", "latent_normed"} if case.model.pre_norms else {"latent_normed"}
    elif case.model.pre_norms and not {"wq", "wk", "wv"} & names:
        found.add("normed")
    if experts:
        found |= {"dispatched", "activated"}
        shared = case.model.moe is not None and case.model.moe.shared_ffn_hidden_size is not None
        if not shared or "down" not in names:
            found.add("shared_activated")
        return found if shared and {"gate", "up"} & names else found | {"middle_normed"}
    if case.model.pre_norms and not {"gate", "up"} & names:
        found.add("middle_normed")
    return found if "down" in names else found | {"activated"}


def adapter_activations(case: Case, *, experts: bool = False) -> float:
    """Bytes that the adapters of a block keep of one microbatch: x A^T, as B reads it."""
    lora = case.recipe.lora
    if lora is None:
        return 0.0
    own = case.tokens / (case.topology.tp if case.sequence_parallel else 1)
    total, parts = 0.0, {p.name.split(".")[-2]: p for p in case.block_parameters(experts=experts) if is_target(lora, p)}
    for parameter in parts.values():
        total += lora.rank * (case.tokens if parameter.tp_dim == 0 else own)
    return total * case.compute_bytes


def local_heads(case: Case) -> tuple[int, int]:
    """Query heads and key/value heads of one rank."""
    model, tp = case.model, case.topology.tp
    assert model.num_kv_heads is not None
    return model.num_heads // tp, max(1, model.num_kv_heads // tp)


def head_width(case: Case) -> int:
    """Numbers of a token's query, or key, in one head."""
    assert case.model.head_dim is not None
    return case.model.head_dim


def projected_bytes(case: Case) -> float:
    """Bytes of queries, keys and values of one microbatch and a rank's heads, as they are projected; of latent
    attention those that are made of narrow vectors."""
    (heads, kv_heads), latent = local_heads(case), case.model.latent
    numbers = (heads + 2 * kv_heads) * head_width(case)
    if latent is not None:
        numbers = heads * (latent.nope_dim + latent.value_dim) + latent.rope_dim
        numbers += heads * head_width(case) if latent.q_rank is not None else 0
    return case.tokens * numbers * case.compute_bytes


def latent_bytes(case: Case) -> float:
    """Bytes of latent attention's narrow vectors of one microbatch that a rank makes; 0 without it."""
    latent = case.model.latent
    if latent is None:
        return 0.0
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens / slices * ((latent.q_rank or 0) + latent.kv_rank + latent.rope_dim) * case.compute_bytes


def turned_bytes(case: Case) -> float:
    """The same as they are turned; where heads have norms of their own, without values, which stay as projected."""
    heads, kv_heads = local_heads(case)
    values = 0 if case.model.qk_norm else kv_heads * case.model.value_dim
    return case.tokens * ((heads + kv_heads) * head_width(case) + values) * case.compute_bytes


def attended_bytes(case: Case) -> float:
    """Bytes of what attention gives for one microbatch and a rank's heads."""
    return case.tokens * local_heads(case)[0] * case.model.value_dim * case.compute_bytes


def exchanges_heads(case: Case) -> bool:
    """Whether context parallelism exchanges heads for tokens."""
    return case.topology.cp > 1 and case.recipe.topology.cp_kind == "ulysses"


def exchanged_bytes(case: Case) -> float:
    """Bytes of the heads of queries, keys and values that a rank gives for tokens: Ulysses repeats keys and values
    until each of cp ranks gets as many."""
    heads, kv_heads = local_heads(case)
    width, repeated = head_width(case), lcm(kv_heads, case.topology.cp)
    return case.tokens * (heads * width + repeated * (width + case.model.value_dim)) * case.compute_bytes


def gathered_keys(case: Case) -> float:
    """Bytes of the keys and values of whole sequences, of one microbatch and a rank's heads."""
    width = (head_width(case) + case.model.value_dim) * case.compute_bytes
    return case.tokens * case.topology.cp * local_heads(case)[1] * width


def norm_statistics(case: Case) -> float:
    """Bytes of one norm's saved statistics: 1/rms, or mean and 1/std, of each token."""
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens / slices * max(4, case.compute_bytes) * (1 if case.model.norm == "rmsnorm" else 2)


def head_statistics(case: Case) -> float:
    """Bytes of the saved statistics of a block's norms of heads, or of latents."""
    total, wide = 0.0, max(4, case.compute_bytes)
    if case.model.qk_norm:
        numbers = 2 if case.model.qk_norm_all_heads else sum(local_heads(case))
        total += case.tokens * numbers * wide
    if latent := case.model.latent:
        own = case.tokens // case.topology.tp if case.sequence_parallel else case.tokens
        total += own * (1 if latent.q_rank is None else 2) * wide
    return total


def head_activations(case: Case) -> float:
    """Bytes that the final norm and the loss keep: their input, the whole sequence's normed states, labels, log Z."""
    gathered = case.tokens * case.model.hidden_size * case.compute_bytes
    return hidden_bytes(case) + norm_statistics(case) + gathered + case.tokens * (8 + max(4, case.compute_bytes))


def embedding_activations(case: Case) -> float:
    """Bytes that the embedding keeps: token numbers and, over tp, which of them are another rank's."""
    return case.tokens * (8 if case.topology.tp == 1 else 9)


def documents(case: Case) -> float:
    """Bytes of where each token's document begins, in whole sequences, and of a microbatch's own rotary table, where
    documents are kept apart. No mask of all pairs is ever made."""
    if not case.recipe.training.document_mask:
        return 0.0
    rope = 2 * case.model.rotary_dim * max(4, case.compute_bytes) if case.model.position == "rope" else 0
    return case.tokens * (8 * case.topology.cp + rope)


def stage_activations(case: Case, stage: Stage) -> float:
    """Bytes that one microbatch keeps in a stage from its forward to its backward pass."""
    total = documents(case)
    total += sum(n * block_activations(case, b.again, experts=b.experts) for b, n in case.blocks(stage).items())
    if stage.first and case.recipe.lora is None:
        total += embedding_activations(case)
    if stage.first and case.recipe.lora is not None and stage.layers:
        total -= _before_adapters(case, case.recipe.lora, stage.layers[0])
    if stage.last:
        total += head_activations(case)
    return total


def _before_adapters(case: Case, lora: Lora, layer: int) -> float:
    """Bytes of `block_activations` that the model's first block does not keep: nobody needs the gradients of what is
    computed before its first adapter."""
    experts, names = case.model.has_experts(layer), {*targets(lora)}
    norm = norm_statistics(case)
    gone, statistics = {"input"} if case.model.pre_norms else set(), norm * case.model.pre_norms
    if case.model.latent is not None or not {"wq", "wk", "wv"} & names:
        gone |= {"input", "normed", "queries", "latent", "latent_normed", "projected", "turned", "softmax"}
        statistics += head_statistics(case)
        if "wo" not in names:
            gone |= {"attended", "attention_made", "middle"}
            statistics += norm * (case.model.pre_norms + case.model.post_norms)
    stays = kept(case.model, chosen(case.recipe.training, layer), experts=experts).kept - _of_frozen_alone(
        case, experts=experts
    )
    tensors = block_tensors(case, experts=experts)
    return statistics + sum(tensors[name] for name in gone & stays)


def weights(case: Case, stages: list[Stage]) -> float:
    """The kept weights of a rank: trained ones in the storage dtype; frozen ones in the compute dtype, whole in flat
    buffers."""
    frozen = sum(case.frozen_weights(stage, sharded=not case.flat) for stage in stages)
    return _master_weights(case, stages) + frozen * case.compute_bytes


def _master_weights(case: Case, stages: list[Stage]) -> float:
    """Of these the trained ones."""
    return sum(case.sharded_weights(stage) for stage in stages) * case.storage_bytes


def gathered_weights(case: Case, stages: list[Stage]) -> float:
    """Weights in the compute dtype: all of the rank's, or with ZeRO 3 those outside blocks and the block at work.

    In flat buffers of one dtype the master weights are part of them. FSDP2 makes a copy even where there is nothing to
    gather or to convert.
    """
    if case.flat:  # frozen weights are none of the master weights
        whole = sum(case.weights(stage) for stage in stages) * case.compute_bytes
        return whole - _master_weights(case, stages) if case.storage_bytes == case.compute_bytes else whole
    if case.zero < 3:
        return sum(case.weights(stage) + case.frozen_weights(stage) for stage in stages) * case.compute_bytes
    at_work = max((_unit_weights(case, block.experts, all=True) for block in _kinds(case, stages)), default=0)
    ends = sum(case.end_weights(stage, frozen=frozen) for stage in stages for frozen in (False, True))
    return (ends + at_work) * case.compute_bytes


def gradients(case: Case, stages: list[Stage]) -> float:
    """Gradients at their largest: whole in flat buffers, else shards."""
    count = sum(case.weights(s) if case.flat else case.sharded_weights(s) for s in stages)
    return count * case.gradient_bytes


def optimizer_state(case: Case, stages: list[Stage]) -> float:
    """AdamW's two moments, SGD's momentum, Muon's of hidden matrices; and the averages of trained weights."""
    optimizer = case.recipe.optimizer
    updated = sum(case.sharded_weights(stage) for stage in stages)
    averages = _master_weights(case, stages) if case.recipe.training.ema is not None else 0.0
    if optimizer.name == "muon":
        of = hidden(case, stages)
        return averages + (2 * updated - of.weights - of.expert_weights) * case.state_bytes
    copies = 2 if optimizer.name == "adamw" else 1 if optimizer.momentum else 0
    return averages + copies * updated * case.state_bytes


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
    return (inside + whole) * width + _product(case) + hidden_bytes(case) + again


def _product(case: Case) -> float:
    """The gradient of a matrix of the MLP by itself, where no matmul adds it to the sum."""
    in_place = case.accumulates_in_place and case.gradient_bytes == case.compute_bytes
    matrix = case.model.ffn_hidden_size // case.topology.tp * case.model.hidden_size * case.compute_bytes
    return 0.0 if in_place or case.recipe.lora is not None else matrix


def _expert_working(case: Case, block: Block) -> float:
    """In the experts, at the fullest of four moments: gradients of rows come and are put in order; the last matmul's
    gradients are made; the activation's; the first matmuls'. With them are the gradient of the hidden states, that of
    what shared experts read, and what was made again by then."""
    moe, width = case.model.moe, case.compute_bytes
    assert moe is not None
    tensors, expert_tp = block_tensors(case, experts=True), case.topology.expert_tp
    rows, activated = tensors["dispatched"], tensors["activated"]
    sorted_once_more = case.topology.ep * expert_tp > 1 and case.local_experts > 1
    coming = rows * (1 + sorted_once_more) + (rows * (1 + 1 / expert_tp) if expert_tp > 1 else 0.0)
    # A matrix's gradient, where no matmul adds it to the sum by itself; else two wait until they are handed over.
    in_place = case.accumulates_in_place and case.gradient_bytes == width
    product = 0.0 if in_place else case.block_expert_weights() / 3 * width
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
        norms += case.tokens * sum(local_heads(case)) * head_width(case) * case.compute_bytes
    total = projected_bytes(case) + latent_bytes(case) + hidden * (1 + down) + inside + norms
    if moe is not None and block.experts:
        total += case.own_tokens * moe.experts * max(4, case.compute_bytes) + tensors["dispatched"] + tensors["inside"]
    return total


def _split_working(case: Case, stages: list[Stage]) -> float:
    """Temporaries of a backward pass in two halves, beside all that waits for the second, at their fullest: in a
    block's MLP, where its own waiting gradients are among them; in its attention; while the second half adds up the
    gradients of the MLP's first matrices."""
    fullest = 0.0
    for block in {block for stage in stages if not stage.first for block in case.blocks(stage)}:
        tensors = block_tensors(case, experts=block.experts)
        mlp = block_working(case, block.again, experts=block.experts) - _product(case) - _block_waiting(case, block)
        attention = turned_bytes(case) + hidden_bytes(case) + _made_again(case, block, "turned", "attended")
        second = max(_product(case), (1 + case.model.gated) * _product(case) - tensors["activated"])
        fullest = max(fullest, mlp, attention, second)
    return fullest


def reducing(case: Case, unit: float) -> float:
    """FSDP2's buffers while it reduces the gradients of a unit of so many weights: the unit's gradients as computed,
    the reduce-scatter's input and its output. With a single microbatch the output is the gradient that stays."""
    width = case.reduced_bytes
    stays = case.microbatches == 1 and case.topology.pp == 1 and width == case.storage_bytes
    return unit * (width + (0.0 if stays else width / case.shards) + case.compute_bytes)


def gathering(case: Case) -> float:
    """With ZeRO 3, the next block's weights on their way. With ZeRO 2 those of the last block, as they came, which
    FSDP2 keeps until it gathers others: where gradients are reduced in as large buffers later, no peak is there."""
    if case.flat or (case.zero < 3 and case.recipe.lora is None):
        return 0.0
    return max(_unit_weights(case, experts, all=True) for experts in case.kinds) * case.compute_bytes


def _unit_weights(case: Case, experts: bool, *, all: bool = False) -> int:
    """Trained weights of a block, whose gradients are reduced together; or all, which are gathered together."""
    count = case.block_weights(experts=experts) + (case.block_expert_weights() if experts else 0)
    if all:
        count += case.block_weights(experts=experts, frozen=True)
        count += case.block_expert_weights(frozen=True) if experts else 0
    return count


def _kinds(case: Case, stages: list[Stage]) -> set[Block]:
    return {block for stage in stages for block in case.blocks(stage)}


def pipeline_buffers(case: Case, pp_rank: int) -> float:
    """What passes between stages, apart from the inputs of microbatches in flight (`stage_activations`): inputs that
    have come early, gradients that a backward pass waits for or begins with, what is being sent."""
    if case.topology.pp == 1:
        return 0.0
    held = messages_held(case.schedule, case.topology.pp, case.virtual_stages, case.microbatches)
    return held[pp_rank] * hidden_bytes(case)


# NCCL's and cuBLAS's shares, of the order that `nvidia-smi` shows above torch's own reserve on A100 and H100.
_CONTEXT = 600 * MiB  # CUDA context with the kernels of torch and cuBLAS
_WORKSPACE = 64 * MiB
_COMMUNICATOR = 250 * MiB  # each group of more than one rank
_FRAGMENTATION = 0.03  # of what is allocated and freed in every step


def overhead(case: Case, transient: float) -> float:
    """Bytes beside torch's allocations: CUDA context, workspaces, communicators, and what fragmentation wastes."""
    topology = case.topology
    sizes = [topology.tp, topology.pp, case.shards, case.replicas]
    if case.model.moe is not None:
        sizes += [topology.ep, topology.expert_tp, case.expert_shards, case.expert_replicas]
    elif case.recipe.optimizer.name == "muon" and topology.pp > 1:  # else the world's, or that of experts, serves
        sizes.append(topology.stage_size)
    groups = sum(size > 1 for size in sizes)
    return _CONTEXT + _WORKSPACE + groups * _COMMUNICATOR + _FRAGMENTATION * transient


class _Moment(NamedTuple):
    """Bytes of what comes and goes, at one moment of a backward pass."""

    activations: float
    loss: float = 0.0
    working: float = 0.0
    buffers: float = 0.0

    @property
    def total(self) -> float:
        return self.activations + self.loss + self.working + self.buffers


def _lingering(case: Case, stages: list[Stage]) -> float:
    """What FSDP2 reduced last stays until the next reduction, or the end of the step's last backward pass."""
    lingers = not case.flat and case.topology.pp == 1 and case.microbatches > 1
    return max(case.end_weights(stage) for stage in stages) * case.storage_bytes if lingers else 0.0


def _moments(case: Case, stages: list[Stage], held: float) -> list[_Moment]:
    """The moments at which a backward pass that starts with `held` bytes of activations may be at its fullest, after
    the head: in a block, while the gradients of a block or of the ends are reduced."""
    last = any(stage.last for stage in stages)
    after_head = max(0.0, held - (head_activations(case) if last else 0.0))
    ends = max(case.end_weights(stage) for stage in stages)
    gathered, lingering = gathering(case), _lingering(case, stages)
    moments = []
    for stage in stages:
        if stage.layers:
            moments += _block_moments(case, stage, after_head, gathered + lingering)
            if not case.flat:
                last_block = stage.layers[-1]
                experts = case.model.has_experts(last_block)
                one = block_activations(case, chosen(case.recipe.training, last_block), experts=experts)
                left = max(0.0, after_head - one)
                moments.append(_Moment(left, buffers=gathered + reducing(case, _unit_weights(case, experts))))
    if ends and not case.flat:
        left = max(0.0, held - max(stage_activations(case, stage) for stage in stages))
        moments.append(_Moment(left, buffers=reducing(case, ends)))
    return moments


def _block_moments(case: Case, stage: Stage, held: float, buffers: float) -> list[_Moment]:
    """The backward pass of a stage's last block of each kind and set of parts that are made again."""
    moments = []
    unseen = set(case.blocks(stage))
    for layer in reversed(stage.layers):
        block = Block(case.model.has_experts(layer), chosen(case.recipe.training, layer))
        if block in unseen:
            working = block_working(case, block.again, experts=block.experts)
            moments.append(_Moment(held, working=working, buffers=buffers))
            unseen.remove(block)
        if not unseen:
            break
        held = max(0.0, held - block_activations(case, block.again, experts=block.experts))
    return moments


def rank_memory(case: Case, pp_rank: int, step: Step) -> Memory:
    """Memory of a rank of the given pipeline rank.

    Args:
        step: the simulated schedule, its costs' `held` from `stage_activations`, `waiting` from
            `split_backward_waiting`.
    """
    stages = case.stages_on(pp_rank)
    whole, split = step.whole[pp_rank], step.split[pp_rank]
    moments = [(whole.gradients, moment) for moment in _moments(case, stages, whole.activations)]
    if split.activations:
        moments.append((split.gradients, _Moment(split.activations, working=_split_working(case, stages))))
    if any(stage.last for stage in stages):
        buffers = _lingering(case, stages) + (gathering(case) if case.zero == 2 else 0.0)
        fused = case.accumulates_in_place or case.recipe.lora is not None  # gradients are made in the forward pass
        held = (step.after_loss if fused else step.before_loss)[pp_rank]
        moments.append((held.gradients, _Moment(held.activations, loss=loss_working(case), buffers=buffers)))
    if case.flat:
        moments = [(gradients(case, stages), moment) for _, moment in moments]
    if case.recipe.optimizer.name == "muon":
        moments.append((gradients(case, stages), _Moment(0.0, working=update_bytes(case, stages))))
    gradient, fullest = max(moments, key=lambda item: item[0] + item[1].total)
    return Memory(
        weights=weights(case, stages),
        gathered_weights=gathered_weights(case, stages),
        gradients=gradient,
        optimizer=optimizer_state(case, stages),
        activations=fullest.activations,
        loss=fullest.loss,
        working=fullest.working,
        data_parallel_buffers=fullest.buffers,
        pipeline_buffers=pipeline_buffers(case, pp_rank),
        overhead=overhead(case, fullest.total + gradient),
    )
