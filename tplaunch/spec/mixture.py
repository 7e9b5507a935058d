"""What a run reads of each corpus, stage by stage."""

from __future__ import annotations

import os
from collections import Counter
from itertools import groupby
from typing import NamedTuple

from tplaunch.spec.course import Course
from tplaunch.spec.run_stages import shares


class Mixture(NamedTuple):
    """The shares of corpora over a run.

    Args:
        names: of the corpora, as short as tells them apart; those that are read most come first.
        ends: the last step of each part of the run.
        shares: of each part, those of the corpora, in the order of `names`; 0 where it reads none.
    """

    names: list[str]
    ends: list[int]
    shares: list[tuple[float, ...]]


def mixture_of(course: Course) -> Mixture | None:
    """The mixture of a run that reads several corpora, with stages of one mixture as one part; None of one corpus."""
    stages, batches = course.stages, course.batches
    parts = [shares(course.recipe, number) for number in range(len(stages))]
    read: Counter[tuple[str, int]] = Counter()
    for steps, part in zip(stages, parts, strict=True):
        tokens = batches.tokens(steps.stop - 1) - batches.tokens(steps.start - 1)
        for corpus, share in part.items():
            read[corpus] += tokens * share  # type: ignore[assignment]  # counts need not be whole
    corpora = sorted(read, key=lambda corpus: -read[corpus])
    if len(corpora) < 2:
        return None
    rows = [tuple(part.get(corpus, 0.0) for corpus in corpora) for part in parts]
    ended = zip(rows, (steps.stop - 1 for steps in stages), strict=True)
    alike = [(row, [end for _, end in group][-1]) for row, group in groupby(ended, lambda one: one[0])]
    return Mixture(_names(corpora), [end for _, end in alike], [row for row, _ in alike])


def _names(corpora: list[tuple[str, int]]) -> list[str]:
    """The last part of each path, or, where that tells too little, the path; of one that comes again, its number."""
    short = [os.path.basename(path.rstrip("/")) for path, _ in corpora]
    paths: dict[str, set[str]] = {}
    for name, (path, _) in zip(short, corpora, strict=True):
        paths.setdefault(name, set()).add(path)
    told = [name if len(paths[name]) == 1 else path for name, (path, _) in zip(short, corpora, strict=True)]
    return [f"{name} ({again + 1})" if again else name for name, (_, again) in zip(told, corpora, strict=True)]
