"""Curves in the terminal and in pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.made_runs import make_run
from tplaunch.cli.views.table import plain
from tplaunch.errors import TplaunchError
from tplaunch.report.charts import USUAL, Chart, Line, charts, limits, log_ticks, number, ticks
from tplaunch.report.curves import Curves


def drawn(tmp_path: Path, *names: str, keys: tuple[str, ...] = USUAL) -> list[Chart]:
    runs = [(name, Curves.of(make_run(tmp_path / name, records=300, seed=len(name)))) for name in names]
    return charts(runs, keys)


def test_charts_have_what_runs_have(tmp_path: Path) -> None:
    found = drawn(tmp_path, "a", "bb", keys=("loss", "mfu", "none"))
    assert [chart.key for chart in found] == ["loss", "mfu"]
    assert [line.label for line in found[0].lines] == ["a", "a validation", "bb", "bb validation"]
    low, high = limits(found[0])
    assert all(low < y < high for line in found[0].lines for _, y in line.points)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.1, 2.3), (-5, 3e6), (1e-9, 3e-9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-12 <= found[0] and found[-1] <= high * (1 + 1e-12)
    assert len({number(value) for value in found}) == len(found)


@pytest.mark.parametrize(("low", "high"), [(1, 1e6), (0.3, 40), (2, 3), (1e-7, 5e-7)])
def test_ticks_of_logarithms(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 8 and all(low <= value <= high for value in found)


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_is_filled_and_not_overrun(tmp_path: Path, width: int) -> None:
    pytest.importorskip("plotext")
    from tplaunch.report.terminal import terminal_charts

    text = terminal_charts(drawn(tmp_path, "a"), width, colour=False)
    lines = text.split("\n")
    assert "\x1b" not in text and max(map(len, lines)) <= width and max(map(len, lines)) > width - 4
    for title in ("loss by step", "learning rate by step", "gradient norm by step", "tokens/s by step"):
        assert title in text
    assert len(lines) < (40 if width == 200 else 75)


def test_runs_are_told_apart_by_letters_where_there_are_no_colours(tmp_path: Path) -> None:
    pytest.importorskip("plotext")
    from tplaunch.report.terminal import terminal_charts

    charts = drawn(tmp_path, "one", "three", keys=("lr",))
    text = terminal_charts(charts, 80, colour=False)
    assert text.startswith("a one   b three") and text.count("b") > 20
    coloured = terminal_charts(charts, 80, colour=True)
    assert "\x1b[" in coloured and plain(coloured).startswith("━━ one   ━━ three")


def test_a_logarithmic_curve_fills_its_chart_in_the_terminal() -> None:
    pytest.importorskip("plotext")
    from tplaunch.report.terminal import terminal_charts

    points = [(float(x), 10.0**x) for x in range(5)]
    chart = Chart("loss", "loss", "step", [Line("a", points)], log=True)
    text = terminal_charts([chart], 60, colour=False)
    rows = [row for row in text.splitlines() if any("\u2800" < sign <= "\u28ff" for sign in row)]
    assert len(rows) > 10, "from the lowest row to the highest"
    labels = [row.split("┤")[0].strip() for row in text.splitlines() if "┤" in row]
    assert labels == ["10K", "1K", "100", "10", "1"]


def test_one_record_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("plotext")
    from tplaunch.report.terminal import terminal_charts

    curves = Curves.of(make_run(tmp_path / "a", records=1))
    assert "loss by step" in terminal_charts(charts([("a", curves)], USUAL), 80, colour=False)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_pictures(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    from tplaunch.report.picture import write_picture

    file = tmp_path / f"it.{ending}"
    write_picture(drawn(tmp_path, "a", "bb"), file)
    assert file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-") and file.stat().st_size > 10_000
    with pytest.raises(TplaunchError, match="cannot write"):
        write_picture(drawn(tmp_path, "c"), tmp_path / "it.doc")
    with pytest.raises(TplaunchError, match="cannot write"):
        write_picture(drawn(tmp_path, "d"), tmp_path / "none" / f"it.{ending}")


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from tplaunch.report.terminal import need

    monkeypatch.setitem(sys.modules, "plotext", None)
    with pytest.raises(TplaunchError) as caught:
        need("plotext")
    assert str(caught.value) == "drawing needs plotext: pip install 'tplaunch[plots]'"
