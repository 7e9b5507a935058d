"""Make the pictures of this folder again: what the commands print, and the timelines that they write.

pip install -e . vl-convert-python pillow && python docs/render.py
"""

from __future__ import annotations

import io
from pathlib import Path

import vl_convert
from PIL import Image
from rich.console import Console
from rich.text import Text

from tplaunch.check.recipe import check_recipe
from tplaunch.cli.views.plan import plan_text
from tplaunch.cli.views.tune import tuning_text
from tplaunch.plan.case import Case
from tplaunch.plan.remedies import remedies
from tplaunch.plan.run import plan_run
from tplaunch.plan.timeline import pipeline_timeline, timeline_svg
from tplaunch.plan.tune import tune
from tplaunch.recipe.load import load_recipe
from tplaunch.report.schedule import schedule_svg
from tplaunch.spec.course import Course
from tplaunch.spec.gpu import find_gpu

HERE = Path(__file__).resolve().parent


def case(recipe: str, *overrides: str) -> Case:
    checked = check_recipe(load_recipe(recipe, overrides), need_data=False)
    assert checked.recipe.hardware.gpu is not None
    return Case(checked.recipe, find_gpu(checked.recipe.hardware.gpu))


def save(name: str, svg: str, scale: float = 1.0) -> None:
    """Write a picture as PNG of few colours."""
    image = Image.open(io.BytesIO(vl_convert.svg_to_png(svg, scale=scale))).convert("RGB")
    path = HERE / "pictures" / f"{name}.png"
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB")


def terminal_picture(name: str, title: str, text: str) -> None:
    drawn = Text.from_ansi(text)
    width = max(128, *(line.cell_len for line in drawn.split()))
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(drawn, soft_wrap=True)
    save(name, console.export_svg(title=title))


def plan_picture(name: str, recipe: str, *overrides: str) -> None:
    own = case(recipe, *overrides)
    run = plan_run(own.recipe, own.gpu)
    plan, own = run.fullest.plan, run.fullest.plan.case
    drawn = own.topology.pp > 1 and own.microbatches * own.virtual_stages <= 50
    timeline = pipeline_timeline(own)[0] if drawn else None
    text = plan_text(run, [] if plan.fits else remedies(plan), timeline=timeline)
    terminal_picture(name, f"tplaunch plan {recipe}", text)


def tune_picture(name: str, recipe: str, gpus: int) -> None:
    terminal_picture(name, f"tplaunch tune {recipe} --gpus {gpus}", tuning_text(tune(case(recipe), gpus), gpus))


def timeline_picture(name: str, recipe: str, *overrides: str) -> None:
    own = case(recipe, *overrides)
    timeline, shown = pipeline_timeline(own)
    save(name, timeline_svg(timeline, f"{own.schedule}: {own.topology.pp} pipeline ranks, {shown} microbatches"))


def schedule_picture(name: str, recipe: str) -> None:
    save(name, schedule_svg(Course(case(recipe).recipe)))


if __name__ == "__main__":
    plan_picture("plan-quickstart", "quickstart", "hardware.gpu=h100-80gb")
    plan_picture("plan-llama3-70b", "llama3-70b")
    plan_picture("plan-llama3-405b", "llama3-405b")
    plan_picture("plan-megatron-1t", "megatron-1t")
    plan_picture("plan-llama3-70b-tp4", "llama3-70b-tp4")
    tune_picture("tune-llama3-70b", "llama3-70b", 512)
    one_replica = ("topology.nodes=4", "training.global_batch_size=8")
    timeline_picture("timeline-1f1b-4", "gpt3-175b", *one_replica, "topology.pp=4", "topology.virtual_stages=1",
                     "topology.schedule=1f1b")  # fmt: skip
    timeline_picture("timeline-zbv-4", "gpt3-175b", *one_replica, "topology.pp=4", "topology.virtual_stages=2",
                     "topology.schedule=zbvzerobubble")  # fmt: skip
    timeline_picture("timeline-interleaved-16", "gpt3-175b", "topology.nodes=16", "topology.pp=16",
                     "topology.virtual_stages=2", "training.global_batch_size=32")  # fmt: skip
    timeline_picture("timeline-1f1b-64", "megatron-1t", "topology.nodes=64", "training.global_batch_size=80")
    schedule_picture("schedule-deepseek-v3", "deepseek-v3")
    schedule_picture("schedule-llama3-405b", "llama3-405b")
