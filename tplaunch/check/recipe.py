"""Checks that span several recipe fields. Each problem says what is wrong and how to fix it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from tplaunch.check.data import chat_problems, missing_files, tokenizer_problems, with_tokenizer
from tplaunch.check.experts import expert_warnings, experts
from tplaunch.check.lora import lora_problems, missing_base
from tplaunch.check.model import model_problems
from tplaunch.check.observe import hook_problems, missing_packages, observe_warnings, profile_problems
from tplaunch.check.optimizer import optimizer_problems, optimizer_warnings
from tplaunch.check.rules import batch, context_parallel, pipeline, tensor_parallel
from tplaunch.check.run import run_problems, run_warnings
from tplaunch.check.samples import prompt_problems, sample_problems, sample_warnings
from tplaunch.check.schedule import length_problems, schedule_problems, schedule_warnings
from tplaunch.check.stages import stage_length_problems, stage_problems, with_topologies
from tplaunch.check.tasks import missing_tasks, task_problems, task_warnings, tasks_without_tokenizer
from tplaunch.check.world import data_parallel, placement_warnings
from tplaunch.data.documents import with_document_length
from tplaunch.errors import Problem, RecipeError
from tplaunch.recipe.load import LoadedRecipe
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import with_steps
from tplaunch.spec.lora import trainable_count
from tplaunch.spec.optimizer import kept_in_words
from tplaunch.spec.parameters import active_parameter_count, parameter_count
from tplaunch.spec.resolve import resolve
from tplaunch.spec.run_stages import carried, in_force, segment_after
from tplaunch.spec.topology import Topology
from tplaunch.units import format_count


class Checked(NamedTuple):
    """A recipe that can run.

    Attributes:
        recipe: as loaded, and resolved: `topology.dp`, `gpus_per_node` and `stage_layers` are stated.
        warnings: settings that work but are probably mistakes.
        where: tells where a dotted key is said.
    """

    recipe: Recipe
    warnings: list[Problem]
    where: Callable[[str], str] = lambda key: ""

    @property
    def topology(self) -> Topology:
        """Its rank grid."""
        return Topology.of(self.recipe)

    def at(self, step: int) -> Checked:
        """What the workers train that begin after a step: the recipe as it is in force there."""
        recipe = segment_after(self.recipe, step).recipe
        return self if recipe == self.recipe else self._replace(recipe=resolve(with_document_length(recipe)))

    def describe(self) -> str:
        """Topology, model and batch in words."""
        recipe, topology, training = self.recipe, self.topology, self.recipe.training
        where = f" on {topology.nodes} nodes" if topology.nodes > 1 else ""
        layers = "+".join(map(str, recipe.topology.stage_layers or ()))
        split = f", layers {layers} by {recipe.topology.schedule}" if topology.pp > 1 else ""
        spread = f", experts {topology.expert_sizes}" if topology.expert_sizes else ""
        active = f" ({format_count(active_parameter_count(recipe.model))} active)" if recipe.model.moe else ""
        adapters = ""
        if recipe.lora is not None:
            count = trainable_count(recipe.model, recipe.lora)
            adapters = f", frozen, with {format_count(count)} in adapters of rank {recipe.lora.rank}"
        return (
            f"{topology.sizes} = {topology.world_size} ranks{where}{spread}{split}; "
            f"{format_count(parameter_count(recipe.model))} parameters{active}{adapters} in {training.precision}"
            f"{kept_in_words(recipe)}; "
            f"{training.global_batch_size} x {training.seq_len} tokens a step, {format_count(training.steps)} steps"
        )


def check_recipe(loaded: LoadedRecipe, *, gpus: int | None = None, need_data: bool = True) -> Checked:
    """Check everything that needs more than one field, this machine's GPUs, or a look at the data files.

    Args:
        loaded: the recipe.
        gpus: GPUs (or processes, on the CPU) that the whole run can have; `dp: auto` fills them. None: not known.
        need_data: refuse missing data files; otherwise (to plan, say) they are warnings.

    Raises:
        RecipeError: holds every problem that was found.
    """
    recipe = carried(with_tokenizer(loaded.recipe))
    lengths = [*length_problems(recipe), *stage_length_problems(recipe)]
    later: list[Problem] = []  # of the shapes of later stages
    if not lengths:
        recipe, later = with_topologies(in_force(with_steps(recipe), 0), gpus)
    problems = [
        *(lengths or [*schedule_problems(recipe), *stage_problems(recipe), *later]),
        *model_problems(recipe.model, recipe.training.seq_len),
        *tensor_parallel(recipe),
        *context_parallel(recipe),
        *pipeline(recipe),
    ]
    dp, dp_problems = data_parallel(recipe, gpus)
    problems += dp_problems
    if dp is not None:
        recipe = recipe.model_copy(update={"topology": recipe.topology.model_copy(update={"dp": dp})})
        problems += [*experts(recipe), *batch(recipe, dp), *profile_problems(recipe)]
    problems += [*run_problems(recipe), *optimizer_problems(recipe), *hook_problems(recipe)]
    problems += [*lora_problems(recipe)]
    problems += [*sample_problems(recipe), *tokenizer_problems(recipe), *chat_problems(recipe), *task_problems(recipe)]
    warnings = [*([] if problems else schedule_warnings(recipe)), *run_warnings(recipe)]
    warnings += [*optimizer_warnings(recipe), *expert_warnings(recipe)]
    warnings += [*observe_warnings(recipe), *sample_warnings(recipe), *task_warnings(recipe)]
    missing = [*missing_files(recipe), *missing_tasks(recipe), *missing_packages(recipe), *missing_base(recipe)]
    (problems if need_data else warnings).extend(missing)
    if need_data and not missing:
        problems += [*prompt_problems(recipe), *tasks_without_tokenizer(recipe)]

    def placed(found: list[Problem]) -> list[Problem]:
        return [replace(problem, where=problem.where or _place(loaded, problem.key)) for problem in found]

    if problems or dp is None:
        raise RecipeError(*placed(problems))
    recipe = resolve(with_document_length(recipe))
    warnings += [*placement_warnings(Topology.of(recipe), recipe.topology.async_tp)]
    return Checked(recipe, placed(warnings), partial(_place, loaded))


def _place(loaded: LoadedRecipe, key: str) -> str:
    """Where a key is said; for a default, where its section is, or the file."""
    while key:
        if where := loaded.where(key):
            return where
        key = key.rpartition(".")[0]
    return str(loaded.path)
