"""Finds the root cause of a failed launch: the rank that failed first, not the peers that failed because of it."""

from __future__ import annotations

import json
import re
import shlex
import signal
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tplaunch.run.directory import RunDir
from tplaunch.run.flight import NCCL_PREFIX
from tplaunch.run.heartbeat import Beat, read_beats
from tplaunch.spec.topology import Topology

if TYPE_CHECKING:
    from rich.console import Console

    from tplaunch.recipe.schema import Recipe

TRACEBACK_LINES = 14
LOG_LINES = 14

# What torchrun 2.11 to 2.13 logs: a worker that it stops because another has failed, and each worker's end.
_TOLD_TO_END = re.compile(r"Sending process (\d+) closing signal")
_OWN_LINE = re.compile(r"^[WE]\d{4} ", re.MULTILINE)
_ENDED = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s+exitcode\s*: (-?\d+) \(pid: (\d+)\)")
# What gloo raises, and what NCCL's watchdog logs before it aborts the process, when a peer does not come.
_WAITED = re.compile(r".*(Timed out waiting|collective operation timeout).*")

OUT_OF_MEMORY = "OutOfMemoryError"  # torch's, of a GPU
_ADVICE = {
    "SIGKILL": "nothing but the kernel or a person sends SIGKILL; for its out-of-memory killer see: dmesg",
    OUT_OF_MEMORY: "lower training.micro_batch_size, set training.recompute: auto, or raise topology.tp, cp or pp",
}


@dataclass(frozen=True)
class Ended:
    """A worker's end as torchrun reports it.

    Args:
        code: exit code; of a worker that a signal ended, minus its number.
        told: torchrun had told it to end, so that it is no cause.
    """

    rank: int
    code: int
    told: bool


@dataclass(frozen=True)
class Cause:
    """The rank that failed first, and how.

    Args:
        rank: None: torchrun itself failed.
        what: one line or the exception's own message.
        detail: the last lines of its traceback or of its log.
        log: where to read on.
        advice: what helps against this kind of failure, "" where nothing general does.
        kind: the type of the exception, "" where there was none.
    """

    rank: int | None
    host: str
    what: str
    detail: str
    log: Path
    advice: str = ""
    kind: str = ""


def workers_told_to_end(log: str) -> set[int]:
    """Process ids that torchrun has told to end, from what it printed."""
    return {int(pid) for pid in _TOLD_TO_END.findall(log)}


def ends(log: str) -> list[Ended]:
    """The workers' ends from the summary that torchrun prints last."""
    told = workers_told_to_end(log)
    return [Ended(int(rank), int(code), int(pid) in told) for rank, code, pid in _ENDED.findall(log)]


def errors(run_dir: RunDir, attempt: int) -> list[dict[str, Any]]:
    """What the ranks of an attempt have said of their own exceptions, earliest first."""
    files = run_dir.attempt_dir(attempt).glob("rank-*.error.json")
    return sorted((json.loads(file.read_bytes()) for file in files), key=lambda error: error["time"])


def find_cause(run_dir: RunDir, attempt: int) -> Cause:
    """The root cause of a failed attempt.

    A rank that was killed outright comes first: its peers raise only because it is gone. Then the earliest
    exception; the abort of a communication library, which follows others' failures too, only where no
    rank that ended by itself has raised. Where ranks waited in vain for another, that one is the cause.
    """
    torchrun_log = run_dir.torchrun_log(attempt)
    ended = [end for end in ends(_read(torchrun_log)) if not end.told]
    raised = errors(run_dir, attempt)
    killed = [end for end in ended if end.code < 0 and -end.code not in (signal.SIGTERM, signal.SIGABRT)]
    if killed:
        return _killed(killed[0], run_dir, attempt)
    waited = _waited_in_vain(run_dir, attempt, raised, ended)
    if waited and (late := _behind(run_dir, attempt, waited)):
        return _hung(late, waited, run_dir, attempt)
    if raised and (not ended or {end.rank for end in ended} & {error["rank"] for error in raised}):
        return _raised(raised[0], run_dir, attempt)
    if ended:
        return _killed(ended[0], run_dir, attempt)
    return Cause(None, "", "torchrun failed before a rank did", _tail(_read(torchrun_log)), torchrun_log)


def _waited_in_vain(run_dir: RunDir, attempt: int, raised: list[dict[str, Any]], ended: list[Ended]) -> dict[int, str]:
    """The ranks whose wait for others ran out, with what they say of it."""
    found = {error["rank"]: f"{_where(error)}: {error['message']}" for error in raised}
    for end in ended:
        if end.code == -signal.SIGABRT:
            found[end.rank] = _read(run_dir.rank_log(attempt, end.rank))
    said = {rank: _WAITED.search(text) for rank, text in found.items()}
    return {rank: match[0] for rank, match in said.items() if match}


