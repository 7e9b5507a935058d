"""Which parts of a block to make again in its backward pass: what each costs and saves, and the cheapest that fit.

Korthikanti et al. 2022 (arXiv 2205.05198) choose so by hand; here every set of parts is weighed by the planner's bytes
and seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

from tplaunch.check.recipe import Checked
from tplaunch.plan.activations import block_activations
from tplaunch.plan.case import Block, Case
from tplaunch.plan.change import Change, with_values
from tplaunch.plan.estimate import BlockWork, Plan, block_works, estimate, made_again
from tplaunch.recipe.schema import Model, Part, Recompute
from tplaunch.spec.gpu import Gpu
from tplaunch.spec.parameters import layer_kinds
from tplaunch.spec.recompute import ALL, CHEAP, PARTS, effective

# Fraction of GPU memory to leave free, against fragmentation.
HEADROOM = 0.05


class Option(NamedTuple):
    """Parts that blocks make again.

    Args:
        value: as `training.recompute` says it.
        seconds: of making them again, for one microbatch of one block, with communication; the mean of all blocks.
        kept: bytes that one block then keeps for one microbatch, the mean.
    """

    value: str | Recompute
    seconds: float
    kept: float


class PartCost(NamedTuple):
    """A part of the blocks, made again.

    Args:
        parts: it; or two, where neither saves anything without the other.
        block_bytes: what a block then no longer keeps for one microbatch, against one that keeps all.
        rank_bytes: the same on the fullest rank, for its microbatches in flight.
        seconds: of a step, on that rank.
    """

    parts: tuple[Part, ...]
    block_bytes: float
    rank_bytes: float
    seconds: float


def part_costs(plan: Plan) -> list[PartCost]:
    """What each part saves and costs, in the order of a block."""
    case, works = plan.case, block_works(plan.case)
    stages = case.stages_on(plan.fullest)
    found = []
    for parts in _smallest(case.model):
        again, saved = frozenset(parts), {}
        seconds = rank = 0.0
        for experts in case.kinds:
            block = Block(experts, again)
            keeps = block_activations(case, again, experts=experts)
            saved[experts] = block_activations(case, experts=experts) - keeps
            number = sum(case.expert_layers(s) if experts else len(s.layers) - case.expert_layers(s) for s in stages)
            seconds += case.microbatches * number * works[experts].again(made_again(case, block))
            rank += plan.step.in_flight[plan.fullest] * number / len(stages) * saved[experts]
        found.append(PartCost(parts, max(saved.values()), rank, seconds))
    return found


def _smallest(model: Model) -> Iterator[tuple[Part, ...]]:
    """The parts that save something by themselves, and pairs that do so only together."""
    possible = [part for part in PARTS if part in _effective(model, ALL)]
    for number, part in enumerate(possible):
        if _effective(model, frozenset((part,))):
            yield (part,)
            continue
        for other in possible[number + 1 :]:
            if _effective(model, frozenset((part, other))) == {part, other}:
                yield part, other


def _effective(model: Model, parts: frozenset[Part]) -> frozenset[Part]:
    """Of these parts those that save something in any of a model's blocks."""
    kinds = {model.has_experts(layer) for layer in layer_kinds(model)}
    return frozenset().union(*(effective(model, parts, experts=experts) for experts in kinds))


def options(case: Case, works: dict[bool, BlockWork] | None = None) -> list[Option]:
    """The sets of parts worth having, cheapest first: each keeps less than all that are cheaper.

    Args:
        works: of a block of each kind of the case, where they are known.
    """
    works, model = works or block_works(case), case.model
    parts = [part for part in PARTS if part in _effective(model, ALL)]
    sets = {_effective(model, frozenset(some)) for n in range(len(parts) + 1) for some in combinations(parts, n)}
    found = [_option(case, works, some) for some in sets]
    best: list[Option] = []
    for option in sorted(found, key=lambda option: option[1:]):
        if not best or option.kept < best[-1].kept:
            best.append(option)
    return best


def _option(case: Case, works: dict[bool, BlockWork], parts: frozenset[Part]) -> Option:
    seconds = keeps = 0.0
    for experts, number in case.kinds.items():
        share = number / case.model.num_layers
        seconds += share * works[experts].again(made_again(case, Block(experts, parts)))
        keeps += share * block_activations(case, parts, experts=experts)
    return Option(_value(case.model, parts), seconds, keeps)


def cheapest(found: list[Option], fits: Callable[[Option], bool]) -> Option | None:
    """The first of some options, cheapest first, that fits; None where none does.

    Less is kept from one to the next, but what is made again at one time may grow: the search halves, then goes back.
    """
    if fits(found[0]):
        return found[0]
    if not fits(found[-1]):
        return None
    low, high = 0, len(found) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(found[middle]) else (middle, high)
    while high > 1 and fits(found[high - 1]):
        high -= 1
    return found[high]


def cheapest_change(case: Case) -> Change | None:
    """The cheapest `training.recompute` with which a case fits, with room to spare; None where none does."""

    def fits(option: Option) -> bool:
        then = Change({"training.recompute": option.value}).apply(case)
        return then is not None and estimate(then).headroom >= HEADROOM * case.gpu.memory

    found = cheapest(options(case), fits)
    return None if found is None else Change({"training.recompute": found.value})


def settle(checked: Checked, gpu: Gpu | None) -> Checked:
    """A checked recipe with `training.recompute: auto` decided: the cheapest that fits; where nothing does, full.

    Args:
        gpu: what it is to run on; None: a CPU, whose memory is not planned: nothing is made again.
    """
    recipe = checked.recipe
    if recipe.training.recompute != "auto":
        return checked
    if gpu is None:
        return checked._replace(recipe=with_values(recipe, {"training.recompute": "none"}))
    case = Case(recipe, gpu)
    then = (cheapest_change(case) or Change({"training.recompute": "full"})).apply(case)
    assert then is not None, "recomputation breaks no rule"
    return checked._replace(recipe=then.recipe)


def _value(model: Model, parts: frozenset[Part]) -> str | Recompute:
    """The shortest way to say that blocks make these parts again."""
    named: dict[str, frozenset[Part]] = {"none": frozenset(), "cheap": CHEAP, "full": ALL}
    for name, meant in named.items():
        if _effective(model, meant) == parts:
            return name
    return Recompute(again=[part for part in PARTS if part in parts])
