"""Runs the command of `logging.on_event` for each event of a run, beside the launch, which never waits for it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from tplaunch.files import Tail, parse_lines
from tplaunch.run.alerts import alert_of
from tplaunch.run.directory import RunDir
from tplaunch.run.events import parse_event

COMMAND_S = 10.0  # that a command may take for an event
FINISH_S = 5.0  # that the end of a launch waits for the last events to be told; a job may have to go back to its queue
POLL_S = 0.5
BACKLOG = 100  # events that wait; of more, the oldest are left out


class EventHook:
    """Follows a run's events on a thread of its own and runs a command for each, one after the other.

    The command is started without a shell; it reads from stdin one JSON object, the event's line of `events.jsonl`
    with `run` (the directory) and, for what somebody should hear of at once, `alert` {title, text, level}. What it
    prints, and that it failed or took longer than `COMMAND_S`, is in `logs/on_event.log`.

    Args:
        run_dir: an existing run directory. Events that are there already are not told.
        command: as `shlex` splits it.
    """

    def __init__(self, run_dir: RunDir, command: str) -> None:
        self._run_dir, self._argv = run_dir, shlex.split(command)
        self._events = Tail(run_dir.events)
        self._events.read()
        self._ending = threading.Event()
        self._late = threading.Event()  # the launch waits no longer
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._follow, name="on_event", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Tell what has happened up to now, within `FINISH_S`, and end; a command that is at work then is killed."""
        self._ending.set()
        self._thread.join(FINISH_S)
        self._late.set()
        if (process := self._process) is not None:
            _kill(process)

    def _follow(self) -> None:
        while True:
            ending = self._ending.wait(POLL_S)
            with suppress(OSError):  # a directory that cannot be read or written just now: the ranks say so
                self._tell(parse_lines(self._events.read(whole_lines=True)))
            if ending:
                return

    def _tell(self, events: list[dict[str, Any]]) -> None:
        if len(events) > BACKLOG:
            self._note(f"{len(events) - BACKLOG} events left out: the command takes too long for so many")
        for line in events[-BACKLOG:]:
            if self._late.is_set():
                return
            event = parse_event(line)
            alert = alert_of(event) if event is not None else None
            more = {"run": str(self._run_dir.root.absolute()), **({"alert": asdict(alert)} if alert else {})}
            self._run(json.dumps({**line, **more}).encode() + b"\n")

    def _run(self, text: bytes) -> None:
        with self._run_dir.hook_log.open("ab") as log:
            try:
                process = subprocess.Popen(
                    self._argv, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                return self._note(f"cannot be started: {error}")
        self._process = process
        try:
            process.communicate(text, timeout=COMMAND_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()
            self._note(f"ended after {COMMAND_S:.0f} s, for {text.decode().strip()}")
        else:
            if process.returncode:
                self._note(f"exit code {process.returncode}, for {text.decode().strip()}")
        finally:
            self._process = None

    def _note(self, text: str) -> None:
        with self._run_dir.hook_log.open("a") as log:
            log.write(f"logging.on_event: {text}\n")


@contextmanager
def telling(run_dir: RunDir, command: str | None) -> Iterator[None]:
    """Within the block, run the command, if there is one, for each event."""
    hook = EventHook(run_dir, command) if command else None
    try:
        yield
    finally:
        if hook is not None:
            hook.finish()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and what it has started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
