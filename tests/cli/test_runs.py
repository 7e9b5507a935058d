"""`tplaunch runs`, as it is typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.cli.test_speed import HEAVY, modules
from tests.made_runs import make_run
from tplaunch.cli.app import app
from tplaunch.errors import TplaunchError

SWEEP = ("lr-1", "lr-2", "lr-3")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "small", records=60)
    for i, name in enumerate(SWEEP):
        make_run(tmp_path / "runs" / "sweep" / name, records=100, lr=1e-3 * (i + 1), seed=i)
    return tmp_path / "runs"


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["runs", *arguments], prog_name="tplaunch")
    if result.exception is not None and not isinstance(result.exception, (SystemExit, TplaunchError)):
        raise result.exception
    return result


def test_list(runs: Path) -> None:
    lines = call("list").output.splitlines()
    assert lines[0].split() == ["run", "state", "step", "loss", "tokens/s", "topology", "age"]
    assert {line.split()[0] for line in lines[1:]} == {"small", *(f"sweep/{name}" for name in SWEEP)}
    assert all("done" in line and "tp2 pp2 dp2" in line for line in lines[1:])


def test_list_sorts_filters_and_prints_json(runs: Path) -> None:
    found = json.loads(call("list", "--filter", "optimizer.lr<2.5e-3", "--sort", "-optimizer.lr", "--json").output)
    assert [one["name"] for one in found] == ["sweep/lr-2", "sweep/lr-1"]
    assert found[0]["metrics"]["step"] == found[0]["step"] == 100 and found[0]["recipe"]["topology.tp"] == 2
    assert "none of 4 runs passes" in call("list", "--filter", "step>1e6").output
    assert isinstance(call("list", "--filter", "stp>1").exception, TplaunchError)


def test_an_empty_folder_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "tplaunch train RECIPE" in call("list").output
    assert isinstance(call("list", "nowhere").exception, TplaunchError)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_list_is_as_wide_as_the_terminal(width: int, runs: Path) -> None:
    from tplaunch.cli.views.run_list import list_text
    from tplaunch.cli.views.table import plain
    from tplaunch.report.rows import rows_of
    from tplaunch.run.directory import runs_under

    make_run(runs / "a-run-with-a-name-that-is-far-too-long-for-any-terminal-1", records=5)
    failed = {"event": "attempt_end", "time": 1.0, "code": 1, "why": "rank 3 failed: " + "x" * 300}
    make_run(runs / "failed", records=5, events=[{"event": "attempt", "time": 0.0, "attempt": 1}, failed])
    text = plain(list_text(rows_of(runs_under(runs), runs)[0], width))
    assert max(map(len, text.splitlines())) <= max(width, 72)
    assert ("rank 3 failed" in text) == (width == 200)
    assert "…" in text and "-1 " in text


def test_show(runs: Path) -> None:
    text = call("show", "small").output
    for words in ("step        60 of 60", "Measured", "no prediction", "Attempts", "the last step is done", "Events"):
        assert words in text
    told = json.loads(call("show", "small", "--json").output)
    assert told["state"] == "done" and told["attempts"][0]["number"] == 1 and told["best_loss"]["loss"] > 2
    error = call("show", "sweep").exception
    assert isinstance(error, TplaunchError) and "a sweep of 3 runs" in str(error)


def test_compare(runs: Path) -> None:
    text = call("compare", "sweep").output
    assert "optimizer.lr" in text and "0.001" in text and "best loss" in text and "lr-3" in text
    told = json.loads(call("compare", "small", "sweep/lr-1", "--json").output)
    assert told["recipe"]["optimizer.lr"] == {"small": 3e-3, "lr-1": 1e-3}
    assert told["recipe"]["training.steps"] == {"small": 60, "lr-1": 100}
    assert set(told["curves"]["loss at step 60"]) == {"small", "lr-1"}
    assert isinstance(call("compare", "small").exception, TplaunchError)


def test_plot(runs: Path) -> None:
    pytest.importorskip("plotext")
    text = call("plot", "sweep").output
    assert text.startswith("a lr-1   b lr-2   c lr-3") and "gradient norm by step" in text
    assert (
        "mfu" not in text
        and "model FLOPs utilization by tokens" in call("plot", "small", "--metric", "mfu", "--x", "tokens").output
    )
    assert "there are data_time_s" in str(call("plot", "small", "--metric", "none").exception)
    assert isinstance(call("plot", "small", "--x", "time").exception, TplaunchError)


def test_plot_writes_a_picture(runs: Path) -> None:
    pytest.importorskip("matplotlib")
    assert call("plot", "small", "-o", "it.svg").output == "wrote it.svg\n"
    assert Path("it.svg").read_text().startswith("<?xml")


def test_report(runs: Path) -> None:
    assert call("report", "small", "-o", "it.html").output.startswith("wrote it.html, ")
    assert "<title>small</title>" in Path("it.html").read_text()
    assert isinstance(call("report", "small", "-o", "none/it.html").exception, TplaunchError)


def test_watch_ends_with_the_runs(runs: Path) -> None:
    assert "goes on" in call("watch").output
    assert call("watch", "small").output.splitlines()[-1] == "small  done  the last step is done"


def test_a_list_on_a_stream_in_ascii(runs: Path) -> None:
    command = [sys.executable, "-m", "tplaunch", "runs", "watch", "small"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "small"], ["compare", "sweep"], ["report", "small", "-o", "r.html"]], ids=" ".join
)
def test_answers_without_the_trainer(arguments: list[str], runs: Path) -> None:
    loaded = modules("runs", *arguments)
    assert not loaded & HEAVY
    if arguments == ["list"]:
        assert "tplaunch.recipe.schema" not in loaded and "rich" not in loaded
