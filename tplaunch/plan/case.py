"""One recipe on one kind of GPU, with the numbers that every part of a plan starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from typing import Any, NamedTuple

from tplaunch.recipe.schema import Lora, Model, Part, Recipe, Target
from tplaunch.spec.attention import attended_positions
from tplaunch.spec.gpu import Gpu
from tplaunch.spec.gradients import are_added_in_place, are_flat, backward_is_whole
from tplaunch.spec.lora import adapted, targets
from tplaunch.spec.parameters import Parameter, block_parameters, first_parameters, last_parameters, layer_kinds
from tplaunch.spec.precision import COMPUTE_BYTES, STORAGE_BYTES, state_bytes
from tplaunch.spec.recompute import sets
from tplaunch.spec.schedules import SCHEDULES, stages_of
from tplaunch.spec.stages import stage_ranges
from tplaunch.spec.topology import Topology


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its blocks and whether the embedding and the head are in it."""

    index: int
    layers: range
    first: bool
    last: bool


_stages_of = lru_cache(maxsize=4096)(stages_of)


class Block(NamedTuple):
    """What the work and the memory of a block depend on, beside its window.

    Args:
        experts: whether it has experts in place of the MLP.
        again: the parts that it makes again in its backward pass.
    """

    experts: bool
    again: frozenset[Part] = frozenset()


class _Counts(NamedTuple):
    """Weights of one rank in a block without experts, in one with them beside these, in its experts, before the
    blocks, after them, and in the embedding alone."""

    dense: int
    sparse: int
    experts: int
    first: int
    last: int
    embedding: int

    def blocks(self, dense: int, sparse: int) -> int:
        """Of so many blocks without and with experts, all but the experts'."""
        return dense * self.dense + sparse * self.sparse

    def ends(self, stage: Stage, *, tied: bool) -> int:
        copy = self.embedding if tied and stage.last and not stage.first else 0
        return self.first * stage.first + (self.last + copy) * stage.last


class _Sizes(NamedTuple):
    """Trained weights as they are gathered, and of a shard; and how many tensors they are; frozen weights likewise."""

    whole: _Counts
    shard: _Counts
    tensors: _Counts
    frozen: _Counts
    frozen_shard: _Counts


class _Cut(NamedTuple):
    """By how many ranks parameters are cut, and those of experts: `shards` and `expert_shards` by data parallelism."""

    tp: int
    shards: int
    ep: int
    expert_tp: int
    expert_shards: int


