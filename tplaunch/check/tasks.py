"""What is wrong with `eval.tasks`: files that are not there or no questions, names twice, no tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tplaunch.check.data import data_file
from tplaunch.data.endings import is_raw
from tplaunch.data.questions import ask, read_questions
from tplaunch.errors import Problem, RecipeError, TplaunchError
from tplaunch.recipe.schema import Recipe


def task_problems(recipe: Recipe) -> Iterator[Problem]:
    """What the recipe alone tells."""
    seen: set[str] = set()
    for number, task in enumerate(recipe.eval.tasks):
        if task.label in seen:
            fix = "give one of them another name"
            yield Problem(f"there are two tasks {task.label}", fix=fix, key=f"eval.tasks[{number}].name")
        seen.add(task.label)


def task_warnings(recipe: Recipe) -> Iterator[Problem]:
    """Tasks that nothing is measured by."""
    if recipe.eval.tasks and not recipe.training.eval_every:
        yield Problem("are never measured: training.eval_every is 0", fix="set training.eval_every", key="eval.tasks")


def missing_tasks(recipe: Recipe) -> Iterator[Problem]:
    """Files that are not there or cannot be read, and questions that are none."""
    for number, task in enumerate(recipe.eval.tasks):
        key = f"eval.tasks[{number}].{'data' if task.choices is None else 'choices'}"
        if task.choices is None:
            found = list(data_file(task.path, key))
            yield from found
            if not found and os.path.isfile(task.path) and not os.access(task.path, os.R_OK):
                yield Problem(f"{task.path} cannot be read", why="no permission", key=key)
            continue
        try:
            read_questions(Path(task.path))
        except TplaunchError as error:
            yield from (replace(problem, key=key) for problem in error.problems)


def check_choices(recipe: Recipe, tokenizer: Path | None) -> None:
    """Refuse choices that have no room in `training.seq_len`; the run's tokenizer is there now.

    Raises:
        RecipeError: holds every problem.
    """
    from tplaunch.data.pairs import Words  # imports numpy
    from tplaunch.data.tokenizer import Tokenizer

    problems: list[Problem] = []
    for number, task in enumerate(recipe.eval.tasks):
        if task.choices is None or tokenizer is None or not recipe.training.eval_every:
            continue
        try:
            words = Words(Tokenizer(tokenizer, recipe.data.eod), tokenizer, recipe.training.seq_len)
            ask(Path(task.choices), words)
        except TplaunchError as error:
            key, fix = f"eval.tasks[{number}].choices", "shorter choices, or a greater training.seq_len"
            problems += (replace(problem, key=key, fix=fix) for problem in error.problems)
    if problems:
        raise RecipeError(*problems)


def tasks_without_tokenizer(recipe: Recipe) -> Iterator[Problem]:
    """Tasks that are text, in a run whose data were tokenized elsewhere."""
    data = recipe.data
    sources = [Path(source.path) for source in recipe.corpora]
    text = [task for task in recipe.eval.tasks if task.choices is not None or is_raw(Path(task.path))]
    if not text or data.tokenizer is not None or any(is_raw(path) for path in sources):
        return
    from tplaunch.data.corpus import tokenizer_path  # imports numpy

    if not any(tokenizer_path(path).is_file() for path in sources):
        why = f"{os.path.basename(text[0].path)} is text, and the data were tokenized elsewhere"
        yield Problem("need a tokenizer", why, "data.tokenizer: the tokenizer.json of the data", key="eval.tasks")
