"""Rules between the fields of a recipe: what cannot work is refused with its mend, before anything starts.

The microbatch rules are those of `torch.distributed.pipelining` (schedules.py of torch 2.11 to 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import lcm
from typing import NamedTuple

from tplaunch.arithmetic import stage_layers
from tplaunch.check_data import missing_files, tokenizer_problems
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.hardware import find_gpu
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Model, Recipe
from tplaunch.topology import V_SCHEDULES, Topology

SPLIT_BACKWARD = frozenset({"interleavedzerobubble", "zbvzerobubble", "dualpipev"})
INTERLEAVED = frozenset({"interleaved1f1b", "interleavedzerobubble"})


class Checked(NamedTuple):
    """A recipe that can run.

    Attributes:
        recipe: as loaded, with `topology.dp` a number.
        topology: its ranks.
        stage_layers: transformer blocks of each pipeline stage, in stage order.
        warnings: what will work but is hardly meant.
    """

    recipe: Recipe
    topology: Topology
    stage_layers: list[int]
    warnings: list[Problem]


def check_recipe(loaded: LoadedRecipe, *, gpus: int | None = None, need_data: bool = True) -> Checked:
    """Check everything that needs more than one field, this machine's GPUs, or a look at the data files.

    Args:
        loaded: the recipe.
        gpus: GPUs (or processes, on the CPU) that the whole run can have; `dp: auto` fills them. None: not known.
        need_data: refuse missing data files; otherwise (to plan, say) they are warnings.

    Raises:
        RecipeError: holds every problem that was found.
    """
    recipe = loaded.recipe
    problems = [*_model(recipe.model, recipe.training.seq_len), *_tensor_parallel(recipe), *_pipeline(recipe)]
    dp, dp_problems = _data_parallel(recipe, gpus)
    problems += dp_problems
    if dp is not None:
        recipe = recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"dp": dp})})
        problems += [*_batch(recipe, dp)]
    problems += [*_run(recipe), *tokenizer_problems(recipe)]
    warnings = [*_warnings(recipe)]
    (problems if need_data else warnings).extend(missing_files(recipe))

    def placed(found: list[Problem]) -> list[Problem]:
        return [replace(problem, where=problem.where or _place(loaded, problem.key)) for problem in found]

    if problems or dp is None:
        raise RecipeError(*placed(problems))
    layout = recipe.topology
    topology = Topology(layout.tp, dp, layout.pp, layout.tp * dp * layout.pp // layout.nodes)
    warnings += [*_placement(topology, layout.async_tp)]
    return Checked(recipe, topology, stage_layers(recipe), placed(warnings))


def _place(loaded: LoadedRecipe, key: str) -> str:
    """Where a key is said; for a default, where its section is, or the file."""
    while key:
        if where := loaded.where(key):
            return where
        key = key.rpartition(".")[0]
    return str(loaded.path)


def microbatch_rule(schedule: str, pp: int) -> tuple[Callable[[int], bool], str]:
    """Which numbers of microbatches a schedule takes on pp > 1 ranks: a test of a number, and the rule in words."""
    if schedule == "1f1b":
        return lambda count: count >= pp, f"at least pp = {pp}"
    if schedule == "dualpipev":
        return lambda count: count >= 2 * pp, f"at least its stages, 2 x pp = {2 * pp}"
    if schedule in INTERLEAVED:
        return lambda count: count % max(1, count // pp) == 0, f"equal rounds of at least pp = {pp}"
    return lambda count: count >= 1, "at least 1"


def _model(model: Model, seq_len: int) -> Iterator[Problem]:
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads
    if heads % kv_heads:
        yield Problem(
            f"{heads} heads cannot share {kv_heads} key/value heads evenly",
            fix=f"num_kv_heads: {_choices(_divisors(heads), kv_heads)}",
            key="model.num_kv_heads",
        )
    if model.head_dim is None:
        yield Problem(
            f"hidden_size {model.hidden_size} is not a multiple of num_heads {heads}, so head_dim is unknown",
            fix=f"hidden_size: {_choices(_multiples(heads, model.hidden_size), model.hidden_size)}, or state head_dim",
            key="model.num_heads",
        )
    elif model.position == "rope" and model.head_dim % 2:
        yield Problem(
            f"head_dim {model.head_dim} is odd",
            why="rotary embeddings turn pairs of channels",
            fix=f"head_dim: {model.head_dim + 1}",
            key="model.head_dim",
        )
    if model.position == "learned":
        if model.max_position is None:
            yield Problem(
                "learned positions need a table size", fix=f"max_position: {seq_len}", key="model.max_position"
            )
        elif model.max_position < seq_len:
            yield Problem(
                f"the table has {model.max_position} positions, seq_len is {seq_len}",
                fix=f"max_position: {seq_len}, or training.seq_len: {model.max_position}",
                key="model.max_position",
            )
        if model.rope_scaling is not None:
            yield Problem(
                "scales rotary embeddings, but position is learned",
                fix="rope_scaling: null, or position: rope",
                key="model.rope_scaling",
            )
    elif (scaling := model.rope_scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Problem(
            f"low_freq_factor {scaling.low_freq_factor:g} must be below high_freq_factor {scaling.high_freq_factor:g}",
            fix="the published values are 1.0 and 4.0",
            key="model.rope_scaling",
        )


def _tensor_parallel(recipe: Recipe) -> Iterator[Problem]:
    model, tp = recipe.model, recipe.topology.tp
    heads, kv_heads = model.num_heads, model.num_kv_heads or model.num_heads

    def heads_fit(size: int) -> bool:
        return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)

    if not heads_fit(tp):
        what = f"{heads} heads" if heads % tp else f"{kv_heads} key/value heads"
        yield Problem(
            f"{what} cannot be shared by tp = {tp}",
            why="every tp rank holds the same number of heads; fewer key/value heads than ranks are replicated evenly",
            fix=f"tp: {_choices(filter(heads_fit, _divisors(heads)), tp)}",
            key="topology.tp",
        )
    if model.ffn_hidden_size % tp:
        yield Problem(
            f"ffn_hidden_size {model.ffn_hidden_size} is not divisible by tp = {tp}",
            fix=f"ffn_hidden_size: {_choices(_multiples(tp, model.ffn_hidden_size), model.ffn_hidden_size)}, "
            f"or tp: {_choices(_divisors(model.ffn_hidden_size), tp)}",
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
    if recipe.topology.sequence_parallel and recipe.training.seq_len % tp:
        seq_len = recipe.training.seq_len
        yield Problem(
            f"seq_len {seq_len} is not divisible by tp = {tp}",
            why="sequence_parallel gives each tp rank an equal part of the sequence",
            fix=f"seq_len: {_choices(_multiples(tp, seq_len), seq_len)}, or sequence_parallel: false",
            key="training.seq_len",
        )


def _pipeline(recipe: Recipe) -> Iterator[Problem]:
    layout, layers = recipe.topology, recipe.model.num_layers
    pp, virtual, schedule = layout.pp, layout.virtual_stages, layout.schedule
    key = "topology.virtual_stages"
    if pp == 1:
        if virtual > 1:
            yield Problem(f"virtual_stages {virtual} needs pp > 1", fix="virtual_stages: 1", key=key)
    elif schedule in V_SCHEDULES and virtual != 2:
        yield Problem(f"{schedule} runs exactly 2 stages on each rank, not {virtual}", fix="virtual_stages: 2", key=key)
    elif schedule in INTERLEAVED and virtual < 2:
        yield Problem(
            f"{schedule} interleaves at least 2 stages on each rank",
            fix="virtual_stages: 2, or schedule: 1f1b",
            key=key,
        )
    elif schedule not in V_SCHEDULES | INTERLEAVED and virtual > 1:
        yield Problem(
            f"{schedule} runs 1 stage on each rank, not {virtual}",
            fix="virtual_stages: 1, or schedule: interleaved1f1b",
            key=key,
        )
    if pp > 1 and schedule in SPLIT_BACKWARD and recipe.training.compile:
        yield Problem(
            f"{schedule} cannot run compiled layers",
            why="it splits the backward pass in two, which torch.compile does not support",
            fix="compile: false, or schedule: interleaved1f1b",
            key="training.compile",
        )
    if pp > 1 and schedule in SPLIT_BACKWARD and layout.zero >= 2:
        yield Problem(
            f"{schedule} cannot shard gradients or parameters within a step (zero: {layout.zero})",
            why="it splits the backward pass in two, and FSDP2 reduces gradients in an undivided one",
            fix="zero: 1, or schedule: interleaved1f1b",
            key="topology.zero",
        )
    stages = pp * virtual
    if layers < stages:
        yield Problem(
            f"{layers} layers cannot fill {stages} stages (pp {pp} x virtual_stages {virtual})",
            fix=f"pp: at most {layers // virtual}" if layers >= virtual else f"virtual_stages: at most {layers}",
            key="topology.pp",
        )
    elif (split := layout.stage_layers) is not None:
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


def _data_parallel(recipe: Recipe, gpus: int | None) -> tuple[int | None, list[Problem]]:
    """dp as a number (None where it cannot be told), and what is wrong with the size of the world."""
    layout = recipe.topology
    replica, nodes, per_node = layout.tp * layout.pp, layout.nodes, layout.gpus_per_node
    problems: list[Problem] = []
    stated = nodes * per_node if per_node else None
    fill = stated or gpus or replica
    if layout.dp != "auto":
        dp = layout.dp
    elif fill % replica == 0:
        dp = fill // replica
    else:
        axes, sizes = f"tp {layout.tp} x pp {layout.pp}", _choices(_divisors(fill), replica)
        if fill < replica:
            what, key = f"one replica needs {replica} GPUs ({axes}), there are {fill}", "topology.tp"
            return None, [Problem(what, fix=f"make tp x pp {sizes}", key=key)]
        what, key = f"auto cannot fill {fill} GPUs with replicas of {replica} ({axes})", "topology.dp"
        return None, [Problem(what, fix=f"make tp x pp {sizes}, or state dp: {fill // replica}", key=key)]
    world = replica * dp
    equation = f"{world} ranks (tp {layout.tp} x pp {layout.pp} x dp {dp})"
    if gpus is not None and world > gpus:
        fewer = f"dp: {gpus // replica}" if gpus >= replica else f"make tp x pp {_choices(_divisors(gpus), replica)}"
        problems.append(Problem(f"{equation}, but there are {gpus} GPUs", fix=fewer, key="topology.dp"))
    if stated is not None and world != stated:
        fits = stated % replica == 0
        problems.append(
            Problem(
                f"{equation}, but nodes {nodes} x gpus_per_node {per_node} = {stated}",
                fix=f"dp: {stated // replica}, or dp: auto" if fits else f"make nodes x gpus_per_node {world}",
                key="topology.gpus_per_node",
            )
        )
    elif world % nodes:
        problems.append(
            Problem(
                f"{equation} cannot be spread evenly over {nodes} nodes",
                fix=f"nodes: {_choices(_divisors(world), nodes)}",
                key="topology.nodes",
            )
        )
    if dp % layout.dp_replicate:
        problems.append(
            Problem(
                f"dp = {dp} is not divisible by dp_replicate = {layout.dp_replicate}",
                fix=f"dp_replicate: {_choices(_divisors(dp), layout.dp_replicate)}",
                key="topology.dp_replicate",
            )
        )
    return dp, problems


def _batch(recipe: Recipe, dp: int) -> Iterator[Problem]:
    training, layout = recipe.training, recipe.topology
    one_round = dp * training.micro_batch_size
    rounds = f"dp {dp} x micro_batch_size {training.micro_batch_size} = {one_round}"
    takes, rule = microbatch_rule(layout.schedule, layout.pp) if layout.pp > 1 else (lambda count: True, "")

    def wrong(batch: int, key: str) -> Iterator[Problem]:
        def legal() -> Iterator[int]:
            nearby = range(1, batch // one_round + 2 * layout.pp + 2)
            return (count * one_round for count in nearby if takes(count))

        if batch % one_round:
            yield Problem(
                f"{batch} samples are not divisible by {rounds}",
                fix=f"{key.rsplit('.', 1)[1]}: {_choices(legal(), batch)}",
                key=key,
            )
        elif not takes(batch // one_round):
            yield Problem(
                f"{batch} samples / ({rounds}) = {batch // one_round} microbatches; "
                f"{layout.schedule} on pp = {layout.pp} wants {rule}",
                fix=f"{key.rsplit('.', 1)[1]}: {_choices(legal(), batch)}",
                key=key,
            )

    yield from wrong(training.global_batch_size, "training.global_batch_size")
    ramp = training.batch_ramp_up
    if ramp is None:
        return
    key, target = "training.batch_ramp_up", training.global_batch_size
    if ramp.start >= target:
        yield Problem(f"starts at {ramp.start}, not below global_batch_size {target}", fix="remove it", key=key)
    elif (target - ramp.start) % ramp.increment:
        yield Problem(
            f"from {ramp.start} by {ramp.increment} never meets global_batch_size {target}",
            fix=f"increment: {_choices(_divisors(target - ramp.start), ramp.increment)}",
            key=key,
        )
    elif ramp.increment % one_round:
        yield Problem(
            f"increment {ramp.increment} is not divisible by {rounds}",
            fix=f"increment: {_choices(_multiples(one_round, ramp.increment), ramp.increment)}",
            key=key,
        )
    else:
        for batch in range(ramp.start, target, ramp.increment) if layout.pp > 1 else [ramp.start]:
            found = list(wrong(batch, f"{key}.start"))
            yield from found
            if found:
                return


def _run(recipe: Recipe) -> Iterator[Problem]:
    training, optimizer, schedule, slurm = (
        recipe.training,
        recipe.optimizer,
        recipe.lr_schedule,
        recipe.launch.slurm,
    )
    if optimizer.name == "adamw" and max(optimizer.betas) >= 1:
        yield Problem("each beta must be below 1", fix="the usual values are [0.9, 0.95]", key="optimizer.betas")
    if schedule.min_lr > optimizer.lr:
        yield Problem(f"min_lr {schedule.min_lr:g} is above lr {optimizer.lr:g}", key="lr_schedule.min_lr")
    if schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > training.steps:
        room = training.steps - schedule.warmup_steps
        yield Problem(
            f"warmup {schedule.warmup_steps} + decay {schedule.decay_steps} steps exceed the run's {training.steps}",
            fix=f"decay_steps: at most {room}" if room > 0 else "fewer warmup_steps",
            key="lr_schedule.decay_steps",
        )
    if training.eval_every and recipe.data.validation is None:
        yield Problem(
            "there is no validation data to evaluate on",
            fix="give data.validation, or eval_every: 0",
            key="training.eval_every",
        )
    if slurm.time is not None and slurm.grace >= slurm.time:
        yield Problem(
            f"grace {slurm.grace:g}s is not shorter than the job's time {slurm.time:g}s", key="launch.slurm.grace"
        )
    if recipe.hardware.gpu is not None:
        try:
            find_gpu(recipe.hardware.gpu)
        except TplaunchError as error:
            yield from (replace(problem, key="hardware.gpu") for problem in error.problems)


def _warnings(recipe: Recipe) -> Iterator[Problem]:
    training, layout, schedule, checkpoint = recipe.training, recipe.topology, recipe.lr_schedule, recipe.checkpoint
    if schedule.warmup_steps >= training.steps:
        yield Problem(
            f"all {training.steps} steps are warmup ({schedule.warmup_steps}): lr never reaches its full value",
            key="lr_schedule.warmup_steps",
        )
    if (ramp := training.batch_ramp_up) and ramp.start < training.global_batch_size:
        length = (training.global_batch_size - ramp.start) // ramp.increment * ramp.steps
        if length >= training.steps:
            yield Problem(
                f"takes {length} steps, the run ends after {training.steps}: it never has its full batch",
                key="training.batch_ramp_up",
            )
    if recipe.data.validation is not None and training.eval_every == 0:
        yield Problem("is never used: training.eval_every is 0", fix="set training.eval_every", key="data.validation")
    if recipe.optimizer.momentum and recipe.optimizer.name != "sgd":
        yield Problem(f"has no effect with {recipe.optimizer.name}", key="optimizer.momentum")
    if layout.async_tp and not (layout.sequence_parallel and layout.tp > 1):
        yield Problem(
            "has no effect: what it fuses matmuls with are the collectives of sequence parallelism",
            fix="sequence_parallel: true, and tp above 1",
            key="topology.async_tp",
        )
    if layout.pp > 1 and layout.zero == 3:
        yield Problem(
            "gathers the parameters again for every microbatch of the pipeline",
            fix="zero: 2 keeps them between microbatches",
            key="topology.zero",
        )
    for key, asked in (
        ("training.loss_spike", training.loss_spike),
        ("training.nonfinite.rollback_after", training.nonfinite.rollback_after),
    ):
        if asked is not None and checkpoint.every == 0:
            yield Problem(
                "has nothing to go back to: no checkpoint is written before the end",
                fix="set checkpoint.every",
                key=key,
            )
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        yield Problem(
            f"keep_every {checkpoint.keep_every} is not a multiple of every {checkpoint.every}: "
            f"only steps that are multiples of both stay",
            key="checkpoint.keep_every",
        )


def _placement(topology: Topology, async_tp: bool) -> Iterator[Problem]:
    if topology.nodes > 1 and topology.gpus_per_node % topology.tp:
        if async_tp:
            yield Problem("is off: tp groups cross nodes, where memory is not shared", key="topology.async_tp")
        yield Problem(
            f"tp groups of {topology.tp} cross nodes of {topology.gpus_per_node} GPUs",
            why="every layer waits for its tp group, and the network is far slower than the links inside a node",
            fix=f"tp: {_choices(_divisors(topology.gpus_per_node), topology.tp)}",
            key="topology.tp",
        )


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _multiples(step: int, near: int) -> list[int]:
    """The multiples of `step` just below and just above `near`."""
    below = near // step * step
    return [multiple for multiple in (below, below + step) if multiple > 0]


def _choices(options: Iterable[int], near: int) -> str:
    """The options next to a number on either side, in words."""
    options = list(options)
    below = max((option for option in options if option < near), default=None)
    above = min((option for option in options if option > near), default=None)
    return " or ".join(str(option) for option in (below, above) if option is not None)
