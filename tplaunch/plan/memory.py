"""Bytes that a rank holds at the peak of a step, term by term.

Each function is one term, so that one can be corrected by measurement. What is kept follows the trainer: flat buffers
of weights and gradients, or FSDP2 with its gathering and reduction where ZeRO 2 or 3 shards gradients; activations
(`plan.activations`) and temporaries (`plan.working`); messages between pipeline stages from their receive to their last
use.
"""

from __future__ import annotations

from typing import NamedTuple

from tplaunch.plan.activations import block_activations, head_activations, hidden_bytes, stage_activations
from tplaunch.plan.case import Block, Case, Stage
from tplaunch.plan.muon import hidden, update_bytes
from tplaunch.plan.schedule import Step
from tplaunch.plan.working import block_working, loss_working, split_backward_working
from tplaunch.spec.messages import messages_held
from tplaunch.spec.recompute import chosen
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
        moments.append((split.gradients, _Moment(split.activations, working=split_backward_working(case, stages))))
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
