"""Make the pictures of runs again, and of the console of one that goes on. The runs are made up.

python docs/render_runs.py

Needs the extra `plots`, and Debian's chromium and fonts-dejavu-core.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from terminal import draw_terminal  # noqa: E402

from tests.made_runs import made_records, make_run  # noqa: E402
from tplaunch.check.recipe import check_recipe  # noqa: E402
from tplaunch.launch.console import RunView  # noqa: E402
from tplaunch.recipe.load import load_recipe  # noqa: E402
from tplaunch.run.directory import RunDir  # noqa: E402

PICTURES = HERE / "pictures"
NOW = time.time()
BIG = 20_000


def recipe(name: str, steps: int, *overrides: str) -> dict[str, Any]:
    """A recipe that ships, resolved."""
    checked = check_recipe(load_recipe(name, [f"training.steps={steps}", *overrides]), need_data=False)
    return checked.recipe.model_dump(by_alias=True)


def story(began: float, *events: tuple[str, float, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"event": name, "time": began + at, **values} for name, at, values in events]


def attempt(number: int = 1, **values: Any) -> dict[str, Any]:
    return {"attempt": number, "nodes": [f"gpu-{i:03d}" for i in range(1, 5)], **values}


def make_runs(runs: Path) -> RunDir:
    """Runs in every state; returns the one that goes on."""
    end = {"attempt": 1, "job": "4711", "code": 0, "why": "the last step is done"}
    big = NOW - 26_000
    events = story(
        big,
        ("attempt", 5, attempt(job="4711")),
        ("start", 60, {"attempt": 1, "world_size": 512}),
        *(("checkpoint", 10 + step, {"step": step, "seconds": 12}) for step in range(1000, 9001, 1000)),
        ("loss_spike", 4331, {"step": 4321, "loss": 6.1, "median": 2.6}),
        ("skipped", 6010, {"step": 6000}),
        ("straggler", 7787, dict(step=7777, rank=17, node=2, tp=1, dp=2, pp=0, ratio=1.31)),
        ("fault", 9400, {"step": 9400, "kind": "the process ended with signal 9", "rank": 17}),
        ("attempt_end", 9420, {**end, "code": 1, "why": "rank 17 on gpu-003 ended with signal 9; it starts again"}),
        ("changed", 9500, {"changes": {"lr_schedule.min_lr": [1.5e-5, 3e-5], "checkpoint.every": [1000, 500]}}),
        ("attempt", 9501, attempt(2, job="4711")),
        ("resume", 9560, {"step": 9000}),
        *(("checkpoint", 610 + step, {"step": step, "seconds": 12}) for step in range(9500, BIG + 1, 500)),
        ("done", 610 + BIG, {"step": BIG}),
        ("attempt_end", 640 + BIG, {**end, "attempt": 2}),
    )
    big_recipe = recipe("llama3-70b", BIG)
    spikes = {4320: 6.1, 4321: 4.0, 15_019: 5.5}
    made = make_run(
        runs / "llama3-70b", records=BIG, began=big, events=events, spikes=spikes, recipe=big_recipe, lr=1.5e-4
    )
    stretch(made)
    texts = [
        "there was a small model that had seen ten thousand steps and wanted more.",
        "a model learned to count its own tokens.",
    ]
    lines = [{"step": BIG // 2 * (i + 1), "prompt": "Once upon a time ", "text": text} for i, text in enumerate(texts)]
    (made.root / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = recipe("llama3-8b", 4000)
    for i, lr in enumerate((1e-4, 3e-4, 9e-4)):
        make_run(
            runs / "sweep" / f"lr-{lr:.0e}", records=400, every=10, lr=lr, seed=i, began=NOW - 90_000 + i, recipe=small
        )
    failed = {**end, "code": 1, "why": "rank 3 (tp=3 dp=0 pp=0): CUDA out of memory"}
    began = NOW - 7000
    make_run(runs / "llama3-8b-long", records=12, every=10, began=began, recipe=small,
             events=story(began, ("attempt", 0, attempt()), ("attempt_end", 500, failed)))  # fmt: skip
    began = NOW - 5000
    stopped = {**end, "code": 75, "why": "preempted; the newest checkpoint is of step 1500"}
    make_run(runs / "llama3-8b-low", records=150, every=10, began=began, recipe=small,
             events=story(began, ("attempt", 0, attempt()), ("attempt_end", 1600, stopped)))  # fmt: skip
    began = NOW - 2450
    events = story(began, ("attempt", 0, attempt()), ("start", 9, {"attempt": 1, "world_size": 8}))
    going = make_run(runs / "llama3-8b", records=240, every=10, began=began, recipe=small, events=events)
    going.beat(going.next_attempt(), 0).write_text("2401 0 data\n")
    return going


def stretch(run: RunDir) -> None:
    """Give a run the figures of the size that it is planned for."""
    lines = []
    for line in run.metrics.read_text().splitlines():
        record = json.loads(line)
        share = record["tokens_per_s"] / 524_288
        record |= {"tokens_per_s": 402_000 * share, "step_time_s": 10.43 / share, "tflops_per_gpu": 378 * share}
        record |= {"mfu": 0.382 * share, "memory_peak_gib": 31.9, "tokens": record["step"] * 4_194_304}
        record |= {f"memory/pp{rank}_peak_gib": peak for rank, peak in enumerate((31.9, 31.2, 27.5, 26.6))}
        lines.append(json.dumps(record))
    run.metrics.write_text("\n".join(lines) + "\n")


def save(image: Image.Image, name: str, colours: int = 96) -> None:
    path = PICTURES / f"{name}.png"
    image.convert("RGB").quantize(colours, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {image.size}, {path.stat().st_size // 1024} KiB")


def terminal(name: str, folder: Path, width: int, *arguments: str) -> None:
    """What a command prints on a terminal of so many columns."""
    environment = {**os.environ, "COLUMNS": str(width), "LINES": "50", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    command = f"stty cols {width} rows 50; exec {sys.executable} -m tplaunch {' '.join(arguments)}"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=folder, env=environment, capture_output=True, text=True
    )
    save(draw_terminal(f"$ tplaunch {' '.join(arguments)}\n{last_drawn(done.stdout)}", width), name)


def console(name: str, folder: Path, width: int) -> None:
    """What `tplaunch train` shows of a run that goes on, on a terminal of so many columns."""
    run = RunDir(folder / name)
    run.create()
    out = io.StringIO()
    checked = check_recipe(load_recipe("llama3-8b"), need_data=False)
    view = RunView(checked, run, Console(file=out, width=width, force_terminal=True, markup=False, highlight=False))
    records = made_records(1240, 10, 3e-4, 0, None, time.time())
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    events = story(
        NOW,
        ("start", 1, {"attempt": 1, "world_size": 8}),
        ("checkpoint", 2, {"step": 12_000, "seconds": 9}),
        ("skipped", 3, {"step": 8412}),
        ("straggler", 4, dict(step=12_390, rank=5, node=0, tp=5, dp=0, pp=0, ratio=1.31)),
    )
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    view.close()
    save(draw_terminal(f"$ tplaunch train llama3-8b\n{last_drawn(out.getvalue())}", width), name)


def last_drawn(output: str) -> str:
    """Of what a terminal was sent, what is left of that which was drawn over."""
    lines = re.split(r"\r?(?:\x1b\[1A\x1b\[2K)+", output.replace("\r", ""))[-1]
    return re.sub(r"\x1b\[(\?25[lh]|2K)", "", lines).rstrip("\n")


def report(folder: Path) -> None:
    """The report in a browser: light, dark, and as it is printed."""
    subprocess.run(
        [sys.executable, "-m", "tplaunch", "runs", "report", "llama3-70b", "-o", "report.html"], cwd=folder, check=True
    )
    file = folder / "report.html"
    shot(file, "runs-report-light", (1200, 3080), 0.62)
    shot(file, "runs-report-dark", (1200, 1330), 0.62, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
    # What paper gets, at the width of A4 without its margins: a picture of a PDF needs more than a browser.
    text = file.read_text()
    for screen, paper in (("@media screen", "@media speech"), ("@media print", "@media screen")):
        text = text.replace(screen, paper)
    (folder / "print.html").write_text(text)
    shot(folder / "print.html", "runs-report-print", (688, 980), 0.9)


def shot(file: Path, name: str, size: tuple[int, int], scale: float, *options: str) -> None:
    picture = file.with_suffix(".png")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", file.as_uri()]
    subprocess.run(command, check=True, capture_output=True)
    image = Image.open(picture).convert("RGB")
    save(image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.LANCZOS), name)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as held:
        folder = Path(temporary)
        console("console-80", folder, 80)
        console("console-200", folder, 200)
        held.enter_context(make_runs(folder / "runs").lock())
        terminal("runs-list-80", folder, 80, "runs", "list")
        terminal("runs-list-wide", folder, 140, "runs", "list", "--filter", "'loss<3'", "--sort", "loss")
        terminal("runs-show", folder, 120, "runs", "show", "llama3-70b")
        terminal("runs-compare", folder, 110, "runs", "compare", "sweep")
        terminal("runs-plot-80", folder, 80, "runs", "plot", "llama3-70b")
        terminal("runs-plot-200", folder, 200, "runs", "plot", "sweep")
        terminal("runs-watch", folder, 110, "runs", "watch", "sweep")
        report(folder)


if __name__ == "__main__":
    main()
