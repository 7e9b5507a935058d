"""Questions with choices, as files hold them, and as rows. Imports no numpy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tplaunch.errors import Problem, TplaunchError

if TYPE_CHECKING:
    from tplaunch.data.pairs import Pair, Words

_DELIMITER = " "  # between a question and its answer: lm-eval's `target_delimiter`
_NAMED = 10  # mistakes of a file in a message
_FORM = '{"question": "...", "choices": ["...", "..."], "answer": 0}'


@dataclass(frozen=True)
class Question:
    """A question.

    Args:
        query: what the model reads.
        choices: texts to follow it.
        answer: number of the right one.
    """

    query: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: Path) -> list[Question]:
    """Read JSON lines of questions: `query` or `question`; `choices`, texts; `answer` or `gold`, the number of the
    right one, from 0, or its text.

    Raises:
        TplaunchError: the file cannot be read, holds no question, or one that is none; its line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        what = f"{path}: cannot read the questions"
        raise TplaunchError(Problem(what, why=error.strerror or str(error), key="--choices")) from None
    except UnicodeDecodeError as error:
        raise TplaunchError(Problem("not UTF-8", where=f"{path}: byte {error.start}", key="--choices")) from None
    found, problems = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_question(json.loads(line)))
        except (ValueError, RecursionError) as error:
            why = "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(Problem("no question with choices", why=why, fix=_FORM, where=f"{path}:{number}"))
    if problems:
        more = len(problems) - _NAMED
        raise TplaunchError(*problems[:_NAMED], *([Problem(f"and {more:,} more")] if more > 0 else []))
    if not found:
        raise TplaunchError(Problem(f"{path} has no question", fix=f"write one a line: {_FORM}"))
    return found


def _question(record: Any) -> Question:
    """Raises ValueError, with what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"it is a {type(record).__name__}")
    query = next((record[name] for name in ("query", "question") if name in record), None)
    if not isinstance(query, str):
        raise ValueError("it has no text `query` or `question`")
    choices = record.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise ValueError("`choices` must be two texts or more")
    if not all(one.strip() for one in choices):
        raise ValueError(f"choice {next(i for i, one in enumerate(choices) if not one.strip())} is empty")
    answer = next((record[name] for name in ("answer", "gold") if name in record), None)
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` must be a number from 0 to {len(choices) - 1}, or the text of a choice")
    return Question(query, tuple(choices), answer)


@dataclass(frozen=True)
class Asked:
    """Questions as rows.

    Args:
        questions: the questions.
        pairs: of each choice of each, in order.
        warnings: what is likely not meant.
    """

    questions: list[Question]
    pairs: list[Pair]
    warnings: list[str]


def ask(path: Path, words: Words) -> Asked:
    """Read questions, and make rows of them.

    Raises:
        TplaunchError: see `read_questions`; or a choice has more tokens than the model sees at once.
    """
    questions = read_questions(path)
    pairs = [words.pair(one.query, _DELIMITER + choice) for one in questions for choice in one.choices]
    if any(pair.cut and pair.first == 1 for pair in pairs):
        what = f"{path}: a choice has as many tokens as the {words.limit:,} that the model sees at once, or more"
        raise TplaunchError(Problem(what, fix="shorter choices, or a greater --seq-len", key="--choices"))
    cut = sum(pair.cut > 0 for pair in pairs)
    warnings = [f"{path}: of {cut:,} of {len(pairs):,} choices the question's beginning is left out"] if cut else []
    return Asked(questions, pairs, warnings)
