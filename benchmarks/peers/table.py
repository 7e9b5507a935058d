"""Results to docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks.peers.work import BARE, EARLIER, OURS, SHAPES, START_GRID, START_SHAPE, TRAINERS, Grid, grids

Result = dict[str, Any]
_STARTS = (BARE, *TRAINERS, EARLIER)
_TO = {"joined": "to the end of the all-reduce", "start": "to its own end"}
_START_HEAD = f"""\
Seconds from the command to the end of the first step: {START_SHAPE}, {START_GRID}; medians over rounds, in brackets the
least and the most. `tplaunch train` has its checks and its data; the others' drivers have random tokens and neither.
The bare torchrun's two ranks import torch, join by gloo and do one all-reduce.
"""
_KINDS = ("matmul", "attention", "other kernels")  # of `tplaunch bench`
HEAD = """\
# Performance

tplaunch beside other trainers on the same work: one optimizer step of a Llama-like model in fp32 on random tokens,
fused AdamW, no clipping of gradients, on CPU and gloo, every trainer with the same number of threads. Data-parallel
ranks hold the model and its optimizer whole (tplaunch with ZeRO 0, DDP of transformers and megatron-core); torchtitan
shards them, as it does by itself. With experts, transformers' ranks hold all of them. They take turns, round by round.
Figures are medians over the rounds of each round's median step; in brackets the least and the most. Memory is the
resident size that the largest rank had at most. On a CPU with AVX-512 that is not Intel's, oneDNN does tplaunch's
matmuls (`tplaunch/kernels/matmul.py`); the others' are MKL's, as torch chooses.
`python -m benchmarks.peers` made this page: `setup DIR`, `run --venv DIR --output FILE`, `start` likewise, `table FILE
--earlier FILE --start FILE`; an earlier tplaunch is measured with `--earlier CHECKOUT`.
"""


def page(results: Sequence[Result], both: Sequence[Result] = (), starts: Sequence[Result] = ()) -> str:
    """The whole page, Markdown.

    Args:
        results: as `measure.measure` returns them, of any number of rounds.
        both: the same of this tplaunch and an earlier one.
        starts: as `start.measure_start` returns them.
    """
    done = [result for result in results if "failed" not in result]
    parts = [HEAD, _setting(done)]
    for name, shape in SHAPES.items():
        if any(result["shape"] == name for result in done):
            mine = [result for result in done if result["shape"] == name]
            parts += [
                f"\n## {name}\n\n{str(shape).capitalize()}.\n",
                _speeds(mine, grids(name)),
                _memory(mine, grids(name)),
                _before([result for result in both if result["shape"] == name], grids(name)),
            ]
    return "\n".join([*filter(None, [*parts, _starts(starts)]), _not_measured(results)])


def _setting(done: Sequence[Result]) -> str:
    versions: dict[str, set[str]] = {}
    for result in done:
        for package, version in result["versions"].items():
            versions.setdefault(package, set()).add(version)
    machines = sorted({f"{result['cpu']}, {result['cores']} cores" for result in done})
    threads = sorted({(result["threads"], Grid(*result["grid"]).ranks == 1) for result in done}, reverse=True)
    loads = [result["load"] for result in done]
    shapes = {result["shape"] for result in done}
    first = [name for name in SHAPES if name in shapes - {r["shape"] for r in done if not r.get("first")}]
    lines = [
        f"Machine: {'; '.join(machines)}; {_counted(threads)}.",
        f"At real-time priority, other work had what was left: {', '.join(first)}." if first else "",
        f"Load average before a measurement: median {median(loads):.1f}, at most {max(loads):.1f}." if loads else "",
        "Versions: " + ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items())),
    ]
    return "\n".join(f"- {line}" for line in lines if line) + "\n"


def _counted(threads: Iterable[tuple[int, bool]]) -> str:
    return ", ".join(
        f"{n} thread{'s' if n > 1 else ''} a rank with {'one rank' if alone else 'several ranks'}"
        for n, alone in threads
    )


def _speeds(results: Sequence[Result], where: Sequence[Grid]) -> str:
    """Tokens/s, and ours over the best other."""

    def tokens_per_s(result: Result) -> float:
        return SHAPES[result["shape"]].tokens / median(result["seconds"])

    return "Tokens/s:\n\n" + _grid_table(results, where, tokens_per_s, max, "of the best")


def _memory(results: Sequence[Result], where: Sequence[Grid]) -> str:
    """Megabytes, and ours over the leanest other."""
    return "Memory, MB:\n\n" + _grid_table(
        results, where, lambda result: result["peak_memory"] / 1e6, min, "of the leanest"
    )


def _before(results: Sequence[Result], where: Sequence[Grid]) -> str:
    """What an earlier tplaunch did, beside this one, and where the time of a step went: medians over rounds."""
    rows, profiles = [], []
    for grid in where:
        of = [result for result in results if Grid(*result["grid"]) == grid]
        now, then = (
            [one for one in of if one["trainer"] == trainer and "seconds" in one] for trainer in (OURS, EARLIER)
        )
        if not (now and then):
            continue
        speeds, memory = (
            [median(figure(result) for result in some) for some in (then, now)]
            for figure in (
                lambda result: SHAPES[result["shape"]].tokens / median(result["seconds"]),
                lambda result: result["peak_memory"] / 1e6,
            )
        )
        cells = [f"{figure:,.0f}" for figure in (*speeds, *memory)]
        rows.append(f"| {grid} | {cells[0]} | {cells[1]} | {speeds[1] / speeds[0]:.2f} | {cells[2]} | {cells[3]} |")
        for title, some in (("before", then), ("now", now)):
            kinds = [median(result["kernels"].get(kind, 0.0) for result in some) for kind in _KINDS]
            # One step is profiled, others are timed: these may be shorter than what was seen of it.
            rest = max(0.0, median(median(result["seconds"]) for result in some) - sum(kinds))
            cells = [f"{1e3 * seconds:,.0f}" for seconds in (*kinds, rest)]
            profiles.append(f"| {grid} | {title} | {' | '.join(cells)} |")
    if not rows:
        return ""
    head = "| TP x PP x DP | tokens/s, before | now | times | MB, before | now |\n|---|---|---|---|---|---|"
    profile = f"| TP x PP x DP | | {' | '.join(_KINDS)} | else |\n|---|---|{'---|' * (len(_KINDS) + 1)}"
    where_it_goes = "Milliseconds of a step by torch's profiler; else: waits for other ranks, and Python:\n"
    tables = ["tplaunch before its work on speed began, and now:\n", head, *rows, "", where_it_goes, profile, *profiles]
    return "\n".join(tables) + "\n"


def _starts(results: Sequence[Result]) -> str:
    """Seconds from a command to the end of the first step, beside a bare torchrun, and where tplaunch's go."""
    done = {name: [r for r in results if r["trainer"] == name and "failed" not in r] for name in _STARTS}
    bare = {to: [result[to] for result in done[BARE]] for to in ("joined", "start")}
    if not done[BARE]:
        return ""
    rows = [f"| torchrun, {words} | {_seconds(bare[to])} | |" for to, words in _TO.items()]
    for name in _STARTS[1:]:
        if took := [result["start"] for result in done[name]]:
            rows.append(f"| {name} | {_seconds(took)} | {median(took) / median(bare['start']):.2f} |")
    first = " At real-time priority: other work had what was left." if all(r.get("first") for r in results) else ""
    head = f"{_START_HEAD.rstrip()}{first}\n\n| | seconds | of a bare torchrun |\n|---|---|---|"
    return "\n".join(["\n## Start\n", head, *rows, *_where_it_goes(done[OURS])]) + "\n"


