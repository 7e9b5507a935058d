"""The rules that a change of topology or batch can break, each yielding its problems one by one.

The checks print all of them; `plan` and `tune`, which try thousands of candidates, stop at the first (`can_run`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import lcm

from tplaunch.check.choices import choices, divisors, multiples, nearest
from tplaunch.check.experts import experts
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.context import piece_count
from tplaunch.spec.schedules import SCHEDULES


def can_run(recipe: Recipe) -> bool:
    """Whether a recipe, its dp a number, breaks none of these rules."""
    return next(_problems(recipe), None) is None


def _problems(recipe: Recipe) -> Iterator[Problem]:
    assert isinstance(recipe.topology.dp, int)
    yield from tensor_parallel(recipe)
    yield from context_parallel(recipe)
    yield from replicas(recipe, recipe.topology.dp)
    yield from pipeline(recipe)
    yield from experts(recipe)
    yield from batch(recipe, recipe.topology.dp)


def tensor_parallel(recipe: Recipe) -> Iterator[Problem]:
    model, tp = recipe.model, recipe.topology.tp
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    heads_fit = partial(_shared_evenly, heads, kv_heads)
    if not heads_fit(tp):
        what = f"{heads} heads" if heads % tp else f"{kv_heads} key/value heads"
        yield Problem(
            f"{what} cannot be shared by tp = {tp}",
            why="every tp rank holds the same number of heads; fewer key/value heads than ranks are replicated evenly",
            fix=f"tp: {choices(filter(heads_fit, divisors(heads)), tp)}",
            key="topology.tp",
        )
    if not model.has_experts(0) and model.ffn_hidden_size % tp:
        yield Problem(
            f"ffn_hidden_size {model.ffn_hidden_size} is not divisible by tp = {tp}",
            fix=f"ffn_hidden_size: {choices(multiples(tp, model.ffn_hidden_size), model.ffn_hidden_size)}, "
            f"or tp: {choices(divisors(model.ffn_hidden_size), tp)}",
            key="model.ffn_hidden_size",
        )
    if model.padded_vocab_size % tp:
        multiple = lcm(model.make_vocab_size_divisible_by, tp)
        padded = -(-model.vocab_size // multiple) * multiple
        yield Problem(
            f"vocab_size {model.vocab_size}, padded to {model.padded_vocab_size}, is not divisible by tp = {tp}",
            fix=f"make_vocab_size_divisible_by: {multiple}, which pads to {padded}",
            key="model.make_vocab_size_divisible_by",
        )
    if recipe.topology.cp == 1 and recipe.topology.sequence_parallel and recipe.training.seq_len % tp:
        seq_len = recipe.training.seq_len
        yield Problem(
            f"seq_len {seq_len} is not divisible by tp = {tp}",
            why="sequence_parallel gives each tp rank an equal part of the sequence",
            fix=f"seq_len: {choices(multiples(tp, seq_len), seq_len)}, or sequence_parallel: false",
            key="training.seq_len",
        )


def _shared_evenly(heads: int, kv_heads: int, size: int) -> bool:
    """Whether so many ranks hold equally many heads each; fewer key/value heads than ranks are replicated."""
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


_HELD = {
    "allgather": "each cp rank holds two of 2 cp equal pieces of a sequence, an early and a late one",
    "ulysses": "each cp rank holds an equal part of a sequence",
}


def context_parallel(recipe: Recipe) -> Iterator[Problem]:
    """Whether the sequence has equal pieces for all that share it, and the heads suit their exchange."""
    parallelism, model, seq_len = recipe.topology, recipe.model, recipe.training.seq_len
    cp, kind, tp = parallelism.cp, parallelism.cp_kind, parallelism.tp
    if cp == 1:
        return
    slices = tp if parallelism.sequence_parallel else 1

    def parts(size: int) -> int:
        return piece_count(kind, size) * slices

    if seq_len % parts(cp):
        equation = "2 x " * (kind == "allgather") + f"cp {cp}" + f" x tp {tp}" * (slices > 1)
        fitting = [size for size in range(1, 2 * cp) if seq_len % parts(size) == 0]
        yield Problem(
            f"seq_len {seq_len} is not divisible by {equation} = {parts(cp)}",
            why=_HELD[kind] + ", and each of its tp ranks an equal part of that" * (slices > 1),
            fix=f"seq_len: {choices(multiples(parts(cp), seq_len), seq_len)}"
            + (f", or cp: {choices(fitting, cp)}" if fitting else ""),
            key="training.seq_len",
        )
    if kind == "ulysses" and model.num_heads % tp == 0:
        heads, kv_heads = model.num_heads // tp, max(1, (model.num_kv_heads or model.num_heads) // tp)
        heads_fit = partial(_shared_evenly, heads, kv_heads)
        if not heads_fit(cp):
            what = f"{heads} heads" if heads % cp else f"{kv_heads} key/value heads"
            yield Problem(
                f"{what}{' of a tp rank' * (tp > 1)} cannot be shared by cp = {cp}",
                why="ulysses gives each cp rank some of the heads, and whole sequences of them",
                fix=f"cp: {choices(filter(heads_fit, divisors(heads)), cp)}, or cp_kind: allgather",
                key="topology.cp",
            )


def pipeline(recipe: Recipe) -> Iterator[Problem]:
    """Whether the stages suit the schedule, and the layers fill them."""
    parallelism, layers = recipe.topology, recipe.model.num_layers
    pp, virtual = parallelism.pp, parallelism.virtual_stages
    if pp == 1:
        if virtual > 1:
            what = f"virtual_stages {virtual} needs pp > 1"
            yield Problem(what, fix="virtual_stages: 1", key="topology.virtual_stages")
    else:
        yield from _schedule(recipe)
    stages = pp * virtual
    if layers < stages:
        yield Problem(
            f"{layers} layers cannot fill {stages} stages (pp {pp} x virtual_stages {virtual})",
            fix=f"pp: at most {layers // virtual}" if layers >= virtual else f"virtual_stages: at most {layers}",
            key="topology.pp",
        )
    elif (split := parallelism.stage_layers) is not None:
        key = "topology.stage_layers"
        if len(split) != stages:
            yield Problem(f"lists {len(split)} stages; pp {pp} x virtual_stages {virtual} = {stages}", key=key)
        if sum(split) != layers:
            yield Problem(f"adds up to {sum(split)} layers; num_layers is {layers}", key=key)
        if 0 in split[1:-1]:
            yield Problem(
                "a stage between the first and the last has no layer",
                why="only the first and the last hold anything else",
                key=key,
            )


def _schedule(recipe: Recipe) -> Iterator[Problem]:
    """Whether a schedule can run these stages, compiled layers and ZeRO, on pp > 1."""
    parallelism, schedule = recipe.topology, SCHEDULES[recipe.topology.schedule]
    if what := schedule.wrong_stages(parallelism.virtual_stages):
        other = "" if schedule.max_stages == schedule.min_stages == 2 else ", or schedule: 1f1b"
        other = other if schedule.min_stages == 2 else ", or schedule: interleaved1f1b"
        fix = f"virtual_stages: {schedule.min_stages}{other}"
        yield Problem(what, fix=fix, key="topology.virtual_stages")
    if schedule.splits_backward and recipe.training.compile:
        yield Problem(
            f"{schedule.name} cannot run compiled layers",
            why="it splits the backward pass in two, which torch.compile does not support",
            fix="compile: false, or schedule: interleaved1f1b",
            key="training.compile",
        )
    if schedule.splits_backward and parallelism.zero >= 2:
        yield Problem(
            f"{schedule.name} cannot shard gradients or parameters within a step (zero: {parallelism.zero})",
            why="it splits the backward pass in two, and FSDP2 reduces gradients in an undivided one",
            fix="zero: 1, or schedule: interleaved1f1b",
            key="topology.zero",
        )


def replicas(recipe: Recipe, dp: int) -> Iterator[Problem]:
    """Whether HSDP's groups divide the data-parallel ranks."""
    groups = recipe.topology.dp_replicate
    if dp % groups:
        yield Problem(
            f"dp = {dp} is not divisible by dp_replicate = {groups}",
            fix=f"dp_replicate: {choices(divisors(dp), groups)}",
            key="topology.dp_replicate",
        )


