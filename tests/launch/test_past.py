"""What a schedule says of the steps that a run has behind it, before it goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.recipes import case, resolved
from tplaunch.launch.past import differences, past_problems, same_course
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course

WARM = {"kind": "warmup", "for": 10}
TRUNK = [WARM, {"kind": "constant"}]


def recipe(pieces: list[dict[str, Any]] | None = None, training: dict[str, Any] | None = None, **more: Any) -> Recipe:
    raw = case(training={"steps": 100, **(training or {})}, optimizer=more.pop("optimizer", None))
    return resolved(
        raw | {"lr_schedule": {"pieces": pieces} if pieces else {"warmup_steps": 10, "decay": "constant"}} | more
    )


@pytest.mark.parametrize(
    "said",
    [
        recipe(TRUNK),
        recipe([{"kind": "warmup", "until": "10%"}, {"kind": "constant"}]),
        recipe(training={"steps": None, "tokens": 100 * 8 * 32}),
        recipe(training={"steps": None, "samples": 797}),  # the last step's batch holds them
        recipe(training={"batch_schedule": [{"size": 8, "for": "50%"}]}),
        recipe([{"kind": "warmup", "for": "2560 tokens"}, {"kind": "constant", "for": "90%"}]),
    ],
)
def test_the_same_in_other_words_is_no_change(said: Recipe) -> None:
    assert same_course(recipe(), said) and same_course(said, recipe())
    assert [*past_problems(recipe(), said, 100, ())] == []


def test_a_last_tenth_is_the_same_however_it_is_rounded() -> None:
    """The shorthand's constant phase is the sum of its end and the rest."""
    raw = case(training={"steps": 100}, optimizer={"lr": 2.2e-4})
    short = resolved(raw | {"lr_schedule": {"warmup_steps": 10, "decay": "wsd", "min_lr": 2.3e-5}})
    pieces = [*TRUNK, {"kind": "linear", "for": "10%", "to": 2.3e-5}]
    assert same_course(short, resolved(raw | {"lr_schedule": {"pieces": pieces}}))


COOLED = [*TRUNK, {"kind": "1-sqrt", "for": 40}]


@pytest.mark.parametrize(
    "later",
    [
        recipe(COOLED),
        recipe(TRUNK, {"steps": 300}),
        recipe(COOLED, {"steps": 70}),
        recipe(TRUNK, {"batch_schedule": [{"size": 8, "for": 60}], "global_batch_size": 16}),
        recipe(TRUNK, optimizer={"weight_decay_schedule": [{"kind": "constant", "for": 60}, {"kind": "linear"}]}),
    ],
)
def test_what_comes_may_change(later: Recipe) -> None:
    trunk = recipe(TRUNK)
    assert not same_course(trunk, later)
    assert [*past_problems(trunk, later, 30, ())] == []
    assert [*past_problems(recipe(), later, 30, ())] == [], "nor where the trunk was said in one line"


@pytest.mark.parametrize(
    ("later", "key", "what"),
    [
        (
            recipe([{"kind": "warmup", "for": 20}, {"kind": "constant"}]),
            "lr_schedule.pieces",
            "step 1 the learning rate",
        ),
        (recipe([*TRUNK, {"kind": "cosine", "for": 75}]), "lr_schedule.pieces", "step 26 the learning rate"),
        (
            recipe(TRUNK, {"batch_schedule": [{"size": 4, "for": 9}]}),
            "training.batch_schedule",
            "step 1 the batch size 4; it was trained with 8",
        ),
        (
            recipe(TRUNK, {"steps": None, "tokens": 10**6, "global_batch_size": 16}),
            "training.global_batch_size",
            "step 1 the batch size 16",
        ),
        (
            recipe(TRUNK, optimizer={"weight_decay_schedule": [{"kind": "linear"}]}),
            "optimizer.weight_decay_schedule",
            "the weight decay 0.099; it was trained with 0.1",
        ),
    ],
)
def test_what_was_may_not(later: Recipe, key: str, what: str) -> None:
    (problem,) = past_problems(recipe(TRUNK), later, 30, ())
    assert problem.key == key and what in problem.what
    assert f"--allow-change {key}" in problem.fix
    assert [*past_problems(recipe(TRUNK), later, 30, (key.partition(".")[0],))] == []


def test_shorthands_stretch_with_the_run_as_ever() -> None:
    """They are told; so is another batch size of a run in steps."""
    was = resolved(case(training={"steps": 100}))
    for now in (
        case(training={"steps": 200}),
        case(training={"steps": 100, "global_batch_size": 16}),
        case(optimizer={"lr": 1e-4}),
    ):
        assert [*differences(Course(was), Course(resolved(now)), 30)] != []
        assert [*past_problems(was, resolved(now), 30, ())] == []


STAGED = {"steps": 100, "stages": [{"until": 40}, {"until": 70, "seq_len": 64}, {"global_batch_size": 16}]}


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ([{"until": 40}, {"global_batch_size": 16}], None),  # from step 41 on: after the checkpoint
        ([{"until": 30}, {"global_batch_size": 16}], ("training.stages", "gives step 31 the batch size 16")),
        ([{"until": 30}, {"seq_len": 64}], ("training.stages", "gives step 31 the length of samples 64")),
        ([{"until": 30, "lr": 1e-3}, {"lr": 3e-3}], ("lr_schedule", "learning rate")),
        ([{"until": 20}, {"until": 45}, {"seq_len": 128}], None),
    ],
)
def test_stages_behind_a_run_stay_and_those_before_it_are_free(
    stages: list[dict[str, Any]], problem: tuple[str, str] | None
) -> None:
    found = [*past_problems(recipe(training=STAGED), recipe(training={"steps": 120, "stages": stages}), 40, ())]
    assert len(found) == (problem is not None)
    if problem is not None:
        assert found[0].key == problem[0] and problem[1] in found[0].what
