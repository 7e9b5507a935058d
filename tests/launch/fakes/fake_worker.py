"""Stands in for `tplaunch.worker` in launcher tests: keeps its contract with files and signals, without torch.

FAKE_WORKER, JSON: rank -> what it does at step FAIL_AT; the other ranks train. With "peers": "hang" they take no
notice of SIGTERM once that has happened, as in a hung collective. "in attempts": "1" lets all go well after a restart;
"saves in attempts": "2" is a checkpoint before the failure. With "profiles" they note an event at SIGUSR2.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

from tplaunch.files import append_line, read_lines
from tplaunch.run.directory import RunDir
from tplaunch.run.heartbeat import Heartbeat
from tplaunch.run.processes import die_with_parent

STEPS, FAIL_AT = 6, 3


def main(run: RunDir) -> None:
    die_with_parent()
    attempt, rank = int(os.environ["TPLAUNCH_ATTEMPT"]), int(os.environ["RANK"])
    log = os.open(run.rank_log(attempt, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    asked: list[int] = []
    heartbeat = Heartbeat(run.beat(attempt, rank), rank)
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    plan = json.loads(os.environ.get("FAKE_WORKER", "{}"))
    mine = plan.get(str(rank), "train")
    print(f"rank {rank} begins", flush=True)
    (run.root / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 0:
        append_line(run.events, {"event": "start", "attempt": attempt, "resume": os.environ["TPLAUNCH_RESUME"]})
        if str(attempt) in plan.get("saves in attempts", ""):
            append_line(run.events, {"event": "checkpoint", "step": attempt, "path": "p"})
    while not any(event["event"] == "start" and event["attempt"] == attempt for event in read_lines(run.events)):
        time.sleep(0.02)  # as the ranks of a real world wait for one another
    if plan.get("profiles"):
        told = {"event": "profiled", "first": 1, "last": 2, "rank": rank, "trace": "t.json.gz"}
        signal.signal(signal.SIGUSR2, lambda number, frame: append_line(run.events, told))
    try:
        for step in range(1, plan.get("steps", STEPS) + 1):
            heartbeat.mark(step, "data")
            time.sleep(0.1)
            if step == FAIL_AT and str(attempt) in plan.get("in attempts", "123456789"):
                misbehave(mine, run.rank_error(attempt, 1))
                if plan.get("peers") == "hang":
                    time.sleep(600)
            if rank == 0:
                numbers = {"loss": 10 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_s": 5e3, "step_time_s": 0.1}
                append_line(run.metrics, {"step": step, "time": time.time(), **numbers})
            if asked and mine != "never stops":
                if rank == 0:
                    append_line(run.events, {"event": "checkpoint", "step": step, "path": "p"})
                    append_line(run.events, {"event": "stopped", "step": step})
                os._exit(0)
        if rank == 0:
            append_line(run.events, {"event": "done", "step": step})
    except Exception as error:
        traceback.print_exc()
        account = {"rank": rank, "tp": rank, "pp": 0, "dp": 0, "host": socket.gethostname(), "time": time.time()}
        account |= {"step": step, "doing": "gradients", "collective": ""}
        account |= {"type": type(error).__name__, "message": str(error), "traceback": traceback.format_exc()}
        run.rank_error(attempt, rank).write_text(json.dumps(account))
        os._exit(1)


def misbehave(how: str, other_error: Path) -> None:
    if how == "raise":
        raise ValueError("the loss of rank's own making")
    if how == "raise because of rank 1":
        while not other_error.exists():
            time.sleep(0.01)
        raise ConnectionError("peer is gone")
    if how == "sigkill":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "exit 3":
        sys.exit(3)
    if how == "leave a child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])))
