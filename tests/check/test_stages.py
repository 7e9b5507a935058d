"""What stages cannot be: each said in one message, with its line and a mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.test_dataset import write
from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.errors import RecipeError
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.spec.course import Course
from tplaunch.spec.resolve import resolve
from tplaunch.spec.run_stages import alone, in_force, segment_after, segments

RECIPE = """\
name: checked
model: {hidden_size: 64, num_layers: 4, num_heads: 8, ffn_hidden_size: 128, vocab_size: 512}
topology: {tp: 1, dp: 2}
training:
  seq_len: 64
  micro_batch_size: 2
  global_batch_size: 16
  steps: 100
  stages:
STAGES
optimizer: {lr: 1.0e-3}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


def check(tmp_path: Path, *stages: str, text: str = RECIPE, gpus: int | None = None) -> Checked:
    for name in ("text.txt", "more.txt"):
        (tmp_path / name).write_text("words " * 1000)
    (tmp_path / "r.yaml").write_text(text.replace("STAGES", "\n".join(f"    - {{{stage}}}" for stage in stages)))
    return check_recipe(load_recipe(tmp_path / "r.yaml"), need_data=False, gpus=gpus)


REFUSED = [
    # stages, key, line, what, mend
    (["until: 10", "", ""], "training.stages[1]", 11, "does not say where it ends", "last: how long it is"),
    (["until: 10, last: 5", ""], "training.stages[0].last", 10, "both say where it ends", "keep one"),
    (["until: 10", "until: 10", ""], "training.stages[1]", 11, "has no step", "make it longer"),
    (["until: 20", "until: 10", ""], "training.stages[1]", 11, "ends with step 20, this one with step 10", "longer"),
    (["until: 200", ""], "training.stages[0]", 10, "beyond the run, which ends with step 100", "a longer run"),
    (["until: 100", ""], "training.stages[1]", 11, "begins after step 100", "leave it out"),
    (["until: 10", "until: 90"], "training.stages[1]", 11, "ends with step 90, the run with step 100", "leave its end"),
    (["until: 10", "last: 10"], "training.stages[1]", 11, "ends with step 20, the run with step 100", "leave its end"),
    (["until: 10", "seq_len: 96"], "training.stages[0].seq_len", 10, "64 tokens do not divide those of 96", "4096"),
    (["until: 10", "global_batch_size: 10"], "training.stages[1].global_batch_size", 11, "not divisible by dp 2", "8"),
    (["until: 10", "micro_batch_size: 16"], "training.stages[1].global_batch_size", 11, "in stage 2: 16 samples", "32"),
    (["until: 10", "topology: {tp: 3}"], "training.stages[1].topology.tp", 11, "in stage 2: ", "tp: "),
    (
        ["name: a, until: 10", "name: b, topology: {pp: 8}"],
        "training.stages[1].topology.pp",
        11,
        "in stage 2 (b): ",
        "",
    ),
    (["until: 10", "lr: 1.0"], "training.stages[1].lr", 11, "1 is above optimizer.lr 0.001", "raise optimizer.lr"),
    (["until: 10", "lr: 1.0e-5"], "training.stages[1].lr", 11, "jumps from 0.00097", "kind: linear, from: "),
    (["until: 10, lr: 1.0e-5", ""], "training.stages[1]", 11, "jumps from 1e-05 to 0.0009", "another lr_schedule"),
    (
        ["until: 10", "lr: {kind: linear, for: 5}"],
        "training.stages[1].lr.for",
        11,
        "is as long as its stage",
        "leave for out",
    ),
    (["until: 10", "lr: {kind: step}"], "training.stages[1].lr", 11, "needs every", "factor: 0.5"),
    (["until: 10, lr: {kind: inverse-sqrt}", ""], "training.stages[0].lr", 10, "cannot begin the run", "a warmup"),
    (["until: 10", "lr: {kind: exponential}"], "training.stages[1].lr", 11, "never falls to 0", "above 0"),
]


@pytest.mark.parametrize(("stages", "key", "line", "what", "mend"), REFUSED)
def test_refused(tmp_path: Path, stages: list[str], key: str, line: int, what: str, mend: str) -> None:
    with pytest.raises(RecipeError) as refused:
        check(tmp_path, *stages)
    problems = [problem for problem in refused.value.problems if problem.key == key]
    assert problems, str(refused.value)
    assert what in problems[0].what and mend in problems[0].fix, str(problems[0])
    assert problems[0].where.startswith(f"{tmp_path}/r.yaml:{line}:")


def test_packed_rows_have_one_length(tmp_path: Path) -> None:
    text = RECIPE.replace("{train: text.txt,", "{train: text.txt, packing: best_fit,")
    with pytest.raises(RecipeError, match="samples of 64 and 128 tokens"):
        check(tmp_path, "until: 10", "seq_len: 128", text=text)
    check(tmp_path, "until: 10", "global_batch_size: 8", text=text)