def _behind(run_dir: RunDir, attempt: int, waited: dict[int, str]) -> list[Beat]:
    """Of the ranks that did not wait in vain, those that were furthest behind."""
    others = [beat for beat in read_beats(run_dir.attempt_dir(attempt)) if beat.rank not in waited]
    last = min((beat.place for beat in others), default=None)
    return [beat for beat in others if beat.place == last]


def _hung(late: list[Beat], waited: dict[int, str], run_dir: RunDir, attempt: int) -> Cause:
    first, (peer, text) = late[0], next(iter(waited.items()))
    also = f" (nor did rank {', '.join(str(beat.rank) for beat in late[1:])})" if len(late) > 1 else ""
    when = datetime.fromtimestamp(first.time).strftime("%H:%M:%S")
    what = f"did not arrive{also}: last seen at {when} in {first}; rank {peer} waited for it in {text}"
    log = run_dir.rank_log(attempt, first.rank)
    return Cause(first.rank, "", what, _tail(_read(log)), log, _where_collectives_stand(run_dir, attempt, peer))


def _where_collectives_stand(run_dir: RunDir, attempt: int, peer: int) -> str:
    """How to see what the ranks sent one another last; "" where torch has written nothing."""
    folder, flight = run_dir.attempt_dir(attempt), run_dir.rank_flight(attempt, peer)
    if any(folder.glob(f"{NCCL_PREFIX}*")):
        return f"the last collectives of every rank: torchfrtrace -p {NCCL_PREFIX} {shlex.quote(str(folder))}"
    return f"the last collectives of rank {peer}: {flight}" if flight.exists() else ""


def _where(error: dict[str, Any]) -> str:
    """Where in the run an exception was raised, from the rank's account."""
    beat = Beat(error["rank"], error["step"], error["time"], error["doing"])
    return f"{beat}, last collective {error['collective']}" if error["collective"] else str(beat)


def _killed(end: Ended, run_dir: RunDir, attempt: int) -> Cause:
    log = run_dir.rank_log(attempt, end.rank)
    if end.code < 0:
        name = _signal_name(-end.code)
        return Cause(end.rank, "", f"killed by {name}", _tail(_read(log)), log, _ADVICE.get(name, ""))
    what = f"exit code {end.code}, without an exception"
    if printed := _read(log).strip():
        return Cause(end.rank, "", what, _tail(printed), log)
    # It ended before it could open its own log: what it printed stands in torchrun's, before torchrun's own lines.
    log = run_dir.torchrun_log(attempt)
    return Cause(end.rank, "", what, _tail(_OWN_LINE.split(_read(log), maxsplit=1)[0]), log)


def _raised(error: dict[str, Any], run_dir: RunDir, attempt: int) -> Cause:
    traceback = error["traceback"].rstrip().splitlines()
    message = f"{error['type']}: {error['message']}"
    detail = "\n".join(traceback[-TRACEBACK_LINES:]).removesuffix(message).rstrip() + f"\nin {_where(error)}"
    log = run_dir.rank_log(attempt, error["rank"])
    kind = error["type"]
    return Cause(error["rank"], error["host"], message, detail, log, _ADVICE.get(kind, ""), kind)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-LOG_LINES:])


def print_cause(console: Console, cause: Cause, recipe: Recipe, next_step: str) -> None:
    """Show a cause: a panel on a terminal, the same text elsewhere, where boxes and line breaks hinder search. Of a GPU
    without memory, with what the planner knows of it.

    Args:
        recipe: resolved.
        next_step: what the user can do now.
    """
    from rich.panel import Panel
    from rich.text import Text

    topology, lines = Topology.of(recipe), [("next", cause.advice)]
    if cause.kind == OUT_OF_MEMORY and cause.rank is not None:
        from tplaunch.launch.memory_account import memory_account

        lines = memory_account(recipe, cause.rank) or lines
    title = "torchrun failed"
    if cause.rank is not None:
        host = f", {cause.host}" if cause.host else ""
        title = f"Rank {cause.rank} failed ({topology.describe(cause.rank)}{host})"
    detail = Text(f"{cause.detail}\n\n" if cause.detail else "", "dim")
    body = Text.assemble((cause.what, "bold red"), "\n\n", detail, ("log   ", "bold"), str(cause.log))
    for label, line in [*lines, ("next", next_step)]:
        if line:
            body.append(f"\n{label:<6}", "bold").append(line)
    if console.is_terminal:
        console.print(Panel(body, title=title, title_align="left", border_style="red"))
    else:
        console.print(Text.assemble(title, "\n", body), soft_wrap=True)
