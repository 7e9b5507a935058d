"""The course of a run against what a loop over its steps counts, and against rates by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipes import case, resolved
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.tree import parse
from tplaunch.spec.course import Course
from tplaunch.units import Length

SEQ = 16


def course(pieces: list[dict[str, Any]] | None = None, *, lr: float = 1.0, **training: Any) -> Course:
    raw = case(training={"seq_len": SEQ, "global_batch_size": 8, "steps": None, **training}, optimizer={"lr": lr})
    raw["lr_schedule"] = {"pieces": pieces}
    return Course(Recipe.model_validate(raw))


def rates(pieces: list[dict[str, Any]], steps: int = 10, **training: Any) -> list[float]:
    found = course(pieces, steps=steps, **training)
    return [found.lr(step) for step in range(1, found.steps + 1)]


# Where steps begin and end

LENGTHS = st.tuples(st.integers(1, 3000), st.sampled_from(["steps", "samples", "tokens"]))


@given(st.lists(st.tuples(st.integers(1, 9), LENGTHS), max_size=4), LENGTHS)
def test_steps_are_where_counting_them_says(sizes: list[tuple[int, tuple[int, str]]], run: tuple[int, str]) -> None:
    pieces = [{"size": size, "for": f"{amount} {unit}"} for size, (amount, unit) in sizes]
    found = course(batch_schedule=pieces or None, **{run[1]: run[0]})
    ends: list[tuple[int, str]] = []  # by hand: of one unit, lengths add up
    step = samples = 0
    at = {"steps": 0, "samples": 0, "tokens": 0}
    for size, (amount, unit) in [*sizes, (8, (4000, "steps"))]:
        begun = ends[-1][0] if ends and ends[-1][1] == unit else at[unit]
        ends.append((begun + amount, unit))
        while at[unit] < ends[-1][0] and at[run[1]] < run[0]:  # a step has the size of where it begins
            step, samples = step + 1, samples + size
            at = {"steps": step, "samples": samples, "tokens": samples * SEQ}
            assert (found.batch_size(step), found.tokens_of(step)) == (size, size * SEQ)
            place = found.at(step)
            assert (place.samples, place.tokens) == (samples, samples * SEQ)
            assert found.at_tokens(samples * SEQ - 1).step == step == found.at_tokens((samples - size) * SEQ).step
            assert found.batches.reach(Length(samples * SEQ, "tokens")) == step
            assert found.batches.reach(Length(samples * SEQ - 1, "tokens")) == step
            assert found.first_sample(step) == samples - size
    assert found.steps == step
    assert found.tokens == samples * SEQ


def test_a_ramp_shares_its_length_among_its_sizes() -> None:
    """As Megatron's, which counts samples: each of four sizes has a quarter of 256 samples."""
    found = course(batch_ramp_up={"start": 4, "increment": 1, "over": "256 samples"}, steps=100)
    sizes = [found.batch_size(step) for step in range(1, 60)]
    expected, samples = [], 0
    while len(expected) < 59:
        expected.append(min(8, 4 + samples // 64))
        samples += expected[-1]
    assert sizes == expected
    assert course(batch_ramp_up={"start": 4, "increment": 2, "steps": 3}, steps=9).batches.ends == [3, 6]


def test_sizes_in_tokens_are_samples() -> None:
    found = course(
        global_batch_size="1Ki tokens", batch_schedule=[{"size": "128 tokens", "until": "10%"}], tokens=10240
    )
    assert [found.batch_size(step) for step in (1, 8, 9, 10)] == [8, 8, 64, 64]
    with pytest.raises(ValueError, match="100 tokens are no whole number of samples of 16: 96 or 112 tokens are"):
        course(global_batch_size="100 tokens", steps=1)


@pytest.mark.parametrize("tokens", [15_600_000_000_001, 10**15])
def test_the_longest_runs_are_exact(tokens: int) -> None:
    found = course(tokens=tokens, global_batch_size=1, batch_schedule=[{"size": 3, "until": "1T tokens"}])
    assert found.steps == -(-(10**12) // 48) + -(-(tokens - -(-(10**12) // 48) * 48) // 16)
    assert 0 <= found.tokens - tokens < 16
    assert found.at_tokens(tokens - 1).step == found.steps


# Rates

SHAPES = {
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "1-sqrt": lambda p: 1 - math.sqrt(p),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_tail_leads_from_where_the_rate_is_to_its_end(kind: str) -> None:
    """Warmup, stable, decay: the piece without a length has what the others leave."""
    pieces = [{"kind": "warmup", "for": 4}, {"kind": "constant"}, {"kind": kind, "for": "50%", "to": 0.2}]
    shape = [0.2 + 0.8 * SHAPES[kind](p / 10) for p in range(1, 11)]
    assert rates(pieces, 20) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7, *shape])


def test_exponential_steps_and_inverse_roots_by_hand() -> None:
    warm = {"kind": "warmup", "from": 0.5, "to": 1.0, "for": 2}
    assert rates([warm, {"kind": "exponential", "to": 0.0625}], 6) == pytest.approx([0.75, 1, 0.5, 0.25, 0.125, 0.0625])
    stairs = {"kind": "step", "every": 2, "factor": 0.5}
    assert rates([warm, stairs], 8) == pytest.approx([0.75, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])
    root = {"kind": "inverse-sqrt"}
    assert rates([warm, root], 8) == pytest.approx([0.75, 1, *(math.sqrt(2 / step) for step in range(3, 9))])
    assert rates([{"kind": "constant", "for": 3}, {"kind": "constant", "from": 0.25}], 5) == [1, 1, 1, 0.25, 0.25]


def test_a_rate_in_tokens_moves_with_tokens() -> None:
    sizes = {"batch_schedule": [{"size": 2, "for": 4}], "global_batch_size": 8}  # 32 tokens a step, then 128
    found = rates([{"kind": "warmup", "for": "640 tokens"}, {"kind": "linear"}], 12, **sizes)
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.4, 0.6, 0.8, 1.0, 0.75, 0.5, 0.25, 0.0])
    by_samples = rates([{"kind": "warmup", "for": "40 samples"}, {"kind": "linear"}], 12, **sizes)
    assert by_samples == found
    stairs = [{"kind": "step", "every": "128 tokens", "factor": 0.5}]
    assert rates(stairs, 6, **sizes) == [1, 1, 1, 1, 0.5, 0.25]
    root = [{"kind": "constant", "for": 4}, {"kind": "inverse-sqrt", "for": "256 tokens"}]
    assert rates(root, 6, **sizes) == pytest.approx([1, 1, 1, 1, math.sqrt(128 / 256), math.sqrt(128 / 384)])


