"""What each sample of a run reads: every corpus keeps its place over all stages, in tokens.

A corpus is read unit by unit, in the order of `SampleOrder`; a unit is as long as the longest samples that the run
makes of the corpus, so that these are whole pieces of text. What a corpus gives, epoch after epoch, is one stream of
tokens; each of its samples takes what comes next in it. A stage of other lengths, batches or weights thus reads no
token again that was read in this epoch, and skips none.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tplaunch.data.mixture import Ints, Mixture
from tplaunch.recipe.schema import Recipe, Source, occurrences
from tplaunch.spec.course import Course
from tplaunch.spec.run_stages import in_force, longest_samples


@dataclass(frozen=True)
class Place:
    """Where samples begin.

    Attributes:
        first: samples of the run before them.
        numbers: of the corpora that they are of, in the run.
        units: tokens of a unit of each.
        starts: tokens that each has given before.
    """

    first: int
    numbers: tuple[int, ...]
    units: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class StageReading:
    """What a stage reads.

    Attributes:
        sources: its corpora.
        seq_len: tokens of its samples.
        place: where they begin.
    """

    sources: Sequence[Source]
    seq_len: int
    place: Place

    @cached_property
    def mixture(self) -> Mixture:
        """Which of its corpora comes when."""
        return Mixture(tuple(source.weight for source in self.sources))


class Reading:
    """What a run reads.

    Args:
        recipe: the recipe.
        units: tokens of the unit of corpora whose order is settled, by path: those that the run has read from.

    Attributes:
        paths: of all corpora, by their number in the run: that of their first appearance.
        units: tokens of a unit of each.
        stages: what each stage reads.
    """

    def __init__(self, recipe: Recipe, units: Mapping[str, int] | None = None) -> None:
        course, settled = Course(recipe), units or {}
        stages = [in_force(recipe, number) for number in range(len(course.stages))]
        names = [occurrences(stage.data.sources("train")) for stage in stages]
        known: dict[tuple[str, int], int] = {}
        for corpora in names:
            for name in corpora:
                known.setdefault(name, len(known))
        self.paths, longest = [path for path, _ in known], longest_samples(recipe)
        self.units = [settled.get(path, longest[path]) for path in self.paths]
        given = np.zeros(len(known), np.int64)
        self.stages: list[StageReading] = []
        self._before: list[Ints] = []  # tokens that all corpora have given before each stage
        for stage, corpora, steps in zip(stages, names, course.stages, strict=True):
            numbers = tuple(known[name] for name in corpora)
            first, after = course.first_sample(steps.start), course.first_sample(steps.stop)
            place = Place(
                first, numbers, tuple(self.units[one] for one in numbers), tuple(given[list(numbers)].tolist())
            )
            reading = StageReading(stage.data.sources("train"), stage.training.seq_len, place)
            self.stages.append(reading)
            self._before.append(given.copy())
            given[list(numbers)] += reading.mixture.counts(after - first) * reading.seq_len

    def tokens(self, samples: int) -> Ints:
        """Tokens that each corpus has given when the run has consumed so many samples; by number."""
        number = max(bisect_right(self.stages, samples, key=lambda stage: stage.place.first) - 1, 0)
        stage, given = self.stages[number], self._before[number].copy()
        given[list(stage.place.numbers)] += stage.mixture.counts(samples - stage.place.first) * stage.seq_len
        return given
