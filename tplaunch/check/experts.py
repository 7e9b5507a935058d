"""Whether experts suit the model that they are in, and the ranks that share them."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

from tplaunch.check.choices import choices, divisors, multiples
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Experts, Model, Recipe
from tplaunch.spec.context import piece_count
from tplaunch.spec.topology import Topology


def mixture_problems(model: Model) -> Iterator[Problem]:
    """What is wrong with `model.moe` whatever shares it."""
    moe = model.moe
    if moe is None:
        return
    if moe.top_k > moe.experts:
        yield Problem(
            f"a token goes to {moe.top_k} experts, and there are {moe.experts}",
            fix=f"top_k: at most {moe.experts}",
            key="model.moe.top_k",
        )
    yield from _groups(moe)
    if moe.dense_layers >= model.num_layers:
        yield Problem(
            f"the first {moe.dense_layers} of {model.num_layers} layers are dense: none is left for experts",
            fix=_or_none(model.num_layers - 1),
            key="model.moe.dense_layers",
        )
    if not model.gated:
        yield Problem(
            f"experts have a gate, and {model.activation} has none",
            fix="activation: swiglu",
            key="model.activation",
        )
    if model.mlp_bias and not moe.dense_layers:
        yield Problem(
            "gives the MLP of dense layers biases, and there are no dense layers",
            fix="mlp_bias: false; experts have them by moe.biases",
            key="model.mlp_bias",
        )


def _or_none(most: int) -> str:
    return f"dense_layers: at most {most}, or moe: null" if most else "moe: null"


def _groups(moe: Experts) -> Iterator[Problem]:
    """How the choice of groups goes with that of experts."""
    size, rest = divmod(moe.experts, moe.groups)
    if rest:
        yield Problem(
            f"{moe.experts} experts are not divisible by groups = {moe.groups}",
            fix=f"groups: {choices(divisors(moe.experts), moe.groups)}",
            key="model.moe.groups",
        )
    elif moe.groups > 1 and size < 2:
        yield Problem(
            f"{moe.groups} groups of one expert",
            why="the score of a group is the sum of its two best experts'",
            fix=f"groups: {choices(divisors(moe.experts)[:-1], moe.groups)}",
            key="model.moe.groups",
        )
    elif moe.top_groups > moe.groups:
        yield Problem(
            f"{moe.top_groups} groups are chosen, and there are {moe.groups}",
            fix=f"top_groups: at most {moe.groups}",
            key="model.moe.top_groups",
        )
    elif moe.top_k <= moe.experts and moe.top_groups * size < moe.top_k:
        yield Problem(
            f"{moe.top_groups} groups of {size} experts hold fewer than top_k {moe.top_k}",
            fix=f"top_groups: at least {-(-moe.top_k // size)}, or top_k: at most {moe.top_groups * size}",
            key="model.moe.top_groups",
        )


def experts(recipe: Recipe) -> Iterator[Problem]:
    """Whether ep and expert_tp divide what they share. dp is a number."""
    moe, parallelism = recipe.model.moe, recipe.topology
    ep, expert_tp = parallelism.ep, parallelism.expert_tp
    if moe is None:
        for key, size in (("ep", ep), ("expert_tp", expert_tp)):
            if size > 1:
                what = f"{key} {size} shares experts, and the model has none"
                yield Problem(what, fix=f"{key}: 1, or state model.moe", key=f"topology.{key}")
        return
    yield from _sequence(recipe)
    shared = moe.shared_ffn_hidden_size
    if shared is not None and shared % parallelism.tp:
        yield Problem(
            f"shared_ffn_hidden_size {shared} is not divisible by tp = {parallelism.tp}",
            fix=f"shared_ffn_hidden_size: {choices(multiples(parallelism.tp, shared), shared)}",
            key="model.moe.shared_ffn_hidden_size",
        )
    topology = Topology.of(recipe)
    stage = topology.stage_size
    ranks = " x ".join(f"{axis} {topology.size(axis)}" for axis in ("tp", "cp", "dp") if axis in topology.axes)
    ranks, why = f"the {stage} ranks of a stage ({ranks})", "experts are shared by ranks of one stage"
    if moe.ffn_hidden_size % expert_tp or stage % expert_tp:
        fix = f"expert_tp: {choices(divisors(gcd(moe.ffn_hidden_size, stage)), expert_tp)}"
        if moe.ffn_hidden_size % expert_tp:
            what, why = f"{moe.ffn_hidden_size} channels of an expert cannot be shared by expert_tp = {expert_tp}", ""
        else:
            what = f"{ranks} are not divisible by expert_tp {expert_tp}"
        yield Problem(what, why, fix, key="topology.expert_tp")
        return
    fits = divisors(gcd(moe.experts, stage // expert_tp))
    if moe.experts % ep:
        what, why = f"{moe.experts} experts cannot be shared by ep = {ep}", "every ep rank holds the same number"
        yield Problem(what, why, f"ep: {choices(fits, ep)}", key="topology.ep")
    elif ep not in fits:
        what = f"{ranks} are not divisible by ep {ep}" + f" x expert_tp {expert_tp}" * (expert_tp > 1)
        yield Problem(what, why, f"ep: {choices(fits, ep)}", key="topology.ep")
    elif topology.edp % (groups := parallelism.dp_replicate) and topology.dp % groups == 0:
        mends = [f"dp_replicate: {choices(divisors(gcd(topology.edp, topology.dp)), groups)}"]
        if near := choices((size for size in fits if stage // (size * expert_tp) % groups == 0), ep):
            mends.append(f"ep: {near}")
        yield Problem(
            f"{topology.edp} ranks hold the same experts, which dp_replicate = {groups} does not divide",
            why="each of its groups holds a full copy, of experts too",
            fix=", or ".join(mends),
            key="topology.dp_replicate",
        )


def _sequence(recipe: Recipe) -> Iterator[Problem]:
    """Whether each tp rank has an equal part of the tokens; where `sequence_parallel` asks for it, it is said there."""
    parallelism, seq_len = recipe.topology, recipe.training.seq_len
    parts = parallelism.cp * parallelism.tp
    if parallelism.sequence_parallel or parallelism.tp == 1 or not seq_len % parts or seq_len % parallelism.cp:
        return
    equation = f"cp {parallelism.cp} x " * (parallelism.cp > 1) + f"tp {parallelism.tp}"
    multiple = lcm(parts, piece_count(parallelism.cp_kind, parallelism.cp)) if parallelism.cp > 1 else parts
    yield Problem(
        f"seq_len {seq_len} is not divisible by {equation} = {parts}",
        why="each tp rank sends its own part of a sequence to the experts",
        fix=f"seq_len: {choices(multiples(multiple, seq_len), seq_len)}",
        key="training.seq_len",
    )


def expert_warnings(recipe: Recipe) -> Iterator[Problem]:
    """Routers that are not held in balance, or that the loss cannot reach; what is said of experts that are not."""
    moe = recipe.model.moe
    if moe is None:
        if recipe.hardware.imbalance > 1:
            yield Problem("has no effect: the model has no experts", key="hardware.imbalance")
        asked = recipe.training.recompute
        if not isinstance(asked, str) and "dispatch" in (*(asked.again or ()), *(asked.save or ())):
            yield Problem("names dispatch, and the model has no experts", key="training.recompute")
        return
    if moe.top_k == 1 and moe.normalize:
        yield Problem(
            "the router learns nothing from the loss: the weight of its one expert, over itself, is always 1",
            fix="normalize: false",
            key="model.moe.normalize",
        )
    if not moe.aux_loss and not moe.bias_rate and recipe.checkpoint.initial is None and moe.top_k < moe.experts:
        yield Problem(
            "nothing balances the load of the experts, and a router that starts anew often ends with a few of them",
            fix="aux_loss: 0.001, or bias_rate: 0.001",
            key="model.moe",
        )
