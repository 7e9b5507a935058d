"""The schedule of a run in `plan`: in words, and as a picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tplaunch.cli.main import run
from tplaunch.errors import Exit

SVG = "{http://www.w3.org/2000/svg}"


def test_plan_tells_the_schedule_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "242,203 steps, 14.80T tokens" in out
    assert "learning rate: warmup 0 to 0.00022 until step 2,000 (33.55B tokens), 0.00022 constant until step" in out
    assert "7.3e-06 constant\n" in out
    assert "batch size: 4,096 to 15,360 in 12 sizes until step 14,418 (469.04B tokens)\n" in out
    assert "weight decay" not in out
    assert (
        run(["plan", "deepseek-v3", "--json", "--set", "training.tokens=1T", "--set", "lr_schedule.decay=linear"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["tokens"] == pytest.approx(1e12, rel=1e-4)


def test_the_picture_of_a_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "s.svg"
    decays = "optimizer.weight_decay_schedule=[{kind: cosine, to: 0.01}]"
    assert run(["plan", "deepseek-v3", "--schedule", str(file), "--set", decays]) == Exit.DONE
    out = capsys.readouterr().out
    assert "weight decay: cosine 0.1 to 0.01\n" in out and f"wrote {file}" in out
    assert "learning rate (warmup, constant, cosine, constant, constant) by tokens" in out, "drawn in the terminal, too"
    root = ElementTree.parse(file).getroot()
    charts = root.findall(f"{SVG}svg")
    assert [text.text for text in root.findall(f"{SVG}text")] == [
        "deepseek-v3: 242,203 steps, 14.80T tokens",
        "learning rate (warmup, constant, cosine, constant, constant) by tokens",
        "batch size (samples) by tokens",
        "weight decay (cosine) by tokens",
    ]
    rates, sizes, _ = (chart.find(f"{SVG}polyline") for chart in charts)
    assert rates is not None and sizes is not None
    points = list(zip(*([float(x) for x in rates.attrib[axis].split()] for axis in ("data-x", "data-y")), strict=True))
    assert points[0] == (0.0, 0.0) and points[-1] == (pytest.approx(14.8e12, rel=1e-4), 7.3e-6)
    assert max(points, key=lambda point: point[1])[1] == 2.2e-4
    middle = min(points, key=lambda point: abs(point[0] - 12.15e12))  # of the cosine
    assert middle[1] == pytest.approx(1.21e-4, rel=0.02)
    assert sizes.attrib["data-y"].split()[0] == "4096" and sizes.attrib["data-y"].split()[-1] == "15360"
    for chart in charts:  # a number below is no wider than to the next
        ticks = [text for text in chart.iter(f"{SVG}text") if text.attrib.get("text-anchor") != "end"]
        places = [float(text.attrib["x"]) for text in ticks]
        assert all(b - a > 50 for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("name", ["s.png", "missing/s.svg"])
def test_a_picture_that_cannot_be_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(["plan", "quickstart", "--schedule", str(tmp_path / name)]) == Exit.USAGE
    captured = capsys.readouterr()
    assert "--schedule" in captured.err and captured.out == ""
