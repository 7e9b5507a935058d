"""The course of a run: batch size, learning rate and weight decay of every step, and what is consumed by then. One pure
function of the recipe, torch-free: the planner, the trainer and every record read it, and nothing else computes them.

A step is one place of the run, whether it is named by its number, from 1, or by the samples or tokens consumed before
it: integers, exact for as long as a run may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.batches import Batches
from tplaunch.spec.pieces import Curve, Formula, Part, curve, shorthand, staged
from tplaunch.units import Length, LengthUnit


class Place(NamedTuple):
    """A step of the run.

    Args:
        step: its number, from 1.
        stage: number of its stage, from 0.
        samples, tokens: consumed when it has ended.
        batch_size: samples of it.
        seq_len: tokens of each of them.
        lr, weight_decay: of its update.
    """

    step: int
    stage: int
    samples: int
    tokens: int
    batch_size: int
    seq_len: int
    lr: float
    weight_decay: float


class Course:
    """The course of a run.

    Args:
        recipe: need not be resolved.

    Attributes:
        batches: its steps in samples and tokens.
        steps: how many they are.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.batches = Batches(recipe.training)
        self.steps = self.batches.reach(self.batches.run)

    @cached_property
    def scheduled(self) -> Curve:
        """The learning rate of `lr_schedule`, which stages may replace."""
        schedule, peak = self.recipe.lr_schedule, self.recipe.optimizer.lr
        if schedule.pieces is None:
            return shorthand(schedule, peak, self.batches, self.steps)
        return curve(schedule.pieces, peak, self.batches, self.steps)

    @cached_property
    def rates(self) -> Curve:
        """The learning rate."""
        stages = self.recipe.training.stages or ()
        if all(stage.lr is None for stage in stages):
            return self.scheduled
        ends = [*self.batches.stage_ends, self.steps]
        return staged(self.scheduled, [stage.lr for stage in stages], ends, self.recipe.optimizer.lr, self.batches)

    @cached_property
    def decays(self) -> Curve:
        """The weight decay."""
        settings = self.recipe.optimizer
        if settings.weight_decay_schedule is None:
            return Curve(self.batches, [Part(1, self.steps, Formula("constant", settings.weight_decay))])
        return curve(settings.weight_decay_schedule, settings.weight_decay, self.batches, self.steps)

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.batches.tokens(self.steps)

    @property
    def stages(self) -> list[range]:
        """The steps of each stage; of a run without stages, all."""
        ends = [*self.batches.stage_ends, self.steps]
        return [range(begin + 1, end + 1) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def batch_size(self, step: int) -> int:
        """Samples of a step."""
        return self.batches.size(step)

    def first_sample(self, step: int) -> int:
        """Samples that the steps before a step consume, when all are trained by this recipe."""
        return self.batches.samples(step - 1)

    def tokens_of(self, step: int) -> int:
        """Tokens of a step."""
        return self.batches.tokens(step) - self.batches.tokens(step - 1)

    def lr(self, step: int) -> float:
        """The learning rate of a step's update."""
        return self.rates.at(step)

    def weight_decay(self, step: int) -> float:
        """The weight decay of a step's update."""
        return self.decays.at(step)

    def at(self, step: int) -> Place:
        """All of a step."""
        batches = self.batches
        done = batches.samples(step), batches.tokens(step)
        shape = self.batch_size(step), batches.seq_len(step)
        return Place(step, batches.stage(step), *done, *shape, self.lr(step), self.weight_decay(step))

    def at_tokens(self, tokens: int) -> Place:
        """All of the step that begins when so many tokens are consumed, or that is then under way."""
        return self.at(self.batches.reach(Length(tokens + 1, "tokens")))

    def decay_factor(self, step: int) -> float:
        """What the weight decay of every group of parameters is multiplied by, for a step's update."""
        settings = self.recipe.optimizer
        return 1.0 if settings.weight_decay_schedule is None else self.weight_decay(step) / settings.weight_decay

    def due(self, every: Length | None, step: int) -> bool:
        """Whether something is due after a step that is done every so often: whether the step is the first to end at or
        after a multiple of it. Of every step 0 or None, never."""
        if not every:
            return False
        if every.unit == "steps":
            return step % int(every.amount) == 0
        unit, numerator, denominator = self._interval(every)
        before, after = (self.batches.consumed(one, unit) * denominator // numerator for one in (step - 1, step))
        return after > before

    def dues(self, every: Length | None, steps: range) -> Iterator[int]:
        """Of some steps those after which something is due, in order: found one from the other, not by trying all."""
        if not every:
            return
        if every.unit == "steps":
            each = int(every.amount)
            yield from range(-(-steps.start // each) * each, steps.stop, each)
            return
        unit, numerator, denominator = self._interval(every)
        step = steps.start - 1
        while True:
            times = self.batches.consumed(step, unit) * denominator // numerator + 1
            step = self.batches.reach(Length(-(-times * numerator // denominator), unit))
            if step >= steps.stop:
                return
            yield step

    def _interval(self, every: Length) -> tuple[LengthUnit, int, int]:
        """A length in what it, or of a share the run's length, is said in: unit, numerator, denominator."""
        whole = self.batches.run if every.unit == "%" else Length(1, every.unit)
        numerator, denominator = every.amount.as_integer_ratio()
        return whole.unit, int(whole.amount) * numerator, denominator * (100 if every.unit == "%" else 1)


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe with the number of steps that its tokens, or samples, take."""
    training = recipe.training
    if training.length.unit == "steps":
        return recipe
    return recipe.model_copy(update={"training": training.model_copy(update={"steps": Course(recipe).steps})})
