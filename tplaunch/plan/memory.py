"""Bytes that a rank holds at the peak of a step, term by term.

Each function is one term, so that one can be corrected by measurement. What is kept follows the trainer: FSDP2 with
wide (fp32) weights and compute-type copies, its gradient accumulation and reduction; activations as in Korthikanti et
al. 2022 (arXiv 2205.05198) with FlashAttention, which keeps no s x s matrix; `torch.distributed.pipelining`'s buffers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

from tplaunch.plan.case import Case, Stage
from tplaunch.plan.schedule import Step

MiB = 2**20
GiB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of its step.

    Args:
        weights: the kept (wide) weights, this rank's shard.
        gathered_weights: copies in the compute type that the step works on.
        gradients: what is accumulated over microbatches.
        optimizer: its state.
        activations: what the microbatches in flight keep for their backward passes.
        loss: logits of a chunk, and the gradients of the head.
        working: temporaries of the block at work: recomputed insides, gradients, gathered sequences.
        data_parallel_buffers: all-gather and reduce-scatter buffers of FSDP2.
        pipeline_buffers: receive buffers, one for every microbatch.
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
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated counts."""
        return self.total - self.overhead


def hidden_bytes(case: Case) -> float:
    """Bytes of one microbatch's hidden states between blocks: [s (s/tp with sequence parallelism), b, h]."""
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens * case.model.hidden_size * case.compute_bytes / slices


