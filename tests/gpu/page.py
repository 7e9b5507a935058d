"""docs/gpu.md from what `run.py` left: python -m tests.gpu.page > docs/gpu.md

Reads docs/gpu/before.json and after.json (results.json of the calls of a day, the later of two outcomes of a part; in
`before` of the code before it ever ran on a GPU) and the two profiles beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.shapes import SHAPES

FOLDER = Path(__file__).parents[2] / "docs" / "gpu"
HEAD = """\
# Performance on a GPU

One {device}, torch {torch}, transformers {transformers}, torchtitan {torchtitan}, Python {python}, on
26 November 2026. `python tests/gpu/run.py` measured it, `python -m tests.gpu.page` made this page. All train from fp32
master weights with matmuls in bf16 and fused AdamW, gradients clipped, on random tokens, a microbatch a step;
transformers and torchtitan compute fp32 weights under autocast, compiled. A step is timed from the return of the one
before to its own, 12 of them after 4 to warm up; the spread is the longest step over the shortest, less one.
"""
OPERATIONS = {
    "matmuls": ("aten::mm", "aten::addmm", "aten::_grouped_mm"),
    "attention": ("aten::_cudnn_attention_forward", "aten::_cudnn_attention_backward"),
    "AdamW": ("aten::_fused_adamw_",),
    "clipping": ("aten::_foreach_norm", "aten::_foreach_mul_"),
}


def page() -> str:
    """The whole page, Markdown."""
    before, after = (json.loads((FOLDER / f"{name}.json").read_text()) for name in ("before", "after"))
    parts = [HEAD.format(**after), "\n".join(_speeds(_parts(before), _parts(after)))]
    parts += ["\n".join(_profile()), "\n".join(_memory(_parts(after))), "\n".join(_tests(after))]
    return "\n".join([*parts, (FOLDER / "left.md").read_text()])


def _parts(results: dict[str, Any]) -> dict[str, Any]:
    return {part["part"]: part for part in results["parts"]}


def _speeds(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    yield "## Speed\n"
    for shape in SHAPES:
        rows = {name: part for name, part in after.items() if name.startswith(f"{shape} ")}
        if not rows:
            continue
        yield f"**{shape}**: {SHAPES[shape]}.\n"
        yield "| | tokens/s | MFU | step, ms | spread | peak, GiB | to the first step, s |"
        yield "|---|---|---|---|---|---|---|"
        old = {f"{name}, before": before[name] for name in rows if name in before}
        measured = {name: part["figures"]["measured"] for name, part in {**rows, **old}.items()}
        for name, one in sorted(measured.items(), key=lambda row: -row[1]["tokens_per_s"]):
            cells = [name.removeprefix(f"{shape} "), f"{one['tokens_per_s']:,.0f}", f"{one['mfu']:.1%}"]
            cells += [f"{1e3 * one['step_s']:.1f}", f"{one['spread']:.0%}", f"{one['peak_gib']:.1f}"]
            yield f"| {' | '.join([*cells, format(one['to_first_step_s'], '.1f')])} |"
        yield ""


def _profile() -> Iterator[str]:
    yield "## Where a step's time goes\n"
    yield "Milliseconds of kernels in one step of 1b, without compiling.\n"
    yield "| | before | after |\n|---|---|---|"
    columns = [_kinds(FOLDER / f"{name}-profile.txt") for name in ("before", "after")]
    for kind in columns[0]:
        yield f"| {kind} | " + " | ".join(f"{column[kind]:.1f}" for column in columns) + " |"
    yield ""


def _kinds(profile: Path) -> dict[str, float]:
    """Milliseconds by kind, of a table of torch's profiler."""
    times, total = {}, 0.0
    for line in profile.read_text().splitlines():
        cells = re.split(r"\s{2,}", line.strip())
        if found := re.match(r"Self CUDA time total: ([\d.]+)ms", line):
            total = float(found[1])
        elif len(cells) > 10 and cells[6].endswith(("ms", "us")):
            times[cells[0]] = float(cells[6][:-2]) * (1.0 if cells[6].endswith("ms") else 1e-3)
    kinds = {kind: sum(times.get(name, 0.0) for name in names) for kind, names in OPERATIONS.items()}
    return {**kinds, "all else": total - sum(kinds.values()), "in all": total}


def _memory(after: dict[str, Any]) -> Iterator[str]:
    yield "## Memory, planned and held\n"
    yield "The peak of a small model's training, GiB, and what `plan` said.\n"
    yield "| | planned | held | off |\n|---|---|---|---|"
    for name, one in after["memory"]["figures"].items():
        case = name.removeprefix("test_peak_is_the_planned_one-").strip("-")
        yield f"| {case} | {one['planned_gib']:.2f} | {one['held_gib']:.2f} | {one['error']:+.1%} |"
    yield ""


def _tests(after: dict[str, Any]) -> Iterator[str]:
    yield "## What else ran\n"
    for part in after["parts"]:
        figures = [one for one in part["figures"].values() if "worst_relative_difference" in one]
        if figures:
            worst = max(one["worst_relative_difference"] for one in figures)
            yield f"- `{part['part']}`: {len(figures)} cases {part['result']}, at most {worst:.1e} off."
        elif part["part"] in ("parity", "experts", "models", "checkpoint", "launch", "bench"):
            yield f"- `{part['part']}`: {part['result']}."
    yield ""


if __name__ == "__main__":
    print(page(), end="")
