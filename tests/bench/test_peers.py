"""The page that the comparison with other trainers makes of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.__main__ import main
from benchmarks.peers.measure import our_recipe
from benchmarks.peers.table import page
from benchmarks.peers.work import GRIDS, SHAPES, Grid, cannot, grids
from tests.recipes import resolved


def result(trainer: str, seconds: list[float], memory: float, grid: tuple[int, int, int] = (1, 1, 1)) -> dict[str, Any]:
    return {
        "trainer": trainer,
        "shape": "small",
        "grid": list(grid),
        "cpu": "A CPU",
        "cores": 2,
        "load": 0.5,
        "threads": 2 if grid == (1, 1, 1) else 1,
        "seconds": seconds,
        "peak_memory": memory,
        "versions": {"torch": "2.13.0", trainer: "1.2"},
    }


RESULTS = [
    result("tplaunch", [1.0, 0.5, 2.0], 600e6),
    result("tplaunch", [0.8], 700e6),
    result("tplaunch", [2.0], 650e6),
    result("transformers", [1.0], 500e6),
    result("torchtitan", [1.6], 400e6),
    result("tplaunch", [1.0], 650e6, (2, 1, 1)),
    {"trainer": "transformers", "shape": "small", "grid": [2, 1, 1], "failed": "no such thing"},
]


def timed(trainer: str, seconds: float, matmul: float) -> dict[str, Any]:
    kernels = {"matmul": matmul, "other kernels": 0.25}
    return {**result(trainer, [seconds], 1e9 * seconds), "kernels": kernels}


def test_an_earlier_checkout_stands_beside_this_one() -> None:
    both = [timed("tplaunch", 1.0, 0.5), timed("tplaunch, earlier", 2.0, 1.5)]
    text = page([result("tplaunch", [1.0], 5e8), result("transformers", [1.0], 5e8)], both)
    assert "| 1 x 1 x 1 | 1,024 | 2,048 | 2.00 | 2,000 | 1,000 |" in text
    assert "| 1 x 1 x 1 | before | 1,500 | 0 | 250 | 250 |" in text
    assert "| 1 x 1 x 1 | now | 500 | 0 | 250 | 250 |" in text
    assert row(text, "Tokens/s:", "1 x 1 x 1")[-2] == "1.00"  # of the other trainers
    assert "tplaunch before" not in page(RESULTS)


def test_a_start_is_held_against_a_bare_torchrun() -> None:
    parts = {"imports": 1.0, "first step": 0.5}
    started = [{"trainer": "torchrun", "start": 2.0, "joined": 1.5}]
    started += [{"trainer": "tplaunch", "start": seconds, "parts": parts} for seconds in (2.5, 3.0, 2.0)]
    started += [{"trainer": "transformers", "start": 4.0}, {"trainer": "torchtitan", "failed": "no such thing"}]
    text = page(RESULTS, starts=started).partition("## Start")[2].partition("\n## ")[0]
    assert "| torchrun, to the end of the all-reduce | 1.50 (1.50..1.50) | |" in text
    assert "| tplaunch | 2.50 (2.00..3.00) | 1.25 |" in text and "| transformers | 4.00 (4.00..4.00) | 2.00 |" in text
    assert "torchtitan" not in text
    assert "before a rank runs 1.00, imports 1.00, first step 0.50." in text
    assert "real-time" not in text
    first = page(RESULTS, starts=[{**one, "first": True} for one in started]).partition("## Start")[2]
    assert "one all-reduce. At real-time priority: other work had what was left.\n\n| | seconds" in first
    assert "## Start" not in page(RESULTS)


def row(text: str, after: str, grid: str) -> list[str]:
    lines = text.partition(after)[2].splitlines()
    return [cell.strip() for cell in next(line for line in lines if line.startswith(f"| {grid} |")).split("|")[2:-1]]


def test_a_row_holds_medians_spread_and_ours_over_the_best_other() -> None:
    ours, transformers, torchtitan, megatron, ratio, rounds = row(page(RESULTS), "Tokens/s:", "1 x 1 x 1")
    assert ours == "2,048 (1,024..2,560)"  # 2,048 tokens in 1.0, 2.0 and 0.8 s
    assert (transformers, torchtitan, megatron) == ("2,048 (2,048..2,048)", "1,280 (1,280..1,280)", "-")
    assert (ratio, rounds) == ("1.00", "1 to 3")


def test_memory_is_held_against_the_leanest_other() -> None:
    ours, *_, ratio, _ = row(page(RESULTS), "Memory, MB", "1 x 1 x 1")
    assert (ours, ratio) == ("650 (600..700)", "1.62")


def test_without_another_trainer_there_is_no_ratio() -> None:
    assert row(page(RESULTS), "Tokens/s:", "2 x 1 x 1")[-2] == "-"


def test_the_page_says_on_what_and_what_not() -> None:
    text = page(RESULTS)
    assert "A CPU, 2 cores; 2 threads a rank with one rank, 1 thread a rank with several ranks" in text
    assert "torch 2.13.0, torchtitan 1.2" in text
    assert "- transformers: no such thing: small 2 x 1 x 1." in text
    assert "- megatron-core: was not run: small 1 x 1 x 1" in text
    assert "134m" not in text.partition("## What was not measured")[0].partition("## small")[2]


def test_the_command_reads_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in RESULTS))
    monkeypatch.setattr(sys, "argv", ["peers", "table", str(file)])
    main()
    assert capsys.readouterr().out == page(RESULTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_our_recipe_is_one_at_every_topology(shape: str) -> None:
    for grid in GRIDS:
        recipe = resolved(our_recipe(SHAPES[shape], grid))
        assert recipe.training.grad_clip is None
        assert recipe.training.global_batch_size == SHAPES[shape].batch


def test_what_a_trainer_cannot_do_has_a_reason() -> None:
    cannots = [cannot("transformers", "small", grid) is not None for grid in GRIDS]
    assert cannots == [False, True, True, False, True, True]
    assert not any(cannot("tplaunch", "small", grid) for grid in GRIDS)
    assert [cannot("torchtitan", shape, Grid(1, 1, 1)) is not None for shape in SHAPES] == [False, False, True]


def test_experts_have_topologies_of_their_own() -> None:
    assert Grid.parse("1,1,2,2") in grids("moe") and str(Grid(1, 1, 2, 2)) == "1 x 1 x 2, EP 2"
    assert grids("small") == GRIDS and Grid.parse("2,1,1") == (2, 1, 1, 1)
    recipe = resolved(our_recipe(SHAPES["moe"], Grid(1, 1, 2, 2)))
    assert recipe.topology.ep == 2 and recipe.model.has_experts(0)
