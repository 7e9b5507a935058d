"""Questions with choices, answered by lm-eval's conventions (`output_type: multiple_choice`). Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tplaunch.check.recipe import Checked
from tplaunch.checkpoint.origin import Origin
from tplaunch.data.pairs import as_rows
from tplaunch.data.progress import Progress
from tplaunch.data.questions import Asked
from tplaunch.evaluate.run import run_rows


@dataclass(frozen=True)
class ChoiceScore:
    """How many questions are answered right.

    A model's answer is the choice with the greatest log-likelihood, of equal ones the first.

    Args:
        acc: of all questions.
        acc_norm: by log-likelihood a character of the choice, as lm-eval has it.
        acc_bytes: by log-likelihood a byte of the choice in UTF-8.
        acc_stderr, acc_norm_stderr, acc_bytes_stderr: standard errors of these; None of one question.
        questions: how many there are.
        cut: choices whose question was too long for the model, and lost its beginning.
    """

    acc: float
    acc_norm: float
    acc_bytes: float
    acc_stderr: float | None
    acc_norm_stderr: float | None
    acc_bytes_stderr: float | None
    questions: int
    cut: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"kind": "choices", **asdict(self)}


def score_choices(origin: Origin, checked: Checked, asked: Asked) -> ChoiceScore:
    """Answer questions on the ranks of a recipe.

    Raises:
        TplaunchError: a rank failed; what it said is on stderr.
    """
    found = run_rows(origin, checked, len(asked.pairs), {"rows": as_rows(asked.pairs)}, Progress())
    return summarize(asked, [-loss for loss, _ in found])


def summarize(asked: Asked, likelihoods: Sequence[float]) -> ChoiceScore:
    """Count right answers.

    Args:
        likelihoods: log-likelihood of each choice of each question, in order.
    """
    scores = iter(likelihoods)
    by_question = [[next(scores) for _ in one.choices] for one in asked.questions]

    def share(length: Callable[[str], int]) -> tuple[float, float | None]:
        """Of right answers, and its standard error."""
        right = 0
        for one, some in zip(asked.questions, by_question, strict=True):
            per_length = [score / length(choice) for score, choice in zip(some, one.choices, strict=True)]
            right += per_length.index(max(per_length)) == one.answer
        count = len(asked.questions)
        mean = right / count
        return mean, math.sqrt(mean * (1 - mean) / (count - 1)) if count > 1 else None

    acc, acc_norm, acc_bytes = share(lambda _: 1), share(len), share(lambda text: len(text.encode()))
    return ChoiceScore(
        acc=acc[0],
        acc_norm=acc_norm[0],
        acc_bytes=acc_bytes[0],
        acc_stderr=acc[1],
        acc_norm_stderr=acc_norm[1],
        acc_bytes_stderr=acc_bytes[1],
        questions=len(asked.questions),
        cut=sum(pair.cut > 0 for pair in asked.pairs),
    )