def test_auto_recomputation_is_for_one_shape(tmp_path: Path) -> None:
    text = RECIPE.replace("steps: 100", "steps: 100\n  recompute: auto")
    with pytest.raises(RecipeError, match="stages of other shapes"):
        check(tmp_path, "until: 10", "seq_len: 128", text=text)
    check(tmp_path, "until: 10", "global_batch_size: 8", text=text)


def test_a_stage_that_wears_its_corpora_out(tmp_path: Path) -> None:
    write(tmp_path / "c", [2000])  # 31 samples of 64 tokens
    text = RECIPE.replace("text.txt, tokenizer: {vocab_size: 300}", "c")
    with pytest.raises(RecipeError, match=r"training.stages\[1\]: reads .*/c 5.16 epochs") as refused:
        check(tmp_path, "until: 7", "last: 10", "data: {train: text.txt}", text=text)
    assert "4, repeated text teaches" in refused.value.problems[0].why
    check(tmp_path, "until: 7", "last: 7", "data: {train: text.txt}", text=text)  # 3.6 epochs each


STAGES = [
    "name: base, until: 30%",
    "name: mix, last: 20, data: {train: [text.txt, more.txt]}, global_batch_size: 2048 tokens",
    "name: long, until: 70, seq_len: 128, rope_theta: 50000.0, document_mask: true, topology: {tp: 2, dp: auto}",
    "name: end, global_batch_size: 8, lr: {kind: linear}, checkpoint: {every: 5}",
]


def test_each_stage_is_as_the_one_before_but_for_what_it_names(tmp_path: Path) -> None:
    recipe = check(tmp_path, *STAGES, gpus=4).recipe
    course = Course(recipe)
    assert course.stages == [range(1, 31), range(31, 51), range(51, 71), range(71, 101)]
    found = [in_force(recipe, number) for number in range(4)]
    assert [one.training.seq_len for one in found] == [64, 64, 128, 128]
    assert [course.batch_size(steps.start) for steps in course.stages] == [16, 32, 32, 8]
    assert [len(one.data.sources("train")) for one in found] == [1, 2, 2, 2]
    assert [one.model.rope_theta for one in found] == [10000, 10000, 50000, 50000]
    assert [one.training.document_mask for one in found] == [False, False, True, True]
    assert [(one.topology.tp, one.topology.dp) for one in found] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert [one.checkpoint.every.amount for one in found] == [0, 0, 0, 5]
    assert all(one.topology.gpus_per_node == one.topology.tp * 2 for one in found)
    assert course.lr(100) == 0 and course.lr(70) > course.lr(71) > 0
    for one in found:
        assert all(Course(one).at(step) == course.at(step) for step in (1, 40, 60, 100))


def test_workers_train_the_stages_that_have_their_shapes(tmp_path: Path) -> None:
    checked = check(tmp_path, *STAGES, gpus=4)
    parts = segments(checked.recipe)
    assert [part.stages for part in parts] == [range(2), range(2, 4)]
    assert [part.steps for part in parts] == [range(1, 51), range(51, 101)]
    assert segment_after(checked.recipe, 49) == parts[0] and segment_after(checked.recipe, 50) == parts[1]
    assert segment_after(checked.recipe, 100) == parts[1]
    assert checked.at(0).recipe == checked.recipe and checked.at(50).topology.tp == 2
    assert checked.at(50).at(3).recipe == checked.recipe


def test_what_a_run_directory_keeps_is_the_same_recipe(tmp_path: Path) -> None:
    checked = check(tmp_path, *STAGES, gpus=4)
    (tmp_path / "kept.yaml").write_text(dump_recipe(checked.recipe))
    kept = resolve(load_recipe(tmp_path / "kept.yaml").recipe)
    assert kept == checked.recipe
    assert [part.recipe for part in segments(kept)] == [part.recipe for part in segments(checked.recipe)]


def test_a_stage_alone(tmp_path: Path) -> None:
    own = alone(check(tmp_path, *STAGES, gpus=4).recipe, 3)
    assert own.training.stages is None and own.training.steps == 30
    assert (own.training.seq_len, own.training.global_batch_size, own.topology.tp) == (128, 8, 2)


def test_a_ramp_leads_into_stages(tmp_path: Path) -> None:
    """The batch follows the run's own schedule up to the stage that says another."""
    text = RECIPE.replace("steps: 100", "steps: 100\n  batch_ramp_up: {start: 4, increment: 4, steps: 10}")
    text = text.replace("micro_batch_size: 2", "micro_batch_size: 1")
    recipe = check(tmp_path, "until: 25", "until: 60", "global_batch_size: 8", text=text).recipe
    course = Course(recipe)
    assert [course.batch_size(step) for step in (10, 11, 25, 26, 30, 31, 60, 61)] == [4, 8, 12, 12, 12, 16, 16, 8]
    assert [Course(in_force(recipe, 2)).batch_size(step) for step in (10, 31, 61)] == [4, 16, 8]