def test_a_step_belongs_to_the_piece_in_which_it_begins_and_lengths_do_not_drift() -> None:
    """128 tokens a step: each piece of 200 ends with the first step that ends at or after its own end."""
    pieces = [{"kind": "constant", "from": rate, "for": "200 tokens"} for rate in (0.1, 0.2, 0.3, 0.4)]
    assert rates(pieces, 7) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4]  # ends at 200, 400, 600, 800
    backwards = [{"kind": "constant", "from": 0.1}, *pieces[1:]]
    found = course(backwards, tokens=800)
    assert [found.lr(step) for step in range(1, 8)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.4, 0.4]


@pytest.mark.parametrize("unit", ["steps", "samples", "tokens", "%"])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_pieces_mean_the_shorthands_bit_for_bit_in_any_unit(kind: str, unit: str) -> None:
    def length(steps: int) -> str:
        scale = {"steps": 1.0, "samples": 8, "tokens": 8 * SEQ, "%": 0.1}[unit]
        return f"{steps * scale:g}{'' if unit == '%' else ' '}{unit}"

    raw = case(training={"seq_len": SEQ, "steps": 1000}, optimizer={"lr": 2.2e-4})
    raw["lr_schedule"] = {"warmup_steps": 70, "decay": kind, "decay_steps": 300}
    plain = Course(Recipe.model_validate(raw))
    run = "steps" if unit == "%" else unit
    training = {"seq_len": SEQ, "steps": None, run: {"steps": 1000, "samples": 8000, "tokens": 128_000}[run]}
    warm, tail = {"kind": "warmup", "for": length(70)}, {"kind": kind, "for": length(300)}
    for schedule in (
        {"pieces": [warm, {"kind": "constant"}, tail]},
        {"warmup_steps": length(70), "decay": kind, "decay_steps": length(300)},
    ):
        said = Course(
            Recipe.model_validate({**raw, "training": {**raw["training"], **training}, "lr_schedule": schedule})
        )
        assert said.steps == 1000
        assert [said.lr(step) for step in range(1, 1001)] == [plain.lr(step) for step in range(1, 1001)]


