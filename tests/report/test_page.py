"""The report of a run: whole, small, alone, and harmless whatever files say; looked at in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.made_runs import BEGAN, make_run
from tests.recipes import case
from tplaunch.report.facts import RunFacts
from tplaunch.report.page import page
from tplaunch.report.palette import DARK, LIGHT
from tplaunch.run.directory import RunDir

HOSTILE = '"><img src=x onerror="document.title=1"><script>document.title=1</script>&amp;'
EVENTS: list[dict[str, Any]] = [
    {"event": "attempt", "time": BEGAN, "attempt": 1},
    {"event": "checkpoint", "time": BEGAN + 60, "step": 50},
    {"event": "loss_spike", "time": BEGAN + 80, "step": 70, "loss": 9.0, "median": 2.0},
    {"event": "attempt_end", "time": BEGAN + 90, "code": 1, "attempt": 1, "why": "rank 3 failed"},
    {"event": "attempt", "time": BEGAN + 91, "attempt": 2},
    {"event": "resume", "time": BEGAN + 92, "step": 50},
    {"event": "done", "time": BEGAN + 300, "step": 200},
    {"event": "attempt_end", "time": BEGAN + 301, "code": 0, "attempt": 2, "why": "the last step is done"},
]


def planned(folder: Path, **options: Any) -> RunDir:
    return make_run(folder, events=EVENTS, recipe={**case(2, 2, 2), "hardware": {"gpu": "h100-80gb"}}, **options)


def html_of(run: RunDir) -> str:
    return page(RunFacts.of(run))


class Elements(HTMLParser):
    """Counts elements, and keeps their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]


def branched(folder: Path, parent: str) -> RunDir:
    begun: dict[str, Any] = {"event": "branch", "time": BEGAN, "step": 100, "parent": parent, "path": "x"}
    return make_run(folder, events=[begun, EVENTS[0], {"event": "resume", "time": BEGAN + 1, "step": 100}])


def test_a_branch_is_marked_where_it_began_and_stands_in_its_tree(tmp_path: Path) -> None:
    trunk = make_run(tmp_path / "trunk")
    text = html_of(branched(tmp_path / "cooled", str(trunk.root)))
    assert "the branch, or a further attempt, began" in text
    assert "<b>cooled</b>" in text and "from step 100, at step 200" in text
    assert "a further attempt began" not in html_of(trunk) and "<b>trunk</b>" in html_of(trunk)


@pytest.mark.parametrize("parent", ["itself", "\0" + HOSTILE, HOSTILE, "x" * 5000])
def test_a_parent_that_is_none_harms_nothing(tmp_path: Path, parent: str) -> None:
    run = branched(tmp_path / "odd", str(tmp_path / "odd") if parent == "itself" else parent)
    found = Elements(html_of(run))
    assert "onerror" not in found.attributes and "img" not in found.tags
    assert len(RunFacts.of(run).curves.line("loss")) == 200


def test_a_report_is_whole(tmp_path: Path) -> None:
    text = html_of(planned(tmp_path / "my run"))
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Curves", "Predicted and measured", "Topology", "Attempts", "Events", "Environment", "Recipe"]
    assert text.count('class="rank ') == 8 and text.count('<svg class="chart"') == 7
    assert text.count('class="mark attempt"') == 7 + 1  # on each chart, and in the key
    assert text.count('class="mark checkpoint"') == 1 + 1  # on the loss alone
    assert "rank 3 failed" in text and "global_batch_size: 8" in text and "my run" in text


