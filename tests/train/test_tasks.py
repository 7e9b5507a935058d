"""What the model is measured by while it is trained: the numbers of `tplaunch eval`, on every topology, at no cost to
the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.questions import write_records
from tests.recipes import ranks, resolved
from tests.train.test_sampler import STEPS, curve, events, folder, recipe, state  # noqa: F401 (folder: a fixture)
from tests.training import resumed
from tests.world import World
from tplaunch.cli.main import run
from tplaunch.errors import Exit
from tplaunch.files import read_lines
from tplaunch.recipe.load import dump_recipe

EVERY = 5
FIGURES = {
    "held/loss": "loss",
    "held/perplexity": "perplexity",
    "held/bits_per_byte": "bits_per_byte",
    "pairs/loss": "loss",
    "quiz/acc": "acc",
    "quiz/acc_norm": "acc_norm",
    "quiz/acc_bytes": "acc_bytes",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> dict[str, Any]:  # noqa: F811
    place = tmp_path_factory.mktemp("tasks")
    lines = [{"body": f"whether it is nobler {number} in the mind"} for number in range(7)]
    (place / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    choices = ["or not", "that is the", "in"]
    quiz = [{"query": f"to be {n}" * (1 + n % 2), "choices": choices, "answer": n * 7 % 3} for n in range(9)]
    write_records(place / "quiz.jsonl", quiz)
    return {
        "tasks": [
            {"data": str(place / "held.jsonl"), "text_key": "body"},
            {"name": "pairs", "data": str(folder / "corpus")},
            {"choices": str(place / "quiz.jsonl")},
        ]
    }


def train(raw: dict[str, Any], root: str, tokenizer: str) -> list[bool]:
    """Train to the end by the real loop; whether the first evaluation left things as they were."""
    made = resumed(raw, root, tokenizer)
    same: list[bool] = []
    if made.tasks is None:
        made.run()
        return same
    real = made.tasks.measure

    def measure() -> dict[str, float]:
        before = None if same else state()
        found: dict[str, float] = real()
        same.append(before is None or state() == before)
        return found

    made.tasks.measure = measure
    made.run()
    return same


def measured(root: Path) -> dict[int, dict[str, float]]:
    """Step -> metrics of the tasks."""
    found = {}
    for record in read_lines(root / "metrics.jsonl"):
        if some := {key.removeprefix("eval/"): value for key, value in record.items() if key.startswith("eval/")}:
            found[record["step"]] = some
    return found


@pytest.fixture(scope="module")
def alone(world: World, folder: Path, tasks: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The run of one process, without data of a validation."""
    root = tmp_path_factory.mktemp("alone")
    raw = {**recipe(folder, None, checkpoint={"every": EVERY, "keep": 5}), "eval": tasks}
    assert world.run(1, train, raw, str(root), str(folder / "tokenizer.json")) == [[True, True]]
    return root


@pytest.mark.parametrize("step", [EVERY, STEPS])
def test_the_numbers_are_those_of_eval(alone: Path, tasks: dict[str, Any], step: int, capfd: Any) -> None:
    text, pairs, quiz = tasks["tasks"]
    checkpoint = alone / f"checkpoints/step-{step:08d}"
    arguments = ["--data", text["data"], "--text-key", "body", "--choices", quiz["choices"], "--data", pairs["data"]]
    capfd.readouterr()
    assert run(["eval", str(checkpoint), "--json", *arguments]) == Exit.DONE
    held, corpus, questions = json.loads(capfd.readouterr().out)
    theirs = {"held": held, "pairs": corpus, "quiz": questions}
    found = measured(alone)[step]
    assert found.keys() >= FIGURES.keys()
    for key, name in FIGURES.items():
        assert found[key] == pytest.approx(theirs[key.partition("/")[0]][name], rel=1e-6), key
    assert measured(alone)[EVERY]["held/loss"] != measured(alone)[STEPS]["held/loss"]


CASES: list[Any] = [
    {},
    {"tp": 2, "sequence_parallel": True},
    {"cp": 2},
    {"pp": 2, "schedule": "zbvzerobubble"},
    {"dp": 2, "zero": 3},
    *(
        pytest.param(topology, marks=pytest.mark.slow)
        for topology in (
            {"pp": 2, "dp": 2, "zero": 1},
            {"dp": 2, "zero": 2},
            {"tp": 2, "cp": 2},
            {"pp": 2, "schedule": "dualpipev"},
            {"pp": 2, "cp": 2},
        )
    ),
]


@pytest.mark.parametrize("topology", CASES, ids=lambda one: "-".join(f"{k}{v}" for k, v in one.items()) or "alone")
def test_any_topology_measures_the_same_and_trains_as_without(
    world: World,
    tmp_path: Path,
    folder: Path,  # noqa: F811
    alone: Path,
    tasks: dict[str, Any],
    topology: dict[str, Any],
) -> None:
    on, off, tokenizer = alone, tmp_path / "off", str(folder / "tokenizer.json")
    raw = {**recipe(folder, None, **topology), "eval": tasks}
    if topology:
        on = tmp_path / "on"
        assert world.run(ranks(raw), train, raw, str(on), tokenizer) == [[True, True]] * ranks(raw)
        for step, figures in measured(alone).items():
            assert measured(on)[step] == {key: pytest.approx(value, rel=1e-9) for key, value in figures.items()}
    world.run(ranks(raw), train, {**raw, "eval": {}}, str(off), tokenizer)
    assert curve(on) == curve(off) and len(curve(on)) == STEPS
    assert not measured(off) and [*measured(on)] == [EVERY, STEPS]


MOE = {"moe": {"experts": 4, "top_k": 2, "ffn_hidden_size": 32, "bias_rate": 0.001}}


def test_ranks_that_share_experts_have_passes_of_the_same_number(
    world: World,
    tmp_path: Path,
    folder: Path,  # noqa: F811
    tasks: dict[str, Any],
) -> None:
    """An uneven number of passes over dp 2, whose ranks exchange tokens in each; the router's biases stay."""
    found = {}
    for name, topology in (("one", {}), ("ep", {"dp": 2, "ep": 2})):
        raw = {**recipe(folder, None, **topology), "eval": tasks}
        raw["model"] |= MOE
        root = tmp_path / name
        assert world.run(ranks(raw), train, raw, str(root), str(folder / "tokenizer.json"))[0] == [True, True]
        found[name] = root
        if not topology:
            world.run(1, train, {**raw, "eval": {}}, str(tmp_path / "off"), str(folder / "tokenizer.json"))
            assert curve(root) == curve(tmp_path / "off")
    for step, figures in measured(found["one"]).items():
        assert measured(found["ep"])[step] == {key: pytest.approx(value, rel=1e-9) for key, value in figures.items()}


def test_what_is_said(
    alone: Path,
    folder: Path,  # noqa: F811
    tasks: dict[str, Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    said = events(alone, "evaluation")
    assert [one["step"] for one in said] == [EVERY, STEPS] and said[0]["seconds"] > 0
    assert said[1]["figures"] == {f"eval/{key}": value for key, value in measured(alone)[STEPS].items()}
    raw = {**recipe(folder, None), "eval": tasks}
    (alone / "recipe.yaml").write_text(dump_recipe(resolved(raw)))
    assert run(["runs", "show", str(alone)]) == Exit.DONE
    shown = capfd.readouterr().out
    assert f"quiz acc {measured(alone)[STEPS]['quiz/acc']:.4f}" in shown
    assert f"held loss {measured(alone)[STEPS]['held/loss']:.4f}" in shown