def test_weight_decay_moves_and_a_run_without_pieces_has_its_own() -> None:
    raw = case(training={"steps": 4}, optimizer={"weight_decay": 0.1})
    assert [Course(resolved(raw)).decay_factor(step) for step in (1, 4)] == [1.0, 1.0]
    raw["optimizer"]["weight_decay_schedule"] = [{"kind": "linear", "from": 0.02, "to": 0.1}]
    found = Course(resolved(raw))
    assert [found.weight_decay(step) for step in range(1, 5)] == pytest.approx([0.04, 0.06, 0.08, 0.1])
    assert found.decay_factor(2) == pytest.approx(0.6)


# What is due

EVERY = st.tuples(st.integers(1, 400), st.sampled_from(["steps", "samples", "tokens", "%"]))


@given(EVERY, st.sampled_from([{"steps": 30}, {"tokens": 3100}]))
def test_what_is_due_is_due_once_for_each_multiple_that_a_step_passes(
    every: tuple[int, str], run: dict[str, int]
) -> None:
    amount, unit = every
    length = Length(min(amount, 100) if unit == "%" else amount, unit)  # type: ignore[arg-type]
    found = course(batch_schedule=[{"size": 3, "for": 5}], **run)
    whole = {"steps": found.steps, "tokens": 3100}[next(iter(run))]
    counted = {"steps": next(iter(run)), "samples": "samples", "tokens": "tokens"}.get(unit, next(iter(run)))
    counted = "steps" if unit == "steps" else counted
    each = int(length.amount) if unit != "%" else whole * int(length.amount) / 100
    passed = [math.floor(found.batches.consumed(step, counted) / each) for step in range(found.steps + 1)]
    due = [found.due(length, step) for step in range(1, found.steps + 1)]
    for steps in (range(1, found.steps + 1), range(2, found.steps), range(5, 5)):
        assert list(found.dues(length, steps)) == [step for step in steps if due[step - 1]]
    assert due == [after > before for before, after in pairwise(passed)]
    assert not found.due(Length(0), 1) and not found.due(None, 1)


def test_a_resolved_recipe_has_the_same_course_and_can_be_read_again() -> None:
    raw = case(training={"seq_len": SEQ, "steps": None, "tokens": "1M", "eval_every": "2.5%"})
    raw["training"]["batch_schedule"] = [{"size": 4, "until": "12.5%"}]
    raw["lr_schedule"] = {
        "pieces": [{"kind": "warmup", "for": "1%"}, {"kind": "constant"}, {"kind": "1-sqrt", "for": "20%"}]
    }
    first = Recipe.model_validate(raw)
    recipe = resolved(raw)
    tree, problems = parse(dump_recipe(recipe), "r", ".")
    assert tree is not None and not problems
    again = Recipe.model_validate(tree.plain())
    assert again == recipe and recipe.training.steps == Course(first).steps > 0
    for step in (1, 500, 1000, 5000, recipe.training.steps):
        assert Course(first).at(step) == Course(again).at(step)


