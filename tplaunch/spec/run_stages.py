"""The stages of a run (`training.stages`) as recipes: what is in force in each, and where new workers take over.

A stage is as the one before it, but for what it names. Its data, batch and rate change within a process; the model's
shapes and the topology do not, so that workers end where those change, and others go on from their checkpoint.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from tplaunch.recipe.schema import LrSchedule, Parallelism, Recipe, Stage, StageCheckpoint, StageData, occurrences
from tplaunch.spec.course import Course

# What a stage has from the one before, unless it names it.
_CARRIED = ("data", "seq_len", "micro_batch_size", "document_mask", "rope_theta", "topology", "checkpoint")


class Segment(NamedTuple):
    """Steps of a run that the same workers train.

    Args:
        stages: numbers of its stages, from 0.
        steps: its steps.
        recipe: in force there; what changes from stage to stage within it is that of the first.
    """

    stages: range
    steps: range
    recipe: Recipe


def carried(recipe: Recipe) -> Recipe:
    """The recipe with each of its stages stated in full; a recipe in which they are is returned as it is."""
    training = recipe.training
    if not training.stages:
        return recipe
    now = Stage(
        data=StageData(train=recipe.data.train),
        seq_len=training.seq_len,
        micro_batch_size=training.micro_batch_size,
        document_mask=training.document_mask,
        rope_theta=recipe.model.rope_theta,
        topology=recipe.topology,
        checkpoint=StageCheckpoint(every=recipe.checkpoint.every),
    )
    size = None if training.batch_ramp_up or training.batch_schedule else training.global_batch_size
    found = []
    for stage in training.stages:
        update = {key: value for key in _CARRIED if (value := getattr(stage, key)) is not None}
        now = now.model_copy(update={**update, "topology": _carried_topology(now.topology, stage.topology)})
        size = stage.global_batch_size or size
        own = {key: getattr(now, key) for key in _CARRIED}
        found.append(stage.model_copy(update={**own, "global_batch_size": size}))
    if found == training.stages:
        return recipe
    return recipe.model_copy(update={"training": training.model_copy(update={"stages": found})})


def _carried_topology(before: Parallelism | None, named: Parallelism | None) -> Parallelism:
    """The topology of a stage, every key stated. What followed from keys that it changes is found anew."""
    assert before is not None  # see `carried`
    changes = {} if named is None else {key: getattr(named, key) for key in named.model_fields_set}
    now = {**{key: getattr(before, key) for key in Parallelism.model_fields}, **changes}
    moved = {key for key, value in changes.items() if getattr(before, key) != value}
    if moved and now["dp"] != "auto":  # which fills the nodes as they are
        now["gpus_per_node"] = changes.get("gpus_per_node")
    if moved & {"pp", "schedule", "virtual_stages"}:
        now["stage_layers"] = changes.get("stage_layers")
    return before.model_copy(update=now)


def in_force(recipe: Recipe, number: int) -> Recipe:
    """The recipe with what is in force in a stage, beside all stages; its course is that of the whole run."""
    recipe = carried(recipe)
    if recipe.training.stages is None:
        return recipe
    stage = recipe.training.stages[number]
    own = ["seq_len", "micro_batch_size", "document_mask"]
    if not (recipe.training.batch_ramp_up or recipe.training.batch_schedule):
        own.append("global_batch_size")  # beside these the size that they lead to stays: the course hangs on it
    shapes = {key: getattr(stage, key) for key in own}
    assert stage.data is not None and stage.checkpoint is not None  # carried
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"rope_theta": stage.rope_theta}),
            "topology": stage.topology,
            "training": recipe.training.model_copy(update=shapes),
            "data": recipe.data.model_copy(update={"train": stage.data.train}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": stage.checkpoint.every}),
        }
    )


def shares(recipe: Recipe, number: int) -> dict[tuple[str, int], float]:
    """The share of each corpus of what a stage reads, by path and how often that came before (`occurrences`)."""
    sources = in_force(recipe, number).data.sources("train")
    largest = max(source.weight for source in sources)  # before they are added: no sum is infinite
    total = sum(source.weight / largest for source in sources)
    return {name: source.weight / largest / total for name, source in zip(occurrences(sources), sources, strict=True)}


def longest_samples(recipe: Recipe) -> dict[str, int]:
    """Tokens of the longest samples that are made of each corpus of the training data, by path."""
    found: dict[str, int] = {}
    for number in range(len(recipe.training.stages or (0,))):
        stage = in_force(recipe, number)
        for source in stage.data.sources("train"):
            found[source.path] = max(found.get(source.path, 0), stage.training.seq_len)
    return found


def alone(recipe: Recipe, number: int) -> Recipe:
    """A stage as a run of its own, of its last batch size: for what depends on shapes alone, such as memory."""
    course = Course(recipe)
    steps, now = course.stages[number], in_force(recipe, number)
    last = max(1, steps.stop - 1)
    lengths = {"steps": max(1, len(steps)), "tokens": None, "samples": None}
    sizes = {"global_batch_size": course.batch_size(last), "batch_ramp_up": None, "batch_schedule": None}
    training = now.training.model_copy(update={**lengths, **sizes, "stages": None})
    optimizer = now.optimizer.model_copy(update={"weight_decay_schedule": None})
    return now.model_copy(update={"training": training, "optimizer": optimizer, "lr_schedule": LrSchedule()})


def segments(recipe: Recipe) -> list[Segment]:
    """The parts of a run that the same workers train, in order; a run without stages is one."""
    recipe = carried(recipe)
    course, stages = Course(recipe), recipe.training.stages or [Stage()]
    together = ("seq_len", "micro_batch_size", "document_mask", "rope_theta", "topology")

    def shapes(number: int) -> list[object]:
        return [getattr(stages[number], key) for key in together]

    found = []
    for _, group in groupby(range(len(stages)), shapes):
        numbers = [*group]
        first, last = course.stages[numbers[0]], course.stages[numbers[-1]]
        steps = range(first.start, last.stop)
        found.append(Segment(range(numbers[0], numbers[-1] + 1), steps, in_force(recipe, numbers[0])))
    return found


def segment_after(recipe: Recipe, step: int) -> Segment:
    """The part of the run that the step after `step` belongs to; of a run that is done, the last."""
    found = segments(recipe)
    return next((one for one in found if step + 1 < one.steps.stop), found[-1])