def _where_it_goes(ours: Sequence[Result]) -> list[str]:
    if not ours:
        return []
    parts = {part: median(result["parts"][part] for result in ours) for part in ours[0]["parts"]}
    before = median(result["start"] - sum(result["parts"].values()) for result in ours)
    said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in {"before a rank runs": before, **parts}.items())
    return ["", f"tplaunch's seconds: {said}."]


def _seconds(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def _grid_table(results: Sequence[Result], where: Sequence[Grid], figure: Any, best: Any, title: str) -> str:
    rows = [f"| TP x PP x DP | {' | '.join(TRAINERS)} | tplaunch, {title} other | rounds |"]
    rows.append("|---" * (len(TRAINERS) + 3) + "|")
    for grid in where:
        found: dict[str, list[float]] = {}
        for result in results:
            if Grid(*result["grid"]) == grid:
                found.setdefault(result["trainer"], []).append(figure(result))
        if not found:
            continue
        medians = {trainer: median(values) for trainer, values in found.items()}
        others = [value for trainer, value in medians.items() if trainer != OURS]
        ratio = f"{medians[OURS] / best(others):.2f}" if OURS in medians and others else "-"
        rounds = sorted({len(values) for values in found.values()})
        cells = [_cell(found.get(trainer)) for trainer in TRAINERS]
        rows.append(f"| {' | '.join([str(grid), *cells, ratio, ' to '.join(map(str, rounds))])} |")
    return "\n".join(rows) + "\n"


def _cell(values: list[float] | None) -> str:
    if values is None:
        return "-"
    return f"{median(values):,.0f} ({min(values):,.0f}..{max(values):,.0f})"


def _not_measured(results: Sequence[Result]) -> str:
    """Every trainer, shape and topology without a figure, and why; and what no result could show."""
    lines: dict[str, list[str]] = {}
    for name in SHAPES:
        for grid in grids(name):
            for trainer in TRAINERS:
                of = [r for r in results if (r["trainer"], r["shape"], Grid(*r["grid"])) == (trainer, name, grid)]
                failed = [result["failed"] for result in of if "failed" in result]
                if not of:
                    lines.setdefault(f"{trainer}: was not run", []).append(f"{name} {grid}")
                elif failed:
                    times = f" ({len(failed)} of {len(of)} rounds)" if len(failed) < len(of) else ""
                    lines.setdefault(f"{trainer}: {failed[-1]}", []).append(f"{name} {grid}{times}")
    listed = [f"- {what}: {'; '.join(where)}." for what, where in lines.items()]
    listed += [
        "- GPUs, NCCL, several nodes, bf16 and compiled models: this page is of one machine's CPU.",
        "- Data loading and checkpoints: steps are timed after three to warm up.",
    ]
    return "\n## What was not measured\n\n" + "\n".join(listed) + "\n"