# Two reports


def deepseek(tokens: int, done: int) -> tuple[float, float]:
    """Rate and batch of DeepSeek-V3 (arXiv 2412.19437, section 4.2) where `done` steps have taken `tokens`."""
    if done < 2000:
        rate = 2.2e-4 * (done + 1) / 2000
    elif tokens < 10e12:
        rate = 2.2e-4
    elif tokens < 14.3e12:
        rate = 2.2e-5 + 1.98e-4 * 0.5 * (1 + math.cos(math.pi * (tokens - 10e12) / 4.3e12))
    else:
        rate = 2.2e-5 if tokens < 14.633e12 else 7.3e-6
    return rate, 15360 if tokens >= 469e9 else 3072 + 1024 * math.floor(12 * tokens / 469e9)


def test_deepseek_v3_trains_as_its_report_says() -> None:
    pieces = [
        {"kind": "warmup", "for": "2000 steps"},
        {"kind": "constant", "until": "10T tokens"},
        {"kind": "cosine", "to": 2.2e-5, "for": "4.3T tokens"},
        {"kind": "constant", "for": "333B tokens"},
        {"kind": "constant", "from": 7.3e-6, "for": "167B tokens"},
    ]
    ramp = {"start": 3072, "increment": 1024, "over": "469B tokens"}
    batch = {"seq_len": 4096, "global_batch_size": 15360, "batch_ramp_up": ramp}
    found = course(pieces, lr=2.2e-4, tokens="14.8T", **batch)
    assert 0 <= found.tokens - 14.8e12 < 15360 * 4096
    early = [int(469e9 * number / 20) for number in range(25)]
    late = [int(14.79e12 * number / 25) for number in range(1, 26)]
    for tokens in (*early, *late):
        place = found.at_tokens(tokens)
        begun = place.tokens - place.batch_size * 4096
        rate, batch_size = deepseek(begun, place.step - 1)
        # 1.5e-4: a cosine of 70,000 steps, of which one reads where it ends
        assert (place.lr, place.batch_size) == (pytest.approx(rate, rel=1.5e-4), batch_size)


def test_llama3_405b_trains_as_its_report_says() -> None:
    """arXiv 2407.21783, section 3.4.1, with sequences of one length: they began with 4,096 tokens."""
    pieces = [{"kind": "warmup", "for": 8000}, {"kind": "cosine", "to": 8e-7, "until": "1200000 steps"}]
    sizes = [{"size": "4Mi tokens", "until": "252M tokens"}, {"size": "8Mi tokens", "until": "2.87T tokens"}]
    batch = {"seq_len": 4096, "global_batch_size": "16Mi tokens", "batch_schedule": sizes}
    found = course(pieces, lr=8e-5, steps=1_200_000, **batch)
    tokens, taken = 0, {}
    for step in range(1, 1_200_001):  # each by itself, in numbers of its own
        size = 2**22 if tokens < 252_000_000 else 2**23 if tokens < 2_870_000_000_000 else 2**24
        taken[step] = (tokens := tokens + size, size)
    for step in [1, 60, 61, 62, 7999, 8000, 8001, *(number * 27_906 for number in range(1, 44))]:
        rate = 8e-5 * step / 8000
        if step > 8000:
            rate = 8e-7 + (8e-5 - 8e-7) / 2 * (1 + math.cos(math.pi * (step - 8000) / 1_192_000))
        place = found.at(step)
        assert (place.tokens, place.batch_size * 4096) == taken[step]
        assert place.lr == pytest.approx(rate, rel=1e-9)