def test_a_report_needs_nothing_else(tmp_path: Path) -> None:
    text = html_of(planned(tmp_path / "run"))
    found = Elements(text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert not {"src", "href", "srcset", "action"} & set(found.attributes)
    assert "url(" not in text and "@import" not in text
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_text_of_files_stays_text(tmp_path: Path) -> None:
    run = planned(tmp_path / 'x"><script>1<')
    run.events.write_text(
        "".join(
            json.dumps(event) + "\n"
            for event in [
                {"event": "attempt", "time": BEGAN, "attempt": 1, "job": HOSTILE, "nodes": [HOSTILE]},
                {"event": "checkpoint_failed", "time": BEGAN + 40, "step": 30, "why": HOSTILE},
                {"event": "attempt_end", "time": BEGAN + 90, "code": 1, "attempt": 1, "why": HOSTILE},
                {"event": "changed", "time": BEGAN + 91, "changes": {HOSTILE: [HOSTILE, HOSTILE]}},
                {"event": "attempt", "time": BEGAN + 92, "attempt": 2},
            ]
        )
    )
    (run.root / "samples.jsonl").write_text(json.dumps({"step": HOSTILE, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    run.recipe.write_text(run.recipe.read_text() + f"# {HOSTILE}\n")
    (run.root / "plan.json").write_text(
        json.dumps(
            {
                "gpu": HOSTILE,
                "step_seconds": 1,
                "tokens_per_s": 1,
                "mfu": 1,
                "memory_bytes": 2**36,
                "memory": [{HOSTILE: 5e9, "total": 5e9}],
                "breakdown_seconds": {HOSTILE: 1.0},
            }
        )
    )
    text = html_of(run)
    tags = Elements(text).tags
    assert tags.count("script") == 1 and "img" not in tags
    assert text.count("&lt;script&gt;document.title=1") >= 10


def test_a_run_of_20000_records_is_small_and_keeps_its_spikes(tmp_path: Path) -> None:
    run = planned(tmp_path / "run", records=20_000, spikes={4321: 31.5, 15_000: 27.25})
    text = html_of(run)
    assert len(text) < 2_000_000
    loss = text[text.index('<svg class="chart"') :]
    values = {float(y) for y in re.search(r'data-y="([^"]*)"', loss)[1].split()}  # type: ignore[index]
    assert {31.5, 27.25} <= values


@pytest.mark.parametrize("spoil", ["metrics.jsonl", "events.jsonl", "recipe.yaml"])
def test_what_is_missing_or_broken_is_left_out(tmp_path: Path, spoil: str) -> None:
    run = planned(tmp_path / "run")
    for content in (
        b"",
        b"\xff\xfe{[",
        b'{"step": 1, "loss": null, "time": NaN}\n{"event": "done", "time": 1e300, "step": 1}\n',
    ):
        (run.root / spoil).write_bytes(content)
        assert "</html>" in html_of(run)


@pytest.mark.parametrize(
    "values", [[2.5], [2.5, 2.5], [1e-300, 1e99], [1e-30, 1e60], [0.0, 0.0], [-1.0, 5.0], [None, 3.0]], ids=str
)
def test_curves_of_any_values_are_drawn(tmp_path: Path, values: list[float | None]) -> None:
    run = planned(tmp_path / "run", records=1)
    run.metrics.write_text("".join(json.dumps({"step": i, "loss": v, "lr": v}) + "\n" for i, v in enumerate(values)))
    text = html_of(run)
    assert "nan" not in text.lower().replace("finance", "") and 'aria-label="loss by step"' in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed")


def chromium(tmp_path: Path, file: Path, *options: str) -> str:
    """What headless Chromium prints about a page."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--window-size=1200,1600", f"--user-data-dir={tmp_path / 'profile'}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@browser
def test_a_browser_shows_it_in_light_and_dark_and_on_paper(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    file = tmp_path / "report.html"
    file.write_text(html_of(planned(tmp_path / "run")), encoding="utf-8")
    dark = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    for palette, options in ((LIGHT, ()), (DARK, dark)):
        chromium(tmp_path, file, f"--screenshot={tmp_path / 'it.png'}", *options)
        picture = image.open(tmp_path / "it.png").convert("RGB")
        colours = {f"#{r:02x}{g:02x}{b:02x}": count for count, (r, g, b) in picture.getcolors(1 << 24)}
        assert max(colours, key=lambda colour: colours[colour]) == palette.background
        assert colours.get(palette.run(0), 0) > 300  # the curves
    chromium(tmp_path, file, f"--print-to-pdf={tmp_path / 'it.pdf'}", *dark)
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "it.pdf").read_bytes())) <= 8


@browser
def test_a_browser_finds_no_script_but_ours_and_shows_values(tmp_path: Path) -> None:
    run = planned(tmp_path / "run")
    (run.root / "samples.jsonl").write_text(json.dumps({"step": 3, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    text = html_of(run)
    file = tmp_path / "report.html"
    file.write_text(text, encoding="utf-8")
    shown = chromium(tmp_path, file, "--dump-dom")
    assert "<title>run</title>" in shown and 'class="rule"' in shown  # ours has run, theirs has not
    # A pointer over the middle of the loss, by a script that the page's own policy would not allow.
    probe = (
        "<script>const s=document.querySelector('svg.chart'),r=s.getBoundingClientRect();"
        "s.dispatchEvent(new PointerEvent('pointermove',{clientX:r.x+r.width/2,clientY:r.y+9}))</script></body>"
    )
    file.write_text(text.replace("</body>", probe), encoding="utf-8")
    assert "loss " not in re.findall(r'<span class="values">(.*?)</span>', chromium(tmp_path, file, "--dump-dom"))[0]
    file.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", probe), encoding="utf-8")
    values = re.findall(r'<span class="values">(.*?)</span>', chromium(tmp_path, file, "--dump-dom"))[0]
    step, loss = re.fullmatch(r"step (\d+)   loss ([\d.]+)(?:   validation [\d.]+)?", values).groups()  # type: ignore[union-attr]
    measured = {record["step"]: record["loss"] for record in run.read_metrics()}
    assert 90 <= int(step) <= 110 and float(loss) == pytest.approx(measured[int(step)], rel=1e-4)
