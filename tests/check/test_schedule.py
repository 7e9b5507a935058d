"""What a schedule cannot be: each said in one message, with its line and a mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.check.recipe import Checked, check_recipe
from tplaunch.errors import RecipeError
from tplaunch.recipe.load import load_recipe

RECIPE = """\
name: checked
model: {hidden_size: 64, num_layers: 2, num_heads: 8, ffn_hidden_size: 128, vocab_size: 512}
topology: {dp: 2}
training:
  seq_len: 64
  global_batch_size: 16
  steps: 100
optimizer: {lr: 1.0e-3}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


def check(tmp_path: Path, *overrides: str, text: str = RECIPE) -> Checked:
    (tmp_path / "r.yaml").write_text(text)
    return check_recipe(load_recipe(tmp_path / "r.yaml", overrides), need_data=False)


def pieces(*texts: str) -> str:
    return f"lr_schedule.pieces=[{', '.join(f'{{{text}}}' for text in texts)}]"


WARM = "kind: warmup, for: 10"
REFUSED = [
    # overrides, key, what, mend
    (["training.steps=null"], "training", "has no length", "steps: 1000"),
    (["training={tokens: 1B, samples: 1M}"], "training.samples", "tokens and samples both", "keep one"),
    (
        ["training={tokens: 10K, steps: 9}"],
        "training.steps",
        "9 steps are not what 10K tokens take, which is 10",
        "remove it",
    ),
    (["training.batch_ramp_up={start: 8, increment: 4}"], "training.batch_ramp_up", "either steps or over", "over: 1B"),
    (
        ["training.batch_ramp_up={start: 8, increment: 4, steps: 1, over: 9}"],
        "training.batch_ramp_up",
        "either",
        "over",
    ),
    (["training.batch_schedule=[{size: 8}]"], "training.batch_schedule[0]", "either for or until", "until: where"),
    (
        ["training={batch_schedule: [{size: 8, for: 5}], batch_ramp_up: {start: 8, increment: 4, steps: 1}}"],
        "training.batch_schedule",
        "no place beside batch_ramp_up",
        "remove one",
    ),
    (
        ["training.batch_schedule=[{size: 8, for: 5}, {size: 5, for: 5}]"],
        "training.batch_schedule[1].size",
        "not divisible by dp 2",
        "size: 4 or 6",
    ),
    (
        ["training.batch_schedule=[{size: 8, for: 5}, {size: 4, until: 4}]"],
        "training.batch_schedule[1]",
        "has no step",
        "longer",
    ),
    (
        ["training.batch_schedule=[{size: 8, for: 100}]"],
        "training.batch_schedule[0]",
        "never has its full batch",
        "global_batch_size: 8",
    ),
    (
        ["training.batch_schedule=[{size: 8, for: 100}, {size: 4, for: 9}]"],
        "training.batch_schedule[1]",
        "begins after step 100",
        "leave it out",
    ),
    (
        [pieces(WARM, "kind: cosine, for: 80")],
        "lr_schedule.pieces[1]",
        "the last piece ends with step 90, the run with step 100",
        "{kind: constant}",
    ),
    (
        [pieces(WARM, "kind: constant, for: 95", "kind: cosine, for: 5")],
        "lr_schedule.pieces[2]",
        "begins after step 105",
        "a longer run",
    ),
    (
        [pieces(WARM, "kind: constant, until: 10", "kind: cosine")],
        "lr_schedule.pieces[1]",
        "has no step: the piece before ends with step 10",
        "longer",
    ),
    ([pieces(WARM, "kind: constant, until: 5", "kind: cosine")], "lr_schedule.pieces[1]", "has no step", "longer"),
    ([pieces(WARM, "kind: constant", "kind: linear, for: 95%")], "lr_schedule.pieces[1]", "has no step", "longer"),
    (
        [pieces(WARM, "kind: cosine, for: 2 tokens", "kind: linear, for: 2 tokens", "kind: constant")],
        "lr_schedule.pieces[2]",
        "has no step",
        "longer",
    ),
    ([pieces(WARM, "kind: constant", "kind: linear")], "lr_schedule.pieces[2]", "no length", "for: how long"),
    (
        [pieces(WARM, "kind: constant", "kind: linear, until: 100")],
        "lr_schedule.pieces[2]",
        "its end only",
        "for: how long",
    ),
    (
        [pieces(WARM, "kind: cosine, for: 5, until: 100")],
        "lr_schedule.pieces[1].until",
        "both say where it ends",
        "keep one",
    ),
    (
        [pieces(WARM, "kind: cosine, for: 50, to: 2e-4", "kind: constant, from: 1e-5")],
        "lr_schedule.pieces[2].from",
        "jumps from 0.0002 to 1e-05 at step 61, by more than 10 times",
        "from: 0.0002",
    ),
    ([pieces(WARM, "kind: cosine, for: 50", WARM, "kind: constant")], None, "", ""),
    (
        [pieces(WARM, "kind: linear, for: 50", "kind: constant, from: 1e-3")],
        "lr_schedule.pieces[2].from",
        "jumps from 0 to 0.001",
        "from: 0",
    ),
    (
        [pieces("kind: warmup, for: 10, to: 2e-3", "kind: constant")],
        "lr_schedule.pieces[0].to",
        "0.002 is above optimizer.lr 0.001",
        "raise",
    ),
    ([pieces("kind: inverse-sqrt")], "lr_schedule.pieces[0]", "cannot begin the run", "a warmup before it"),
    ([pieces(WARM, "kind: exponential")], "lr_schedule.pieces[1]", "never falls to 0", "kind: linear"),
    ([pieces("kind: exponential, from: 0, to: 1e-4")], "lr_schedule.pieces[0]", "begins at 0", "above 0"),
    ([pieces(WARM, "kind: step, every: 5")], "lr_schedule.pieces[1]", "needs factor", "factor: 0.5"),
    ([pieces(WARM, "kind: cosine, factor: 0.5")], "lr_schedule.pieces[1].factor", "cosine has no factor", "remove it"),
    ([pieces(WARM, "kind: constant, to: 1e-4")], "lr_schedule.pieces[1].to", "constant has no to", "from: its rate"),
    (
        ["lr_schedule={warmup_steps: 5, pieces: [{kind: cosine}]}"],
        "lr_schedule.warmup_steps",
        "no place beside pieces",
        "remove it",
    ),
    (
        ["lr_schedule={warmup_steps: 50%, decay_steps: 60%}"],
        "lr_schedule.decay_steps",
        "warmup 50 + decay 60 steps exceed the run's 100",
        "at most 50",
    ),
    (
        ["optimizer.weight_decay=0", "optimizer.weight_decay_schedule=[{kind: linear}]"],
        "optimizer.weight_decay_schedule",
        "moves nothing",
        "weight_decay: the",
    ),
    (
        ["optimizer.weight_decay_schedule=[{kind: linear, for: 10}]"],
        "optimizer.weight_decay_schedule[0]",
        "ends with step 10",
        "leave its length out",
    ),
]


