"""Results to docs/generation.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.generate.work import BATCHES, DTYPES, GRIDS, MADE, OURS, PROMPT, SHAPES, THEIRS, Grid, engines

Result = dict[str, Any]
HEAD = f"""\
# Speed of generation

`tplaunch generate` beside transformers' `generate` on the same random weights and prompts, on this machine's CPU.
Of each prompt {PROMPT} tokens are read, and behind the first that follows them {MADE - 1} are made one after another,
always the likeliest. transformers runs with its dynamic cache and SDPA, on the folder that tplaunch imported. The two
take turns in one process, round by round; figures are medians over the rounds, in brackets the least and the most.
`python -m benchmarks.generate` made this page: `run --output FILE`, `table FILE`.
"""
WHAT = {"read": "prompts", "made": "made"}


def page(results: Sequence[Result]) -> str:
    """The whole page, Markdown.

    Args:
        results: lines as `run` writes them, of any number of rounds.
    """
    parts = [HEAD, _setting(results)]
    for name, shape in SHAPES.items():
        for dtype in DTYPES:
            mine = [result for result in results if (result["shape"], result["dtype"]) == (name, dtype)]
            if mine:
                size = (
                    f"Hidden size {shape.hidden:,}, {shape.layers} layers, {shape.heads} heads, {shape.kv_heads} "
                    f"key/value heads, ffn {shape.ffn:,}, vocabulary {shape.vocab:,}."
                )
                parts += [f"\n## {name}, {dtype}\n\n{size} Tokens/s:\n", _speeds(mine), _agreement(mine)]
    return "\n".join([*parts, _not_measured(results)])


def _setting(results: Sequence[Result]) -> str:
    versions: dict[str, set[str]] = {}
    for result in results:
        for package, version in result["versions"].items():
            versions.setdefault(package, set()).add(version)
    machines = sorted({f"{result['cpu']}, {result['cores']} cores" for result in results})
    threads = sorted({(Grid(*result["grid"]).ranks, result["threads"]) for result in results})
    told = ", ".join(f"{count} a rank with {ranks} rank{'s' if ranks > 1 else ''}" for ranks, count in threads)
    loads = [result["load"] for result in results]
    lines = [
        f"Machine: {'; '.join(machines)}; threads: {told}.",
        f"Load average before a measurement: median {median(loads):.1f}, at most {max(loads):.1f}.",
        "Versions: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())),
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _speeds(results: Sequence[Result]) -> str:
    rows = [f"| TP x PP | batch | | {OURS} | {THEIRS} | {OURS}, of {THEIRS} | rounds |", "|---" * 7 + "|"]
    for grid in GRIDS:
        for batch in BATCHES:
            for what, title in WHAT.items():
                found: dict[str, list[float]] = {}
                for result in results:
                    if (Grid(*result["grid"]), result["batch"]) == (grid, batch):
                        found.setdefault(result["engine"], []).append(result[what])
                if found:
                    ratio = f"{median(found[OURS]) / median(found[THEIRS]):.2f}" if THEIRS in found else "-"
                    cells = [_cell(found.get(OURS)), _cell(found.get(THEIRS)), ratio, str(len(found[OURS]))]
                    rows.append(f"| {' | '.join([str(grid), str(batch), title, *cells])} |")
    return "\n".join(rows) + "\n"


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "-"
    digits = 0 if median(values) >= 100 else 1
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}..{max(values):,.{digits}f})"


def _agreement(results: Sequence[Result]) -> str:
    """How many of the tokens were those of transformers."""
    both = [result["same"] for result in results if len(engines(Grid(*result["grid"]))) > 1]
    if not both:
        return ""
    if min(both) == 1:
        return "Both made the same tokens.\n"
    return (
        f"{min(both):.0%} of the tokens or more were the same: random weights have near ties, which the rounding of "
        "bf16\ndecides, and what comes after one differs.\n"
    )


def _not_measured(results: Sequence[Result]) -> str:
    asked = [(shape, dtype, grid) for shape in SHAPES for dtype in DTYPES for grid in GRIDS]
    there = {(result["shape"], result["dtype"], Grid(*result["grid"])) for result in results}
    missing = [f"{shape} {dtype} {grid}" for shape, dtype, grid in asked if (shape, dtype, grid) not in there]
    lines = [f"Was not run: {'; '.join(missing)}."] if missing else []
    lines += [
        f"{THEIRS} on several ranks: its tensor parallelism is not for gloo, and it has no pipeline.",
        f"{THEIRS} compiled, with a static cache or with continuous batching.",
        "GPUs, several nodes, sampling, prompts of unequal length, trained weights: this page is of one machine's CPU.",
        "Loading, tokenizing and start-up.",
    ]
    return "\n## What was not measured\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"
