"""Bytes that a microbatch keeps on a rank from its forward to its backward pass, tensor by tensor.

As in Korthikanti et al. 2022 (arXiv 2205.05198), with FlashAttention, which keeps no s x s matrix. What a block keeps
follows from its parts (`tplaunch.spec.recompute`); beneath adapters, from which gradients anyone needs.
"""

from __future__ import annotations

from math import lcm

from tplaunch.plan.case import Case, Stage
from tplaunch.recipe.schema import Experts, Lora, Part
from tplaunch.spec.lora import is_target, targets
from tplaunch.spec.recompute import chosen, kept


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
    names = _kept_names(case, parts, experts=experts)
    return sum(tensors[name] for name in names) + statistics + adapter_activations(case, experts=experts)


def _kept_names(case: Case, parts: frozenset[Part], *, experts: bool) -> frozenset[str]:
    """Names of the tensors that a block keeps which makes these parts again."""
    return kept(case.model, parts, experts=experts).kept - _of_frozen_alone(case, experts=experts)


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
    experts, parts = case.model.has_experts(layer), chosen(case.recipe.training, layer)
    adapted, norm = {*targets(lora)}, norm_statistics(case)
    gone, statistics = {"input"} if case.model.pre_norms else set(), norm * case.model.pre_norms
    if case.model.latent is not None or not {"wq", "wk", "wv"} & adapted:
        gone |= {"input", "normed", "queries", "latent", "latent_normed", "projected", "turned", "softmax"}
        statistics += head_statistics(case)
        if "wo" not in adapted:
            gone |= {"attended", "attention_made", "middle"}
            statistics += norm * (case.model.pre_norms + case.model.post_norms)
    tensors, names = block_tensors(case, experts=experts), _kept_names(case, parts, experts=experts)
    return statistics + sum(tensors[name] for name in gone & names)