@pytest.mark.parametrize(("overrides", "key", "what", "mend"), REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_refused(tmp_path: Path, overrides: list[str], key: str | None, what: str, mend: str) -> None:
    if key is None:
        assert check(tmp_path, *overrides)
        return
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, *overrides)
    (problem,) = caught.value.problems
    assert problem.key == key and what in problem.what and mend in problem.fix
    assert problem.where == "--set" or problem.where.endswith("r.yaml:4:1")


def test_a_problem_names_the_line_of_its_piece(tmp_path: Path) -> None:
    text = RECIPE + "lr_schedule:\n  pieces:\n    - {kind: warmup, for: 10}\n    - {kind: cosine, for: 10%}\n"
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, text=text)
    assert caught.value.problems[0].where.endswith("r.yaml:13:7")


def test_a_last_piece_that_the_run_cuts_is_warned_of(tmp_path: Path) -> None:
    (warning,) = check(tmp_path, pieces("kind: linear, until: 200")).warnings[:1]
    assert warning.what == "ends at step 200, the run at step 100, where the rate is 0.0005, not 0"


def test_a_length_said_in_one_way_replaces_that_of_what_is_extended(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("extends: r.yaml\ntraining: {tokens: 16Ki}\n".replace("16Ki", "16384"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = check_recipe(load_recipe(tmp_path / "child.yaml"), need_data=False).recipe
    assert (recipe.training.tokens, recipe.training.steps) == (16384, 16)
    recipe = check_recipe(load_recipe(tmp_path / "child.yaml", ["training.steps=7"]), need_data=False).recipe
    assert (recipe.training.tokens, recipe.training.steps) == (None, 7)


def test_pieces_replace_the_one_line_form_of_what_is_extended_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(RECIPE + "lr_schedule: {warmup_steps: 5, min_lr: 1.0e-4}\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nlr_schedule: {pieces: [{kind: linear}]}\n")
    schedule = check_recipe(load_recipe(tmp_path / "child.yaml"), need_data=False).recipe.lr_schedule
    assert schedule.pieces and not schedule.warmup_steps and not schedule.min_lr
    back = load_recipe(tmp_path / "child.yaml", ["lr_schedule.warmup_steps=3"])
    schedule = check_recipe(back, need_data=False).recipe.lr_schedule
    assert schedule.pieces is None and schedule.warmup_steps.amount == 3 and not schedule.min_lr


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("checkpoint.every=5 apples", "a part of a run is such as 2000 (steps)"),
        ("checkpoint.every=-1", "must be from 0"),
        ("logging.every=0", "must be from 1"),
        ("checkpoint.every=101%", "more than the whole run"),
        ("training.eval_every=1.5 steps", "not a whole number of steps"),
        ("training.global_batch_size=100 tokens", "64 or 128 tokens are"),
    ],
)
def test_lengths_that_are_none(tmp_path: Path, setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check(tmp_path, setting)
    (problem,) = caught.value.problems
    assert said in str(problem) and problem.key == setting.partition("=")[0]


def test_stages_do_not_break_the_pieces_that_lead_through_them(tmp_path: Path) -> None:
    """Of a warmup that goes on, and a cosine that the last stage replaces: where the pieces lead is told of the last
    stage that follows them."""
    stages = "training.stages=[{until: 5}, {until: 50}, {until: 90}, {lr: {kind: linear, to: 0}}]"
    found = check(tmp_path, stages, pieces(WARM, "kind: cosine, to: 1.0e-4, until: 200"))
    [warning] = [problem for problem in found.warnings if problem.key.startswith("lr_schedule")]
    assert warning.key == "lr_schedule.pieces[1]"
    assert "ends at step 200, the last stage that follows it at step 90, where the rate is 0.0006605" in warning.what
    own = "training.stages=[{lr: 1.0e-3}]"
    found = check(tmp_path, own, pieces(WARM, "kind: cosine, to: 1.0e-4, until: 200"))
    assert not [problem for problem in found.warnings if problem.key.startswith("lr_schedule")]