@lru_cache(maxsize=4096)
def _sizes(model: Model, rank: int, names: tuple[Target, ...], cut: _Cut) -> _Sizes:
    """Of a model; with adapters of this rank, if it is not 0."""
    lora = Lora(rank=rank, targets=list(names)) if rank else None
    kinds = {model.has_experts(layer): adapted(block_parameters(model, layer), lora) for layer in layer_kinds(model)}

    def count(parameters: list[Parameter], *, shard: bool, frozen: bool = False, experts: bool = False) -> int:
        parts = (cut.expert_shards if experts else cut.shards) if shard else 1
        chosen = (p for p in parameters if not p.buffer and p.frozen == frozen and p.expert == experts)
        shapes = [parameter.local_shape(cut.tp, cut.ep, cut.expert_tp) for parameter in chosen]
        return sum(-(-rows // parts) * prod(rest) for rows, *rest in shapes)

    def counts(count: Callable[..., int]) -> _Counts:
        first = adapted(first_parameters(model), lora)
        return _Counts(
            count(kinds.get(False, [])),
            count(kinds.get(True, [])),
            count(kinds.get(True, []), experts=True),
            count(first),
            count(adapted(last_parameters(model), lora)),
            count(first[:1]),
        )

    def tensors(parameters: list[Parameter], *, experts: bool = False) -> int:
        return sum(p.trained and p.expert == experts for p in parameters)

    trained = counts(partial(count, shard=False)), counts(partial(count, shard=True)), counts(tensors)
    frozen = (counts(partial(count, shard=shard, frozen=True)) for shard in (False, True))
    return _Sizes(*trained, *frozen)


@dataclass(frozen=True)
class Case:
    """A checked recipe (dp a number) to be planned for a GPU.

    Args:
        recipe: the recipe, resolved (`tplaunch.spec.resolve`).
        gpu: the hardware.
    """

    recipe: Recipe
    gpu: Gpu

    @cached_property
    def topology(self) -> Topology:
        """The rank grid."""
        return Topology.of(self.recipe)

    @property
    def model(self) -> Model:
        return self.recipe.model

    @property
    def sequence_parallel(self) -> bool:
        return self.recipe.topology.sequence_parallel and self.topology.tp > 1

    @property
    def schedule(self) -> str:
        return self.recipe.topology.schedule

    def splits_backward(self, stage: Stage) -> bool:
        """Whether the schedule runs most of a stage's backward passes in two halves. Not the first stage's: torch
        leaves all of it to the second half. (DualPipeV splits a few at the end of a step.)"""
        return SCHEDULES[self.schedule].zero_bubble and self.topology.pp > 1 and not stage.first

    @property
    def virtual_stages(self) -> int:
        return self.recipe.topology.virtual_stages

    @property
    def zero(self) -> int:
        return self.recipe.topology.zero

    @property
    def flat(self) -> bool:
        """Whether weights and gradients lie in flat buffers, not under FSDP2."""
        return are_flat(self.recipe.topology)

    @property
    def undivided_backward(self) -> bool:
        """Whether no backward pass runs in two halves."""
        return backward_is_whole(self.recipe.topology)

    @property
    def accumulates_in_place(self) -> bool:
        """Whether the matmul that computes a weight's gradient adds it to the sum itself."""
        return are_added_in_place(self.recipe)

    @property
    def fast_domain(self) -> int:
        """Ranks joined by the fast link: those of a node, or of a whole rack (NVL72)."""
        rack = self.gpu.node_size > 8
        return self.gpu.node_size if rack else min(self.topology.ranks_per_node, self.gpu.node_size)

    @property
    def sharing(self) -> int:
        """Ranks that work on the same weights, and sum their gradients: dp x cp."""
        return self.topology.dp * self.topology.cp

    @property
    def replicas(self) -> int:
        """Of these, ranks that hold the same shard."""
        return self.sharing if self.zero == 0 else self.recipe.topology.dp_replicate

    @property
    def shards(self) -> int:
        """Of these, ranks that weights and optimizer state are split over."""
        return self.sharing // self.replicas

    @property
    def expert_replicas(self) -> int:
        """Of the ranks that work on the same experts, those that hold the same shard."""
        return self.topology.edp if self.zero == 0 else self.recipe.topology.dp_replicate

    @property
    def expert_shards(self) -> int:
        """Of these, ranks that experts and their optimizer state are split over."""
        return self.topology.edp // self.expert_replicas

    @property
    def microbatches(self) -> int:
        """Microbatches of one step on each data-parallel rank."""
        training = self.recipe.training
        return training.global_batch_size // (self.topology.dp * training.micro_batch_size)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch that a rank works on: its part of each sequence, over context parallelism."""
        training = self.recipe.training
        return training.seq_len * training.micro_batch_size // self.topology.cp

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.training.seq_len * self.recipe.training.global_batch_size

    @property
    def compute_bytes(self) -> int:
        """Bytes of an element in the compute dtype."""
        return COMPUTE_BYTES[self.recipe.training.precision]

    @property
    def storage_bytes(self) -> int:
        """Bytes of an element of the kept weights, their averages, and their gradients and the optimizer's state where
        these are no narrower."""
        return STORAGE_BYTES[self.recipe.training.precision]

    @property
    def state_bytes(self) -> int:
        """Bytes of an element of the optimizer's state."""
        return state_bytes(self.recipe)

    @property
    def reduced_bytes(self) -> int:
        """Bytes of an element of a gradient while it is reduced over data parallel."""
        return 2 if self.recipe.optimizer.gradient_dtype == "bf16" else self.storage_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element of the gradients that are added up."""
        return self.reduced_bytes if self.flat else self.storage_bytes

    @cached_property
    def stages(self) -> list[Stage]:
        ranges = stage_ranges(self.recipe)
        return [Stage(i, r, i == 0, i == len(ranges) - 1) for i, r in enumerate(ranges)]

    def stages_on(self, pp_rank: int) -> list[Stage]:
        """The stages of a pipeline rank."""
        mine = _stages_of(pp_rank, self.topology.pp, self.virtual_stages, self.schedule)
        return [self.stages[i] for i in mine]

    @cached_property
    def _sizes(self) -> _Sizes:
        topology = self.topology
        cut = _Cut(topology.tp, self.shards, topology.ep, topology.expert_tp, self.expert_shards)
        lora = self.recipe.lora
        adapters = (0, ()) if lora is None else (lora.rank, targets(lora))
        return _sizes(self.model.model_copy(update={"window_layers": None, "rope_layers": None}), *adapters, cut)

    def block_weights(self, *, experts: bool, frozen: bool = False) -> int:
        """Trained weights of one block that one rank holds when it is gathered, its tensor-parallel slice, or frozen
        ones; without those of its experts."""
        sizes = self._sizes.frozen if frozen else self._sizes.whole
        return sizes.sparse if experts else sizes.dense

    def block_expert_weights(self, *, frozen: bool = False) -> int:
        """The same of the experts of one block."""
        return (self._sizes.frozen if frozen else self._sizes.whole).experts

    def end_weights(self, stage: Stage, *, frozen: bool = False) -> int:
        """The same of a stage outside its blocks (embedding, positions, final norm, output)."""
        sizes = self._sizes.frozen if frozen else self._sizes.whole
        return sizes.ends(stage, tied=self.model.tie_embeddings)

    def frozen_weights(self, stage: Stage, *, sharded: bool = False) -> int:
        """Weights of a stage that stay as they are, beneath adapters: its slice, or this rank's shard of that."""
        sizes = self._sizes.frozen_shard if sharded else self._sizes.frozen
        return self._of_stage(sizes, stage) + self.expert_layers(stage) * sizes.experts

    def expert_layers(self, stage: Stage) -> int:
        """How many blocks of a stage have experts."""
        if self.model.moe is None:
            return 0
        return max(0, stage.layers.stop - max(stage.layers.start, self.model.moe.dense_layers))

    def _of_stage(self, counts: _Counts, stage: Stage) -> int:
        sparse = self.expert_layers(stage)
        blocks = counts.blocks(len(stage.layers) - sparse, sparse)
        return blocks + counts.ends(stage, tied=self.model.tie_embeddings)

    def weights(self, stage: Stage) -> int:
        """Trained weights of a stage, its slice: what data parallelism gathers and shards."""
        return self.shared_weights(stage) + self.expert_weights(stage)

    def shared_weights(self, stage: Stage) -> int:
        """Of them those that are no expert's: dp x cp shares them."""
        return self._of_stage(self._sizes.whole, stage)

    def expert_weights(self, stage: Stage) -> int:
        """Of them those of experts: edp shares them."""
        return self.expert_layers(stage) * self._sizes.whole.experts

    def sharded_weights(self, stage: Stage) -> int:
        """Weights of a stage that one rank updates. Data parallelism splits each tensor's first dimension into equal
        parts, rounded up: the first rank's share, the largest."""
        sizes = self._sizes.shard
        return self._of_stage(sizes, stage) + self.expert_layers(stage) * sizes.experts

    def tensors(self, stage: Stage) -> tuple[int, int]:
        """How many tensors the weights of a stage are: those that are no expert's, and those of experts."""
        sizes = self._sizes.tensors
        return self._of_stage(sizes, stage), self.expert_layers(stage) * sizes.experts

    @cached_property
    def known(self) -> dict[Any, Any]:
        """What was computed of this case and is asked for often, by who computed it."""
        return {}

    @property
    def own_tokens(self) -> int:
        """Tokens of one microbatch that a rank routes: of those that it works on, its part over tensor parallelism."""
        return self.tokens // self.topology.tp

    @property
    def imbalance(self) -> float:
        """Rows of the fullest rank's experts over the mean."""
        return self.recipe.hardware.imbalance

    @property
    def expert_rows(self) -> float:
        """Rows that a rank's experts compute in one microbatch: a row for each token and expert that it goes to."""
        moe = self.model.moe
        return 0.0 if moe is None else self.own_tokens * moe.top_k * self.topology.expert_tp * self.imbalance

    @property
    def local_experts(self) -> int:
        """Experts of a layer of which a rank holds a part."""
        return 0 if self.model.moe is None else self.model.moe.experts // self.topology.ep

    def positions(self, layers: range | None = None) -> float:
        """Positions that attention is counted with, mean of some layers or of all (`attended_positions`)."""
        return attended_positions(self.recipe, layers)

    def block_parameters(self, *, experts: bool) -> list[Parameter]:
        """The model's own parameters of a block with experts, or without; none where there is no such block."""
        kinds = {self.model.has_experts(layer): layer for layer in layer_kinds(self.model)}
        return block_parameters(self.model, kinds[experts]) if experts in kinds else []

    def blocks(self, stage: Stage) -> dict[Block, int]:
        """How many blocks of a stage are of each kind."""
        training, first = self.recipe.training, stage.layers.stop - self.expert_layers(stage)
        parts = {False: range(stage.layers.start, first), True: range(first, stage.layers.stop)}
        return {
            Block(experts, again): number
            for experts, layers in parts.items()
            if layers
            for again, number in sets(training, layers).items()
        }

    @cached_property
    def kinds(self) -> dict[bool, int]:
        """How many blocks of the model have experts and how many have none; without what is not there."""
        return {self.model.has_experts(layer): number for layer, number in layer_kinds(self.model).items()}