def test_deepseek_v3_as_it_ships_is_its_report() -> None:
    """With its long sequences; as far as it can: its first batches would be too few microbatches for its pipeline."""
    shipped = Course(load_recipe("deepseek-v3").recipe)
    assert [len(steps) for steps in shipped.stages[1:]] == [1000, 1000]
    even = [int(14.79e12 * number / 43) for number in range(44)]
    long = [14_800_100_000_000, 14_840_000_000_000, 14_862_000_000_000, 14_864_000_000_000, 14_900_000_000_000]
    places = [*even, *long, shipped.tokens - 1]
    assert len(places) == 50
    for tokens in places:
        place = shipped.at_tokens(tokens)
        begun = place.tokens - place.batch_size * place.seq_len
        if begun < 14.8e12:
            rate = deepseek(begun, place.step - 1)[0]
            batch_size = 15360 if begun >= 469e9 else 4096 + 1024 * math.floor(11 * begun / 469e9)
            assert (place.stage, place.batch_size, place.seq_len) == (0, batch_size, 4096)
        else:
            rate, later = 7.3e-6, begun - shipped.batches.tokens(shipped.stages[0].stop - 1) >= 1000 * 1920 * 32768
            assert (place.stage, place.batch_size, place.seq_len) == ((2, 480, 131_072) if later else (1, 1920, 32768))
        assert place.lr == pytest.approx(rate, rel=1.5e-4)


def test_llama3_405b_as_it_ships_is_its_report() -> None:
    """Step by step, in numbers of its own: batch and length as they double, the rate, the last 40M tokens."""
    shipped = Course(load_recipe("llama3-405b").recipe)
    billion, lasting = 10**9, 2**24
    stages = [(252 * billion // 1000, 2**22, 4096), (2870 * billion, 2**23, 8192), (14_800 * billion, lasting, 8192)]
    stages += [(end * billion, lasting, length) for end, length in ((15_000, 2**14), (15_200, 2**15), (15_400, 2**16))]
    stages += [(15_600 * billion - 40 * billion // 1000, lasting, 2**17), (15_600 * billion, lasting, 2**17)]
    tokens = step = 0
    begins, counted = [], {}
    for number, (end, size, length) in enumerate(stages):
        begins.append(step)
        while tokens < end:
            tokens, step = tokens + size, step + 1
            counted[step] = (number, tokens, size // length, length)
    assert (shipped.steps, shipped.tokens) == (step, tokens)

    def rate(at: int) -> float:
        if at <= 8000:
            return 8e-5 * at / 8000
        if at <= begins[-1]:
            return 8e-7 + (8e-5 - 8e-7) / 2 * (1 + math.cos(math.pi * (at - 8000) / 1_192_000))
        return rate(begins[-1]) * (1 - (at - begins[-1]) / (step - begins[-1]))

    edges = [begin + more for begin in begins[1:] for more in (0, 1)]
    places = [1, 7999, 8000, 8001, step, *edges, *(step * number // 32 for number in range(1, 32))]
    assert len(places) == 50
    for at in places:
        place = shipped.at(at)
        assert (place.stage, place.tokens, place.batch_size, place.seq_len) == counted[at]
        assert place.lr == pytest.approx(rate(at), rel=1e-9, abs=1e-18)


def test_olmo2_7b_as_it_ships_is_its_configuration() -> None:
    shipped = Course(load_recipe("olmo2-7b").recipe)
    assert [len(steps) for steps in shipped.stages] == [928_646, 11_931]
    for number in range(1, 51):
        place = shipped.at(shipped.steps * number // 50)
        tokens = place.step * 1024 * 4096
        rate = 3e-5 + 2.7e-4 / 2 * (1 + math.cos(math.pi * (tokens - 2000 * 2**22) / (5e12 - 2000 * 2**22)))
        if place.stage:
            peak = shipped.lr(928_646)
            rate = peak * (shipped.steps - place.step) / 11_931
            assert peak == pytest.approx(6.1499e-5, rel=3e-3), "the rate that its second stage begins with"
        assert (place.tokens, place.batch_size, place.seq_len) == (tokens, 1024, 4096)
        assert place.lr == pytest.approx(rate, rel=1e-5, abs=1e-18)
