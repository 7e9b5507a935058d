"""The page that the comparison of generation makes of its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.generate.__main__ import main
from benchmarks.generate.table import page


def result(engine: str, read: float, made: float, same: float = 1.0, **other: Any) -> dict[str, Any]:
    return {
        "shape": "small",
        "dtype": "fp32",
        "grid": [1, 1],
        "cpu": "A CPU",
        "cores": 2,
        "threads": 2,
        "load": 0.5,
        "engine": engine,
        "batch": 1,
        "read": read,
        "made": made,
        "same": same,
        "versions": {"torch": "2.13.0"},
        **other,
    }


RESULTS = [
    result("tplaunch", 3000, 90),
    result("tplaunch", 1000, 60),
    result("tplaunch", 2000, 75),
    result("transformers", 1600, 50),
    result("tplaunch", 900, 40, grid=[2, 1], threads=1),
    result("tplaunch", 5000, 80, 0.75, dtype="bf16"),
    result("transformers", 4000, 80, 0.75, dtype="bf16"),
]


def test_a_row_holds_medians_spread_and_ours_over_theirs() -> None:
    text = page(RESULTS)
    assert "| 1 x 1 | 1 | prompts | 2,000 (1,000..3,000) | 1,600 (1,600..1,600) | 1.25 | 3 |" in text
    assert "| 1 x 1 | 1 | made | 75.0 (60.0..90.0) | 50.0 (50.0..50.0) | 1.50 | 3 |" in text
    assert "| 2 x 1 | 1 | prompts | 900 (900..900) | - | - | 1 |" in text
    assert "- Machine: A CPU, 2 cores; threads: 2 a rank with 1 rank, 1 a rank with 2 ranks." in text


def test_tokens_that_differ_are_told() -> None:
    fp32, _, bf16 = page(RESULTS).partition("## small, bf16")
    assert "Both made the same tokens." in fp32
    assert "75% of the tokens or more were the same" in bf16


def test_what_was_not_run_is_told() -> None:
    left = page(RESULTS).partition("What was not measured")[2]
    assert "small fp32 1 x 2" in left and "small fp32 2 x 1" not in left and "134m bf16 1 x 1" in left


@pytest.mark.slow
def test_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way once, on a shape of nearly nothing."""
    import benchmarks.generate.__main__ as command
    from benchmarks.llama import Shape

    monkeypatch.setitem(command.SHAPES, "small", Shape(32, 1, 2, 1, 64, 97, 16, 1, 1))
    out = tmp_path / "results.jsonl"
    asked = ["run", "--output", str(out), "--rounds", "1", "--shape", "small", "--dtype", "fp32", "--topologies", "1,1"]
    monkeypatch.setattr(sys, "argv", ["generate", *asked])
    main()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["engine"], line["batch"]) for line in lines] == [
        ("tplaunch", 1),
        ("transformers", 1),
        ("tplaunch", 8),
        ("transformers", 8),
    ]
    assert all(line["read"] > 0 and line["made"] > 0 and line["same"] > 0.9 for line in lines)
    monkeypatch.setattr(sys, "argv", ["generate", "table", str(out)])
    main()
    assert "## small, fp32" in capsys.readouterr().out