def block_activations(case: Case) -> float:
    """Bytes that one block keeps for its backward pass, for one microbatch, when nothing is recomputed.

    hidden states: input, normed input, middle, normed middle; q, k, v and the attention's output; the MLP's
    pre-activations, activation and product; statistics of norms (fp32) and of the softmax (fp32 each head).
    """
    model, tp, tokens, width = case.model, case.topology.tp, case.tokens, case.compute_bytes
    assert model.head_dim is not None
    wide = max(4, width)
    heads, kv_heads = local_heads(case)
    attention = tokens * (2 * heads + 2 * kv_heads) * model.head_dim * width
    if model.qk_norm:  # q and k as they were before their norms
        attention += tokens * (heads + kv_heads) * (model.head_dim * width + wide)
    softmax = 0 if case.attention_recomputed else tokens * heads * wide
    ffn_tensors = 4 if model.activation == "swiglu" else 2
    mlp = tokens * ffn_tensors * (model.ffn_hidden_size // tp) * width
    statistics = 2 * norm_statistics(case)
    return 4 * hidden_bytes(case) + attention + softmax + mlp + statistics


def local_heads(case: Case) -> tuple[int, int]:
    """Query heads and key/value heads of one rank."""
    model, tp = case.model, case.topology.tp
    assert model.num_kv_heads is not None
    return model.num_heads // tp, max(1, model.num_kv_heads // tp)


def norm_statistics(case: Case) -> float:
    """Bytes of one norm's saved statistics: 1/rms, or mean and 1/std, of each token."""
    slices = case.topology.tp if case.sequence_parallel else 1
    return case.tokens / slices * max(4, case.compute_bytes) * (1 if case.model.norm == "rmsnorm" else 2)


def head_activations(case: Case) -> float:
    """Bytes that the final norm and the loss keep: their input, the whole sequence's normed states, labels, log Z."""
    gathered = case.tokens * case.model.hidden_size * case.compute_bytes
    return hidden_bytes(case) + norm_statistics(case) + gathered + case.tokens * (8 + max(4, case.compute_bytes))


def embedding_activations(case: Case) -> float:
    """Bytes that the embedding keeps: token numbers and, over tp, which of them are another rank's."""
    return case.tokens * (8 if case.topology.tp == 1 else 9)


def stage_activations(case: Case, stage: Stage) -> float:
    """Bytes that one microbatch keeps in a stage from its forward to its backward pass."""
    hidden = hidden_bytes(case)
    recomputed = case.recomputed(stage)
    total = recomputed * hidden + (len(stage.layers) - recomputed) * block_activations(case)
    if stage.first:
        total += embedding_activations(case)
    elif stage.layers:
        total -= hidden  # the input lies in its receive buffer
    if stage.last:
        total += head_activations(case)
    else:
        total += hidden  # the output waits for its gradient
    return total


def weights(case: Case, stages: list[Stage]) -> float:
    """The kept weights of a rank."""
    return sum(case.sharded_weights(stage) for stage in stages) * case.storage_bytes


def gathered_weights(case: Case, stages: list[Stage]) -> float:
    """Weights in the compute type: all of the rank's, or with ZeRO 3 those outside blocks and the block at work.

    FSDP2 makes the copy even where there is nothing to gather or to convert.
    """
    if case.zero < 3:
        return sum(case.weights(stage) for stage in stages) * case.compute_bytes
    at_work = case.block_weights if any(stage.layers for stage in stages) else 0
    return (sum(case.end_weights(stage) for stage in stages) + at_work) * case.compute_bytes


def gradients(case: Case, stages: list[Stage]) -> float:
    """Gradients at their largest: whole where they are reduced once a step after several microbatches, else shards."""
    whole = case.zero <= 1 and case.microbatches > 1
    count = sum(case.weights(s) if whole else case.sharded_weights(s) for s in stages)
    return count * case.storage_bytes


def optimizer_state(case: Case, stages: list[Stage]) -> float:
    """AdamW's two moments, SGD's momentum."""
    optimizer = case.recipe.optimizer
    copies = 2 if optimizer.name == "adamw" else 1 if optimizer.momentum else 0
    return copies * weights(case, stages)


def loss_working(case: Case) -> float:
    """Temporaries of the loss: a chunk's logits (as computed, widened, as gradient, narrowed), the gradients of the
    head's input and of its matrix (summed wide over chunks, then narrowed)."""
    model, training, width = case.model, case.recipe.training, case.compute_bytes
    wide = max(4, width)
    columns = model.padded_vocab_size // case.topology.tp
    logits = min(training.loss_chunk, case.tokens) * columns * (2 * width + 2 * wide)
    matrix = columns * model.hidden_size * (wide + (width if width < wide else 0))
    return logits + matrix + case.tokens * model.hidden_size * width


def block_working(case: Case, stages: list[Stage]) -> float:
    """Temporaries of one block's backward pass: the inside that is computed again, gradients of the MLP's inside
    (or of the attention's), whole-sequence copies around the tensor-parallel region."""
    model, tp, tokens, width = case.model, case.topology.tp, case.tokens, case.compute_bytes
    assert model.head_dim is not None
    heads, kv_heads = local_heads(case)
    again = block_activations(case) if any(case.recomputed(stage) for stage in stages) else 0.0
    ffn_gradients = 3 if model.activation == "swiglu" else 2
    mlp = tokens * ffn_gradients * (model.ffn_hidden_size // tp) * width
    attention = tokens * (2 * heads + 2 * kv_heads) * model.head_dim * width + tokens * heads * model.head_dim * 4
    whole = tokens * model.hidden_size * width
    return again + max(mlp, attention) + whole * (3 if case.sequence_parallel else 2)


def data_parallel_buffers(case: Case, stages: list[Stage]) -> float:
    """FSDP2's transient buffers around its largest unit.

    Backward: the unit's gradients in the compute type, and two reduce-scatter inputs (a unit's is freed when the next
    one's is made). ZeRO 3 also has the next block's weights on their way: as received and as copied out.
    """
    unit = max([case.block_weights if stage.layers else 0 for stage in stages])
    reducing = unit * (case.compute_bytes + 2 * case.storage_bytes)
    gathering = 2 * unit * case.compute_bytes if case.zero == 3 else 0
    return reducing + gathering


def pipeline_buffers(case: Case, stages: list[Stage]) -> float:
    """Receive buffers of torch's pipeline stages: one for each microbatch and direction, kept from step to step."""
    if case.topology.pp == 1:
        return 0.0
    here = {stage.index for stage in stages}
    directions = sum(
        (not s.first and s.index - 1 not in here) + (not s.last and s.index + 1 not in here) for s in stages
    )
    return directions * case.microbatches * hidden_bytes(case)


# NCCL's and cuBLAS's shares, of the order that `nvidia-smi` shows above torch's own reserve on A100 and H100.
_CONTEXT = 600 * MiB  # CUDA context with the kernels of torch and cuBLAS
_WORKSPACE = 64 * MiB
_COMMUNICATOR = 250 * MiB  # each group of more than one rank
_FRAGMENTATION = 0.03  # of what is allocated and freed in every step


def overhead(case: Case, transient: float) -> float:
    """Bytes beside torch's allocations: CUDA context, workspaces, communicators, and what fragmentation wastes."""
    topology = case.topology
    groups = sum(size > 1 for size in (topology.tp, topology.pp, case.shards, case.replicas))
    return _CONTEXT + _WORKSPACE + groups * _COMMUNICATOR + _FRAGMENTATION * transient


def rank_memory(case: Case, pp_rank: int, step: Step) -> Memory:
    """Memory of a rank of the given pipeline rank.

    Args:
        step: the simulated schedule, its `StageCost.held` from `stage_activations`.
    """
    stages = case.stages_on(pp_rank)
    held = step.held[pp_rank]
    gradient = gradients(case, stages)
    if case.microbatches == 1 and case.topology.pp == 1:
        # Gradients come as activations go: the two are never whole at the same time.
        gradient, held = (0.0, held) if held > gradient else (gradient, 0.0)
    loss = loss_working(case) if any(stage.last for stage in stages) else 0.0
    working = block_working(case, stages) if any(stage.layers for stage in stages) else 0.0
    buffers = data_parallel_buffers(case, stages)
    # The head and a block are never at work together: the larger counts.
    if loss > working + buffers:
        working = buffers = 0.0
    else:
        loss = 0.0
    pipeline = pipeline_buffers(case, stages)
    return Memory(
        weights=weights(case, stages),
        gathered_weights=gathered_weights(case, stages),
        gradients=gradient,
        optimizer=optimizer_state(case, stages),
        activations=held,
        loss=loss,
        working=working,
        data_parallel_buffers=buffers,
        pipeline_buffers=pipeline,
        overhead=overhead(case, ceil(held + loss + working + buffers + gradient)),
    )
