"""The schedule of a run in `plan`: in words, and as a picture."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.recipes import case
from tplaunch.cli.main import run
from tplaunch.cli.views.schedule import stage_bars
from tplaunch.errors import Exit
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.spec.course import Course

SVG = "{http://www.w3.org/2000/svg}"


def test_plan_tells_the_schedule_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "deepseek-v3"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "244,203 steps, 14.93T tokens" in out
    assert "learning rate: warmup 0 to 0.00022 until step 2,000 (33.55B tokens), 0.00022 constant until step" in out
    assert "7.3e-06 constant\n" in out
    shapes = "4,096 x 4,096 to 480 x 131,072 tokens in 14 shapes until step 243,203 (14.86T tokens)\n"
    assert f"batch size: {shapes}" in out
    assert "weight decay" not in out and "mixture" not in out
    alone = ["--set", "training.stages=null"]
    assert run(["plan", "deepseek-v3", *alone, "--set", "training.tokens=14.8T"]) == Exit.DONE
    out = capsys.readouterr().out
    assert "242,203 steps, 14.80T tokens" in out
    assert "batch size: 4,096 to 15,360 in 12 sizes until step 14,418 (469.04B tokens)\n" in out
    linear = ["--set", "training.tokens=1T", "--set", "lr_schedule.decay=linear"]
    assert run(["plan", "deepseek-v3", *alone, *linear, "--json"]) == Exit.DONE
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
        "deepseek-v3: 244,203 steps, 14.93T tokens",
        "learning rate (warmup, constant, cosine, constant, constant) by tokens",
        "batch size (tokens) by tokens",
        "tokens of a sample by tokens",
        "weight decay (cosine) by tokens",
    ]
    rates, sizes, lengths, _ = (_curve(chart) for chart in charts)
    assert rates[0] == (0.0, 0.0) and rates[-1] == (pytest.approx(14.92583e12, rel=1e-4), 7.3e-6)
    assert max(rates, key=lambda point: point[1])[1] == 2.2e-4
    middle = min(rates, key=lambda point: abs(point[0] - 12.15e12))  # of the cosine
    assert middle[1] == pytest.approx(1.21e-4, rel=0.02)
    assert (sizes[0][1], sizes[-1][1]) == pytest.approx((4096 * 4096, 480 * 131_072), rel=1e-5)
    assert [length for _, length in lengths] == [4096, 4096, 32768, 32768, 131_072, 131_072]
    for chart in charts:  # a number below is no wider than to the next
        ticks = [text for text in chart.iter(f"{SVG}text") if text.attrib.get("text-anchor") != "end"]
        places = [float(text.attrib["x"]) for text in ticks]
        assert all(b - a > 50 for a, b in itertools.pairwise(places))


def _curve(chart: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a chart, as they are kept for a script."""
    line = chart.find(f"{SVG}polyline")
    assert line is not None
    xs, ys = (map(float, line.attrib[axis].split()) for axis in ("data-x", "data-y"))
    return list(zip(xs, ys, strict=True))


MIXED = """\
extends: {base}
name: mixed
training:
  tokens: 100M
  seq_len: 128
  eval_every: 0
  stages:
    - {{name: web, until: 40%}}
    - {{name: web again, until: 50%, lr: 1.0e-3}}
    - {{name: books, until: 99%, data: {{train: [{{path: b/books, weight: 3}}, {{path: a/text, weight: 1}}]}}}}
    - {{name: the end of it all, lr: {{kind: linear, to: 0}}}}
lr_schedule: {{warmup_steps: 100, decay: constant}}
data: {{train: a/text, validation: null, tokenizer: null}}
"""


def test_the_picture_and_the_words_have_stages_and_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, file = tmp_path / "mixed.yaml", tmp_path / "s.svg"
    recipe.write_text(MIXED.format(base=shipped_recipes()["quickstart"]))
    assert run(["plan", str(recipe), "--gpu", "h100-80gb", "--schedule", str(file)]) == Exit.DONE
    out = capsys.readouterr().out
    assert "mixture: text until step 24,415 (50.00M tokens), 25% text + 75% books" in " ".join(out.split())
    root = ElementTree.parse(file).getroot()
    names = [text for group in root.findall(f"{SVG}g") for text in group if text.attrib.get("class") == "stage"]
    assert [text.text for text in names] == ["web", "web again", "books", "the end of it all"]
    ends = [(float(text.attrib["x"]), 3.6 * len(text.text or "")) for text in names]
    assert all(a + width < b - other for (a, width), (b, other) in itertools.pairwise(ends)), "none covers another"
    assert ends[-1][0] + ends[-1][1] <= 1100
    shades = [rect for rect in root.findall(f"{SVG}rect") if rect.attrib["fill"] in ("#eef3fa", "#ffffff")][1:]
    assert len(shades) == 4 * 2, "of each stage behind each chart"
    widths = [float(rect.attrib["width"]) for rect in shades[:4]]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.4, 0.1, 0.49, 0.01], abs=1e-3)
    parts = [
        (rect[0].text, float(rect.attrib["width"]), float(rect.attrib["height"]))
        for chart in root.findall(f"{SVG}svg")
        if chart.attrib.get("class") == "mixture"
        for rect in chart.findall(f"{SVG}rect")
    ]
    assert [words for words, _, _ in parts] == [
        "text: 100.0% until step 24,415",
        "text: 25.0% until step 48,829",
        "books: 75.0% until step 48,829",
    ]
    assert parts[1][2] * 3 == pytest.approx(parts[2][2], abs=0.3) and parts[0][1] == pytest.approx(518, abs=0.5)


def test_stages_and_mixture_in_the_terminal() -> None:
    raw = case(training={"steps": 100, "stages": [{"name": "one", "until": 40}, {"data": {"train": "b/books"}}]})
    raw["data"] = {"train": [{"path": "a/web", "weight": 3}, {"path": "a/code", "weight": 1}]}
    lines = list(stage_bars(Course(Recipe.model_validate(raw)), 27))
    assert lines == [
        "stages |one    |2          ",
        " books         ████████████",
        "   web ▆▆▆▆▆▆▆▆            ",
        "  code ▂▂▂▂▂▂▂▂            ",
    ]


@pytest.mark.parametrize("name", ["s.png", "missing/s.svg"])
def test_a_picture_that_cannot_be_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run(["plan", "quickstart", "--schedule", str(tmp_path / name)]) == Exit.USAGE
    captured = capsys.readouterr()
    assert "--schedule" in captured.err and captured.out == ""
