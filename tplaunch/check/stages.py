"""What is wrong with the stages of a run (`training.stages`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tplaunch.check.experts import experts
from tplaunch.check.model import model_problems
from tplaunch.check.rules import batch, context_parallel, pipeline, tensor_parallel
from tplaunch.check.schedule import beyond, jumps, no_step, piece_problems, shape_problems
from tplaunch.check.world import data_parallel
from tplaunch.data.amounts import WORN_OUT, amounts, format_epochs
from tplaunch.errors import Problem
from tplaunch.recipe.schema import Piece, Recipe
from tplaunch.spec.course import Course
from tplaunch.spec.pieces import moved
from tplaunch.spec.resolve import resolve
from tplaunch.spec.run_stages import alone, in_force, longest_samples, segments
from tplaunch.units import Length

_KEY = "training.stages"


def stage_length_problems(recipe: Recipe) -> Iterator[Problem]:
    """Where stages end: without it no step has a place."""
    stages = recipe.training.stages or ()
    for number, stage in enumerate(stages):
        key = f"{_KEY}[{number}]"
        if stage.until is not None and stage.last is not None:
            yield Problem("until and last both say where it ends", fix="keep one", key=f"{key}.last")
        elif stage.until is None and stage.last is None and number < len(stages) - 1:
            fix = "until: where in the run it ends, or last: how long it is"
            yield Problem("does not say where it ends: only the last stage need not", fix=fix, key=key)


def stage_problems(recipe: Recipe) -> Iterator[Problem]:
    """What else is wrong with the stages of a run whose lengths are sound, but for what depends on the machine."""
    stages = recipe.training.stages or ()
    if not stages:
        return
    found = [*_places(recipe)]
    yield from found or _rates(recipe)
    yield from _samples(recipe)
    if not found:
        yield from _worn_out(recipe)
    if recipe.training.recompute == "auto" and len(segments(recipe)) > 1:
        why = "what fits is found for one shape, and the stages have several"
        fix = "say what the largest needs: none, cheap or full; `tplaunch plan` shows the memory of each"
        yield Problem("auto has no place beside stages of other shapes", why, fix, key="training.recompute")


def _places(recipe: Recipe) -> Iterator[Problem]:
    """Stages that have no step, and a last one that does not end where the run does."""
    course, stages = Course(recipe), recipe.training.stages or ()
    for number, steps in enumerate(course.stages):
        key, begin, end = f"{_KEY}[{number}]", steps.start - 1, steps.stop - 1
        if begin >= course.steps:
            yield beyond(begin, course.steps, key)
            return
        if number < len(stages) - 1 and end > course.steps:
            what = f"ends with step {end}, beyond the run, which ends with step {course.steps}"
            yield Problem(what, fix="a longer run, or an earlier end", key=key)
            return
        if end <= begin:
            said = stages[number].until
            yield no_step(begin, course.batches.reach(said) if said else end, key, "stage")
            return
    last, batches = [*stages][-1], course.batches
    key, first = f"{_KEY}[{len(stages) - 1}]", course.stages[-1].start
    end = course.steps
    if last.until is not None:
        end = batches.reach(last.until)
    elif last.last is not None:
        end = batches.reach(moved(Length(first - 1), batches.place(last.last), batches))
    if end != course.steps:
        what = f"the last stage ends with step {end}, the run with step {course.steps}"
        fix = "leave its end out, or say the run's length: training.steps, tokens or samples"
        yield Problem(what, fix=fix, key=key)


def _rates(recipe: Recipe) -> Iterator[Problem]:
    """Rates of stages that cannot be, and those that jump."""
    course, stages, highest = Course(recipe), recipe.training.stages or (), recipe.optimizer.lr
    for number, (stage, steps) in enumerate(zip(stages, course.stages, strict=True)):
        key = f"{_KEY}[{number}]"
        if stage.lr is not None and (found := [*_own_rate(stage.lr, f"{key}.lr", highest)]):
            yield from found
            continue
        part = course.rates.part(steps.start)
        if stage.lr is not None:
            key += ".lr"
            yield from shape_problems(part, key)
        if number:
            before, after = course.lr(steps.start - 1), course.lr(steps.start)
            after = after if stage.lr is None else part.formula.start
            fix = f"lr: {{kind: linear, from: {before:g}, to: a rate}}, or another lr_schedule"
            yield from jumps(before, after, steps.start, fix, key)


def _own_rate(rate: float | Piece, key: str, highest: float) -> Iterator[Problem]:
    """What is wrong with the rate that a stage says."""
    if not isinstance(rate, Piece):
        if rate > highest:
            what = f"{rate:g} is above optimizer.lr {highest:g}, the highest"
            yield Problem(what, fix="raise optimizer.lr", key=key)
    elif (length := rate.for_ or rate.until) is not None:
        name = "for" if length is rate.for_ else "until"
        yield Problem("is as long as its stage", fix=f"leave {name} out", key=f"{key}.{name}")
    else:
        yield from piece_problems(rate, key, highest)


def _samples(recipe: Recipe) -> Iterator[Problem]:
    """Lengths of samples that do not fit each other."""
    stages, longest = recipe.training.stages or (), longest_samples(recipe)
    lengths = {stage.seq_len for stage in stages if stage.seq_len is not None}
    if recipe.data.packs and len(lengths) > 1:
        why = "whole documents are packed into rows of one length, of which each is read once"
        fix = "one length, or data.packing: concatenate"
        yield Problem(f"has samples of {' and '.join(map(str, sorted(lengths)))} tokens", why, fix, key=_KEY)
        return
    for number, stage in enumerate(stages):
        for source in in_force(recipe, number).data.sources("train"):
            if stage.seq_len is not None and longest[source.path] % stage.seq_len:
                yield Problem(
                    f"samples of {stage.seq_len} tokens do not divide those of {longest[source.path]} that another "
                    f"stage reads of {source.path}",
                    why="text is shuffled by pieces of the longest samples, of which shorter ones are parts",
                    fix="lengths of which each divides the next, such as 4096, 8192, 32768",
                    key=f"{_KEY}[{number}].seq_len",
                )
                break


def _worn_out(recipe: Recipe) -> Iterator[Problem]:
    """Stages that are too long for their corpora."""
    for amount in amounts(recipe):
        for number, epochs in enumerate(amount.by_stage):
            if epochs > WORN_OUT * (1 + 1e-9):
                yield Problem(
                    f"reads {amount.path} {format_epochs(epochs)}",
                    why=f"past {WORN_OUT}, repeated text teaches less and less (Muennighoff et al. 2023, arXiv "
                    "2305.16264)",
                    fix="more text, a smaller weight, or a shorter stage",
                    key=f"{_KEY}[{number}]",
                )


def with_topologies(recipe: Recipe, gpus: int | None) -> tuple[Recipe, list[Problem]]:
    """The recipe with the topology of each stage resolved, and what is wrong with the shapes of any but the first."""
    stages, problems, course = [*(recipe.training.stages or ())], [], Course(recipe)
    for number, stage in enumerate(stages):
        own = alone(recipe, number)
        shape = [
            *model_problems(own.model, own.training.seq_len),
            *tensor_parallel(own),
            *context_parallel(own),
            *pipeline(own),
        ]
        dp, more = data_parallel(own, gpus)
        shape += more
        if dp is not None:
            own = own.model_copy(update={"topology": own.topology.model_copy(update={"dp": dp})})
            shape += experts(own)
            blocks = [block for block in course.batches.blocks if block.stage == number and block.step < course.steps]
            for size in sorted({block.size for block in blocks}):
                training = own.training.model_copy(update={"global_batch_size": size})
                shape += batch(own.model_copy(update={"training": training}), dp)
            if not shape:
                stages[number] = stage.model_copy(update={"topology": _stated(resolve(own))})
        if number:
            problems += [_of_stage(problem, number, stage.name) for problem in shape]
    training = recipe.training.model_copy(update={"stages": stages or None})
    return recipe.model_copy(update={"training": training}), problems


def _stated(recipe: Recipe) -> object:
    """The topology, every key said."""
    topology = recipe.topology
    return topology.model_copy(update={key: getattr(topology, key) for key in type(topology).model_fields})


def _of_stage(problem: Problem, number: int, name: str | None) -> Problem:
    """A problem of a stage's recipe, said of the stage."""
    section, _, key = problem.key.partition(".")
    own = {"training": key, "model": key, "topology": f"topology.{key}"}.get(section)
    what = f"in stage {number + 1}{f' ({name})' if name else ''}: {problem.what}"
    return replace(problem, what=what, key=f"{_KEY}[{number}].{own}" if own else problem.key)