def batch(recipe: Recipe, dp: int) -> Iterator[Problem]:
    """Whether the global batch, at every size of its ramp-up, makes microbatches that the schedule takes."""
    training, parallelism = recipe.training, recipe.topology
    one_round = dp * training.micro_batch_size
    rounds = f"dp {dp} x micro_batch_size {training.micro_batch_size} = {one_round}"
    schedule = SCHEDULES[parallelism.schedule]

    def takes(microbatches: int) -> bool:
        return parallelism.pp == 1 or schedule.takes(microbatches, parallelism.pp)

    def wrong(batch: int, key: str) -> Iterator[Problem]:
        count, rest = divmod(batch, one_round)
        if rest == 0 and takes(count):
            return
        limit = count + 2 * parallelism.pp + 1
        near = (number * one_round for number in nearest(takes, count, limit, between=rest > 0))
        fix = f"{key.rsplit('.', 1)[1]}: {choices(near, batch)}"
        if rest:
            yield Problem(f"{batch} samples are not divisible by {rounds}", fix=fix, key=key)
        else:
            what = f"{batch} samples / ({rounds}) = {count} microbatches; "
            what += f"{schedule.name} on pp = {parallelism.pp} wants {schedule.wants(parallelism.pp)}"
            yield Problem(what, fix=fix, key=key)

    yield from wrong(training.global_batch_size, "training.global_batch_size")
    for number, piece in enumerate(training.batch_schedule or ()):
        yield from wrong(piece.size, f"training.batch_schedule[{number}].size")
    ramp = training.batch_ramp_up
    if ramp is None:
        return
    key, target = "training.batch_ramp_up", training.global_batch_size
    if ramp.start >= target:
        yield Problem(f"starts at {ramp.start}, not below global_batch_size {target}", fix="remove it", key=key)
    elif (target - ramp.start) % ramp.increment:
        yield Problem(
            f"from {ramp.start} by {ramp.increment} never meets global_batch_size {target}",
            fix=f"increment: {choices(divisors(target - ramp.start), ramp.increment)}",
            key=key,
        )
    elif ramp.increment % one_round:
        yield Problem(
            f"increment {ramp.increment} is not divisible by {rounds}",
            fix=f"increment: {choices(multiples(one_round, ramp.increment), ramp.increment)}",
            key=key,
        )
    else:
        for batch in range(ramp.start, target, ramp.increment) if parallelism.pp > 1 else [ramp.start]:
            found = list(wrong(batch, f"{key}.start"))
            yield from found
            if found:
                return
