"""Every corpus keeps its place over the stages of a run: a ledger of what samples hold."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_dataset import write
from tests.recipes import case
from tplaunch.data.dataset import TokenDataset
from tplaunch.data.reading import Reading
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course
from tplaunch.train.batch import share

SIZES = {"a": 1500, "b": 2200, "c": 700}  # tokens of each corpus: a's are 0, 1, ..., b's follow
FIRST = {"a": 0, "b": 1500, "c": 3700}


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, str]:
    return {name: write(tmp_path / name, [size], FIRST[name]).path for name, size in SIZES.items()}


def staged(stages: list[dict[str, Any]], corpora: Mapping[str, str], steps: int = 40, seed: int = 5) -> Recipe:
    """A recipe whose stages name corpora by letters: {"a": weight}."""
    named = [
        {**stage, "data": {"train": [{"path": corpora[name], "weight": w} for name, w in stage["data"].items()]}}
        if "data" in stage
        else stage
        for stage in stages
    ]
    training = {"steps": steps, "seq_len": 16, "global_batch_size": 8, "seed": seed, "stages": named}
    raw = case(training=training, model={"vocab_size": 5000})
    return Recipe.model_validate({**raw, "data": {"train": corpora["a"]}})


def fed(recipe: Recipe, units: Mapping[str, int] | None = None, dps: tuple[int, ...] = (1, 2, 4)) -> list[list[int]]:
    """The inputs of every step, as ranks are fed: of a dp that changes from step to step. Targets follow their inputs
    in the corpus."""
    course, reading = Course(recipe), Reading(recipe, units)
    datasets = [
        TokenDataset(one.sources, one.seq_len, recipe.training.seed, vocab_size=5000, place=one.place)
        for one in reading.stages
    ]
    found = []
    for step in range(1, course.steps + 1):
        dp = dps[step % len(dps)]
        rows: list[int] = []
        for rank in range(dp):
            batch = datasets[course.batches.stage(step)].batch(np.asarray(share(course, step, rank, dp)))
            assert np.array_equal(batch.targets, batch.tokens + 1)
            rows += batch.tokens.ravel().tolist()
        found.append(rows)
    return found


def assert_each_once_an_epoch(steps: list[list[int]], recipe: Recipe, units: Mapping[str, int]) -> None:
    """Of each corpus no token was read n + 1 times before all were n times."""
    counts = Counter(token for step in steps for token in step)
    for name, size in SIZES.items():
        unit = next((units[path] for path in units if path.endswith(f"/{name}")), None)
        if unit is None:
            continue
        readable = (size - 1) // unit * unit
        times = [counts.pop(FIRST[name] + token, 0) for token in range(readable)]
        assert max(times) - min(times) <= 1, name
    assert not counts


FOUR = [
    {"until": 10},
    {"until": 20, "data": {"a": 1, "b": 2}, "global_batch_size": 16},
    {"until": 30, "seq_len": 32},
    {"global_batch_size": 12},
]


def test_mixture_length_and_batch_change_and_no_token_is_read_twice(corpora: dict[str, str]) -> None:
    recipe = staged(FOUR, corpora)
    reading = Reading(recipe)
    assert reading.units == [32, 32]
    steps = fed(recipe)
    assert [len(step) for step in steps] == [8 * 16] * 10 + [16 * 16] * 10 + [16 * 32] * 10 + [12 * 32] * 10
    assert_each_once_an_epoch(steps, recipe, dict(zip(reading.paths, reading.units, strict=True)))
    given = reading.tokens(Course(recipe).first_sample(41))
    assert given.sum() == sum(map(len, steps))
    counted = [sum(FIRST[n] <= token < FIRST[n] + SIZES[n] for step in steps for token in step) for n in "ab"]
    assert given.tolist() == counted


@pytest.mark.parametrize("seed", range(8))
def test_any_stages(corpora: dict[str, str], seed: int) -> None:
    """Samples of 8 to 64 tokens, in stages that end anywhere: also where a unit is read in part."""
    draw, stages, at = random.Random(seed), [], 0
    while at < 60:
        at += draw.randrange(1, 12)
        names = draw.sample("abc", draw.randrange(1, 4))
        stages.append(
            {
                "until": min(at, 60),
                "seq_len": 2 ** draw.randrange(3, 7),
                "global_batch_size": 4 * draw.randrange(1, 5),
                "data": {name: draw.choice([1, 2, 0.3]) for name in names},
            }
        )
    recipe = staged(stages, corpora, steps=60, seed=seed)
    reading = Reading(recipe)
    assert_each_once_an_epoch(fed(recipe), recipe, dict(zip(reading.paths, reading.units, strict=True)))


def test_a_stage_that_is_added_on_the_way_changes_nothing_before_it(corpora: dict[str, str]) -> None:
    before = staged(FOUR[:3], corpora, steps=30)
    after = staged([*FOUR, {"until": 50, "seq_len": 64}, {"data": {"c": 1, "a": 1}}], corpora, steps=60)
    settled = Reading(before)
    units = dict(zip(settled.paths, settled.units, strict=True))  # what a run under way keeps
    steps = fed(after, units)
    assert steps[:30] == fed(before)
    reading = Reading(after, units)
    assert reading.units == [32, 32, 64]  # c is read from here on alone
    assert_each_once_an_epoch(steps, after, dict(zip(reading.paths, reading.units, strict=True)))


def test_a_run_without_stages_reads_as_ever(corpora: dict[str, str]) -> None:
    recipe = staged([{}], corpora)
    plain = recipe.model_copy(update={"training": recipe.training.model_copy(update={"stages": None})})
    sources = plain.data.sources("train")
    ever = TokenDataset(sources, 16, 5)
    assert fed(recipe) == fed(plain)
    assert fed(plain, dps=(1,))[3] == ever.batch(np.arange(24, 32)).tokens.ravel().tolist()


def test_documents_are_told_apart_within_stretches(tmp_path: Path) -> None:
    """A sample that joins two stretches of text: positions begin anew where the second does."""
    source = write(tmp_path / "a", [7, 9, 50, 3, 60])
    stages = [{"until": 1, "seq_len": 8, "global_batch_size": 1}, {"seq_len": 16, "global_batch_size": 1}]
    recipe = staged(stages, {"a": source.path}, steps=5)
    reading = Reading(recipe)
    dataset = TokenDataset([source], 16, 5, place=reading.stages[1].place)
    begins_at = {0, 7, 16, 66, 69}
    rows = dataset.batch(np.arange(1, 5), documents=True)
    assert rows.positions is not None and rows.begins is not None
    for tokens, positions, begins in zip(rows.tokens.tolist(), rows.positions.tolist(), rows.begins, strict=True):
        assert all(tokens[at] == tokens[at - 1] + 1 for at in range(1, 16) if at != 8)  # half a unit was read before
        for at in range(16):
            starts = at in (0, 8) or tokens[at] in begins_at
            assert positions[at] == (0 if starts else positions[at - 1] + 1)
        assert begins.tolist() == [token + 1 in begins_at for token in tokens]
    assert any(tokens[8] != tokens[7] + 1 for tokens in rows.tokens.tolist())
